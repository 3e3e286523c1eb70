// The scan backwards for one state; see narrow_forward.cu. The warps of a block share out the steps between two saved
// states. Each runs its own forwards, from 0, and backwards, from 0, tells the others where it ended both times, and
// runs both again from what enters its steps from either side.

constexpr int SPLIT = EVERY / T;
static_assert(N == 1 && S == 1 && CL == V && WARPS == 1 && 2 * T <= 16, "for one state");

struct Shared {
  float rows[SPLIT][32];                 // a warp's T steps of B, and from the 16th on of C
  float told[2][SPLIT][3][CL][32];       // the state at the end, the decay, the gradient at the beginning
  float part[SPLIT][2 * T][33];          // what the lanes add to dB and dC; read by other lanes, on other banks
  float sums[SPLIT][5][CL][32];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

struct Tile {
  Packed<U, V> u[T];
  Packed<DELTA, V> delta[T];
  Packed<DY, V> dy[T];
#if GATE
  Packed<Z, V> z[T];
#endif
  float row;
};

extern "C" __global__ void __launch_bounds__(32 * SPLIT, MIN_BLOCKS) scan_backward(const Problem p) {
  extern __shared__ float4 room[];
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const Place a(p);
  const int warp = threadIdx.x / 32;
  const Piece chunk(p, a.number, pieces_of(p.length, CHUNK), CHUNK);
  const int length = chunk.length;
  const int end = chunk.begin + CHUNK < length ? chunk.begin + CHUNK : length;
  const int64 of_chunk = a.number * p.n_channels;

  Pairs A2, grad;  // grad: dL/dh after the steps at hand
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(grad);
  if (p.entering) load_by_state(grad, p.entering + of_chunk, p, a);
#if STATIC_B
  Pairs b_static;
  load_by_channel(b_static, p.B, a);
#endif
#if STATIC_C
  Pairs c_static;
  load_by_channel(c_static, p.C, a);
#endif
  float bias[V], skip[V], sums[5][V];  // for the gradients of A, D, bias, B and C
  load_of_row(bias, p.bias, a);
  load_of_row(skip, p.D, a);
#pragma unroll
  for (int k = 0; k < 5; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[k][v] = 0.0f;
  const Rows<U> u_rows(p.u, p.u_stride, p, chunk, a), du_rows(p.du, p.U_stride, p, chunk, a);
  const Rows<DELTA> delta_rows(p.delta, p.delta_stride, p, chunk, a), ddelta_rows(p.ddelta, p.DELTA_stride, p, chunk, a);
  const Rows<DY> dy_rows(p.dy, p.dy_stride, p, chunk, a);
#if GATE
  const Rows<Z> z_rows(p.z, p.z_stride, p, chunk, a), dz_rows(p.dz, p.Z_stride, p, chunk, a);
#endif
#if !STATIC_B
  MB* B = first_row(p.B, p.B_stride, p, chunk) + a.group * p.B_group;
#endif
#if !STATIC_C
  MC* C = first_row(p.C, p.C_stride, p, chunk) + a.group * p.C_group;
#endif
  const int64 of_tile = int64(a.tile) * p.n_tokens * (p.n_channels / p.per_group) + a.group;

  Tile next;
  Pairs h;  // before the EVERY steps
  Pairs next_h;
  auto load = [&](int first) {  // the EVERY steps from `first` on: the warp's
    const int step = first + warp * T, stop = first < chunk.begin ? step : end;
    u_rows.load(next.u, a, step, stop);
    delta_rows.load(next.delta, a, step, stop);
    dy_rows.load(next.dy, a, step, stop);
#if GATE
    z_rows.load(next.z, a, step, stop);
#endif
    next.row = 0.0f;
    const int t = step + a.lane % 16;
#if !STATIC_B
    if (a.lane < T && t < stop) next.row = one(step_at(B, p.B_stride, t));
#endif
#if !STATIC_C
    if (a.lane >= 16 && a.lane < 16 + T && t < stop) next.row = one(step_at(C, p.C_stride, t));
#endif
    zero(next_h);
    if (first >= chunk.begin && end > chunk.begin)
      load_by_state(next_h, p.saved + (chunk.start / EVERY + chunk.s + first / EVERY) * p.n_channels, p, a);
  };
  const int last = end > chunk.begin ? (end - 1) / EVERY * EVERY : chunk.begin - EVERY;
  load(last);
  int buffer = 0;
  for (int first = last; first >= chunk.begin; first -= EVERY) {
    const int mine = first + warp * T;
    const Tile now = next;
    EACH_PAIR h[j][i] = next_h[j][i];
    shared.rows[warp][a.lane] = now.row;
    __syncwarp();
    load(first - EVERY);

    float dt[T][V], slope[T][V], decay[T][V], dout[T][V], from_0[V], back[V], sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) from_0[v] = back[v] = sum[v] = 0.0f;
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int v = 0; v < V; ++v) {
#if STATIC_B
        const float b = b_static[v][0];
#else
        const float b = shared.rows[warp][t];
#endif
        dt[t][v] = step_size(now.delta[t].get(v) + bias[v], slope[t][v]);
        if (mine + t >= end) dt[t][v] = 0.0f;  // leaves the state, and its gradient, as they are
        decay[t][v] = exp2_fast(__fmul_rn(dt[t][v], A2[v][0]));
        from_0[v] = __fmaf_rn(decay[t][v], from_0[v], __fmul_rn(__fmul_rn(dt[t][v], now.u[t].get(v)), b));
        sum[v] += dt[t][v];
        dout[t][v] = now.dy[t].get(v);
#if GATE
        const float gate = now.z[t].get(v);
        dout[t][v] *= gate * sigmoid(gate);
#endif
      }
#pragma unroll
    for (int t = T - 1; t >= 0; --t)
#pragma unroll
      for (int v = 0; v < V; ++v) {
#if STATIC_C
        const float c = c_static[v][0];
#else
        const float c = shared.rows[warp][16 + t];
#endif
        back[v] = __fmul_rn(__fmaf_rn(dout[t][v], c, back[v]), decay[t][v]);
      }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      shared.told[buffer][warp][0][v][a.lane] = from_0[v];
      shared.told[buffer][warp][1][v][a.lane] = exp2_fast(__fmul_rn(sum[v], A2[v][0]));
      shared.told[buffer][warp][2][v][a.lane] = back[v];
    }
    __syncthreads();

