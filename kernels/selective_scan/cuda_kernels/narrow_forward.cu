// The scan forwards for one state. There is so little to do for a (step, channel) that memory sets the pace, and channels
// alone make too few warps to keep it busy: so the warps of a block share out time. SPLIT warps take T steps each, one
// lane V channels; each runs its steps from 0, tells the others where it ended and how much dt went by, and runs them
// again from the state that enters them. Decays are computed once.
//
// Macros besides those of common.cu: OWN and ENDS as in forward.cu. WARPS is 1: all warps of a block have its channels.

constexpr int SPLIT = EVERY / T;  // so that all of them together take what lies between two saved states
static_assert(N == 1 && S == 1 && CL == V && WARPS == 1 && 2 * T <= 32, "for one state");
constexpr int KINDS = OWN || ENDS ? 3 : 2;

struct Shared {
  float rows[SPLIT][32];                     // a warp's T steps of B, and from the 16th on of C
  float told[2][SPLIT][KINDS][CL][32];       // the end from 0, the decay, and the sum of dt
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

struct Tile {
  Packed<U, V> u[T];
  Packed<DELTA, V> delta[T];
#if GATE && !ENDS
  Packed<Z, V> z[T];
#endif
  float row;
};

extern "C" __global__ void __launch_bounds__(32 * SPLIT, MIN_BLOCKS) scan_forward(const Problem p) {
  extern __shared__ float4 room[];
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const Place a(p);
  const int warp = threadIdx.x / 32;
  int stop;
  const Piece piece = find_run(p, a.number, stop);
  if (piece.beyond()) return;
  const int length = piece.length;
  if (ENDS && piece.begin + CHUNK >= length) return;  // nothing comes after the last

  Pairs A2, h;
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(h);
  if (!ENDS && p.own) load_by_state(h, p.own + a.number * p.n_channels, p, a);
  if (!ENDS && !p.own && p.first) load_by_channel(h, p.first + piece.s * p.n_channels, a);
#if STATIC_B
  Pairs b_static;
  load_by_channel(b_static, p.B, a);
#endif
#if STATIC_C && !ENDS
  Pairs c_static;
  load_by_channel(c_static, p.C, a);
#endif
  float bias[V], skip[V];
  load_of_row(bias, p.bias, a);
  load_of_row(skip, p.D, a);
  const Rows<U> u_rows(p.u, p.u_stride, p, piece, a);
  const Rows<DELTA> delta_rows(p.delta, p.delta_stride, p, piece, a);
#if !ENDS
  const Rows<U> y_rows(p.y, p.U_stride, p, piece, a);
#endif
#if GATE && !ENDS
  const Rows<Z> z_rows(p.z, p.z_stride, p, piece, a);
#endif
#if !STATIC_B
  MB* B = first_row(p.B, p.B_stride, p, piece) + a.group * p.B_group;
#endif
#if !STATIC_C && !ENDS
  MC* C = first_row(p.C, p.C_stride, p, piece) + a.group * p.C_group;
#endif

  Tile next;
  auto load = [&](int step) {
    u_rows.load(next.u, a, step, stop);
    delta_rows.load(next.delta, a, step, stop);
#if GATE && !ENDS
    z_rows.load(next.z, a, step, stop);
#endif
    next.row = 0.0f;
    const int t = step + a.lane % 16;
#if !STATIC_B
    if (a.lane < T && t < stop) next.row = one(step_at(B, p.B_stride, t));
#endif
#if !STATIC_C && !ENDS
    if (a.lane >= 16 && a.lane < 16 + T && t < stop) next.row = one(step_at(C, p.C_stride, t));
#endif
  };
  load(piece.begin + warp * T);

  Pairs own, before;  // the state that starts each chunk from 0; the state before the chunk
  float total[CL];    // of dt over the chunk
  int buffer = 0;
  for (int chunk = piece.begin; chunk < stop; chunk += CHUNK) {
    const int end = chunk + CHUNK < stop ? chunk + CHUNK : stop;
    if (OWN) EACH_PAIR before[j][i] = h[j][i], own[j][i] = 0.0f;
#pragma unroll
    for (int j = 0; j < CL; ++j) total[j] = 0.0f;

    for (int step = chunk; step < end; step += EVERY) {
      const int mine = step + warp * T;
      const Tile now = next;
      shared.rows[warp][a.lane] = now.row;
      __syncwarp();
      load(mine + EVERY);

      float decay[T][V], drive[T][V], from_0[V], sum[V];
#pragma unroll
      for (int v = 0; v < V; ++v) from_0[v] = sum[v] = 0.0f;
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          // 0 beyond the last step, which so leaves the state as it is
          const float size = step_size(now.delta[t].get(v) + bias[v]), dt = mine + t < end ? size : 0.0f;
#if STATIC_B
          const float b = b_static[v][0];
#else
          const float b = shared.rows[warp][t];
#endif
          decay[t][v] = exp2_fast(__fmul_rn(dt, A2[v][0]));
          drive[t][v] = __fmul_rn(__fmul_rn(dt, now.u[t].get(v)), b);
          from_0[v] = __fmaf_rn(decay[t][v], from_0[v], drive[t][v]);
          sum[v] += dt;
        }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        shared.told[buffer][warp][0][v][a.lane] = from_0[v];
        shared.told[buffer][warp][1][v][a.lane] = exp2_fast(__fmul_rn(sum[v], A2[v][0]));
        if (KINDS == 3) shared.told[buffer][warp][KINDS - 1][v][a.lane] = sum[v];
      }
      __syncthreads();

      if (!ENDS && p.saved && warp == 0) {
        const int64 slot = piece.start / EVERY + piece.s + step / EVERY;
        store_by_state(p.saved + slot * p.n_channels, h, p, a);
      }
      float x[V];  // the state that enters the warp's steps
#pragma unroll
      for (int w = 0; w < SPLIT; ++w)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float end_0 = shared.told[buffer][w][0][v][a.lane], passed = shared.told[buffer][w][1][v][a.lane];
          if (w == warp) x[v] = h[v][0];
          h[v][0] = __fmaf_rn(passed, h[v][0], end_0);
          if (OWN) own[v][0] = __fmaf_rn(passed, own[v][0], end_0);
          if (KINDS == 3) total[v] += shared.told[buffer][w][KINDS - 1][v][a.lane];
        }
      buffer ^= 1;  // so one barrier is enough

#if !ENDS
#pragma unroll
      for (int t = 0; t < T; ++t) {
        float y[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
#if STATIC_C
          const float c = c_static[v][0];
#else
          const float c = shared.rows[warp][16 + t];
#endif
          x[v] = __fmaf_rn(decay[t][v], x[v], drive[t][v]);
          y[v] = __fmaf_rn(skip[v], now.u[t].get(v), __fmul_rn(c, x[v]));
#if GATE
          const float gate = now.z[t].get(v);
          y[v] *= gate * sigmoid(gate);
#endif
        }
        Packed<U, V> out;
        out.set(y);
        out.store_if(a.in_row && mine + t < end, y_rows.at(mine + t));
      }
      __syncwarp();  // all are done with the rows of B and C
#endif
    }
    // What enters the next chunk, by the arithmetic of chunks that are run all at once (carry.cu).
    if (OWN && end < length) EACH_PAIR h[j][i] = __fmaf_rn(exp2_fast(__fmul_rn(total[j], A2[j][i])), before[j][i], own[j][i]);
  }

  if (warp > 0) return;
#if ENDS
  store_by_state(p.own + a.number * p.n_channels, h, p, a);
  for (int j = 0; j < a.there; ++j) p.sums[a.number * p.n_channels + a.d + j] = total[j];
#else
  if (stop == length) store_by_channel(p.final_state + piece.s * p.n_channels, h, a);
#endif
}