    float state[T + 1][V], g[V];  // the state before the warp's steps and after each; dL/dh after them
#pragma unroll
    for (int w = 0; w < SPLIT; ++w)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (w == warp) state[0][v] = h[v][0];
        h[v][0] = __fmaf_rn(shared.told[buffer][w][1][v][a.lane], h[v][0], shared.told[buffer][w][0][v][a.lane]);
      }
#pragma unroll
    for (int w = SPLIT - 1; w >= 0; --w)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (w == warp) g[v] = grad[v][0];
        grad[v][0] = __fmaf_rn(shared.told[buffer][w][1][v][a.lane], grad[v][0], shared.told[buffer][w][2][v][a.lane]);
      }
    buffer ^= 1;  // so one barrier is enough

#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int v = 0; v < V; ++v) {
#if STATIC_B
        const float b = b_static[v][0];
#else
        const float b = shared.rows[warp][t];
#endif
        const float drive = __fmul_rn(__fmul_rn(dt[t][v], now.u[t].get(v)), b);
        state[t + 1][v] = __fmaf_rn(decay[t][v], state[t][v], drive);
      }
#pragma unroll
    for (int t = T - 1; t >= 0; --t) {
      const int step = mine + t;
      const bool there = a.in_row && step < end;
      float du[V], ddelta[V], dB = 0.0f, dC = 0.0f;
#if GATE
      float dz[V];
#endif
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = now.u[t].get(v), d = dout[t][v];
#if STATIC_B
        const float b = b_static[v][0];
#else
        const float b = shared.rows[warp][t];
#endif
#if STATIC_C
        const float c = c_static[v][0];
#else
        const float c = shared.rows[warp][16 + t];
#endif
        // y = (C h + D u) silu(z)
#if GATE
        const float gate = now.z[t].get(v), sig = sigmoid(gate);
        dz[v] = __fmaf_rn(skip[v], x, c * state[t + 1][v]) * now.dy[t].get(v) * sig * __fmaf_rn(gate, 1.0f - sig, 1.0f);
#endif
        dC = __fmaf_rn(d, state[t + 1][v], dC);
        sums[1][v] = __fmaf_rn(d, x, sums[1][v]);
        g[v] = __fmaf_rn(d, c, g[v]);
        // h = exp(dt A) h + dt u B
        dB = __fmaf_rn(dt[t][v] * x, g[v], dB);
#if STATIC_B
        sums[3][v] = __fmaf_rn(dt[t][v] * x, g[v], sums[3][v]);
#endif
#if STATIC_C
        sums[4][v] = __fmaf_rn(d, state[t + 1][v], sums[4][v]);
#endif
        const float d_dtu = g[v] * b;
        g[v] = __fmul_rn(g[v], decay[t][v]);
        const float d_exponent = g[v] * state[t][v];
        sums[0][v] = __fmaf_rn(d_exponent, dt[t][v], sums[0][v]);
        ddelta[v] = __fmaf_rn(d_exponent * A2[v][0], LN2, d_dtu * x) * slope[t][v];
        if (there) sums[2][v] += ddelta[v];
        du[v] = __fmaf_rn(d_dtu, dt[t][v], d * skip[v]);
      }
#if !STATIC_B
      shared.part[warp][t][a.lane] = dB;
#endif
#if !STATIC_C
      shared.part[warp][T + t][a.lane] = dC;
#endif
      Packed<U, V> out_u;
      Packed<DELTA, V> out_delta;
      out_u.set(du);
      out_delta.set(ddelta);
      out_u.store_if(there, du_rows.at(step));
      out_delta.store_if(there, ddelta_rows.at(step));
#if GATE
      Packed<Z, V> out_z;
      out_z.set(dz);
      out_z.store_if(there, dz_rows.at(step));
#endif
    }
    __syncwarp();

#if !STATIC_B || !STATIC_C
    // dB and dC over the warp's channels: half a sum to each lane. Shares: (tile of the group, T, G).
    const int o = a.lane % 16, t = o % T;
    float half = 0.0f;
    if (o < 2 * T) {
#pragma unroll
      for (int k = 0; k < 16; ++k) half += shared.part[warp][o][a.lane / 16 * 16 + k];
    }
    half = add_across(half, 16);
    if (a.lane < 2 * T && mine + t < end) {
#if !STATIC_B
      if (o < T) *step_at(first_row(p.share_B + of_tile, p.share_stride, p, chunk), p.share_stride, mine + t) = half;
#endif
#if !STATIC_C
      if (o >= T) *step_at(first_row(p.share_C + of_tile, p.share_stride, p, chunk), p.share_stride, mine + t) = half;
#endif
    }
    __syncwarp();  // all are done with the parts
#endif
  }

#pragma unroll
  for (int k = 0; k < 5; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) shared.sums[warp][k][v][a.lane] = sums[k][v];
  __syncthreads();
  if (warp > 0) return;
  // A number that no chunk has leaves its shares, too: zeros.
  if (p.dh0 && chunk.begin == 0) store_by_channel(p.dh0 + chunk.s * p.n_channels, grad, a);
  float* shares[5] = {p.share_A, p.share_D, p.share_bias, STATIC_B ? p.share_B : nullptr, STATIC_C ? p.share_C : nullptr};
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    if (!shares[k]) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < SPLIT; ++w) sum += shared.sums[w][k][v][a.lane];
      if (v < a.there) shares[k][of_chunk + a.d + v] = sum;
    }
  }
}
