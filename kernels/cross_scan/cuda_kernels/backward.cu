// The 2-D scan backwards, from the last position of each direction to its first. A block's STEPS positions are those
// between two saved states; their segments are run in both directions of time from 0 and then from what enters them.

// One warp: the states that enter the segments, from the first on, or the gradients, from the last on.
INLINE void chain(Shared& shared, int lane, bool forwards, float& x) {
  constexpr int AT_ONCE = 4;
  float(&ends)[SEGMENTS][CB] = shared.told[forwards ? 0 : 2];
#pragma unroll
  for (int s = 0; s < SEGMENTS; s += AT_ONCE) {
    float end[AT_ONCE], passed[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int segment = forwards ? s + i : SEGMENTS - 1 - s - i;
      end[i] = ends[segment][lane], passed[i] = shared.told[1][segment][lane];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      ends[forwards ? s + i : SEGMENTS - 1 - s - i][lane] = x;
      x = __fmaf_rn(passed[i], x, end[i]);
    }
  }
}

// Of the sums over a segment's lanes of LANES numbers, the one whose number is the lane's own.
INLINE float share_out_sums(const float (&x)[LANES]) {
  float left[LANES];
#pragma unroll
  for (int i = 0; i < LANES; ++i) left[i] = x[i];
#pragma unroll
  for (int half = LANES / 2; half; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = across(upper ? left[i] : left[i + half], half);
      left[i] = (upper ? left[i + half] : left[i]) + other;
    }
  }
  return left[0];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Problem p) {
  static_assert(2 * T == LANES, "a lane has one of the sums for dB and dC");
  extern __shared__ float4 room[];
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const Place a(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = a.block * CB + lane;
  const int chunks = (a.length + STEPS - 1) / STEPS;
  const int e = a.there ? a.e : 0;
  const int64 of_image = a.first_token * p.n_channels + e, n_tokens = p.n_images * a.length;
  U* ddelta_rows = p.ddelta + a.first_token * 4 * p.n_channels + e;
  constexpr int CHAINS = WARPS > 1 ? 2 : 1;  // warps that run chains while the others stage

  for (int k = 0; k < 4; ++k) {
    const Order order(p, k, a.length);
    __syncthreads();  // the last direction's sums are there, and its rows and weights are done with
    stage_weight(p, shared, a, k);
    stage_rows(p, shared.rows[0], a, k, order, (chunks - 1) * STEPS, threadIdx.x, THREADS);
    float bias[V], A[V], skip[V], sum_A[V], sum_bias[V], sum_D[V];
    load_parameter(bias, p.bias, p, a, k);
    load_A(A, p, a, k);
    load_skip(skip, p, a, k);
#pragma unroll
    for (int v = 0; v < V; ++v) bias[v] *= SCALE, sum_A[v] = sum_bias[v] = sum_D[v] = 0.0f;
    __syncthreads();

    float gradient = 0.0f;  // dL/dh of channel `lane` after the steps at hand, in the warp that carries it
    int buffer = 0;
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      const int begin = chunk * STEPS, mine = begin + a.segment * T;
      float state = 0.0f;  // before the steps at hand, likewise
      if (warp == 0 && channel < p.n_channels)
        state = p.saved[((int64(a.image) * 4 + k) * chunks + chunk) * p.n_channels + channel];
      int token[T];
      Packed<U, V> x[T];
      Packed<float, V> dy[T], sum[T];  // sum: the directions' before
#pragma unroll
      for (int t = 0; t < T; ++t) {
        // Beyond the end the last token is read; B and C are 0 there, and so are all gradients.
        token[t] = order.token(mine + t < a.length ? mine + t : a.length - 1);
        load_row(x[t], row_at(p.x + of_image, token[t], p.n_channels), a.there);
        load_row(dy[t], row_at(p.dy + of_image, token[t], p.n_channels), a.there);
      }
      float wide[T][V], dt[T][V], decay[T][V], end[V], back[V], passed[V];
      widen(wide, shared, buffer, a, bias);
#pragma unroll
      for (int v = 0; v < V; ++v) end[v] = back[v] = 0.0f, passed[v] = 1.0f;
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float b = shared.rows[buffer][a.segment * T + t][RP];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dt[t][v] = step_size(wide[t][v]);
          decay[t][v] = exp2_fast(__fmul_rn(dt[t][v], A[v] * LOG2E));
          end[v] = __fmaf_rn(decay[t][v], end[v], __fmul_rn(__fmul_rn(dt[t][v], x[t].get(v)), b));
          passed[v] = __fmul_rn(passed[v], decay[t][v]);
        }
      }
#pragma unroll
      for (int t = T - 1; t >= 0; --t) {
        const float c = shared.rows[buffer][a.segment * T + t][RP + 1];
#pragma unroll
        for (int v = 0; v < V; ++v) back[v] = __fmul_rn(__fmaf_rn(dy[t].get(v), c, back[v]), decay[t][v]);
      }
      store_floats(&shared.told[0][a.segment][a.column], end);
      store_floats(&shared.told[1][a.segment][a.column], passed);
      store_floats(&shared.told[2][a.segment][a.column], back);
      __syncthreads();
      if (warp == 0) chain(shared, lane, true, state);
      if (warp == CHAINS - 1) chain(shared, lane, false, gradient);
      if (WARPS <= CHAINS) stage_rows(p, shared.rows[buffer ^ 1], a, k, order, begin - STEPS, threadIdx.x, THREADS);
      else if (warp >= CHAINS)
        stage_rows(p, shared.rows[buffer ^ 1], a, k, order, begin - STEPS, threadIdx.x - 32 * CHAINS, THREADS - 32 * CHAINS);
      __syncthreads();

#pragma unroll
      for (int t = 0; t < T; ++t) {
        if (k == 0) {
          float of_dy[V];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            of_dy[v] = __fmul_rn(dy[t].get(v), skip[v]);
            sum_D[v] = __fmaf_rn(mine + t < a.length ? dy[t].get(v) : 0.0f, x[t].get(v), sum_D[v]);
          }
          sum[t].set(of_dy);
        } else {
          load_row(sum[t], row_at(p.sum + of_image, token[t], p.n_channels), a.there);
        }
      }
      float before[T][V], h[V], g[V], dB_dC[2 * T];
      load_floats(&shared.told[0][a.segment][a.column], h);
      load_floats(&shared.told[2][a.segment][a.column], g);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float b = shared.rows[buffer][a.segment * T + t][RP];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          before[t][v] = h[v];
          h[v] = __fmaf_rn(decay[t][v], h[v], __fmul_rn(__fmul_rn(dt[t][v], x[t].get(v)), b));
        }
      }
#pragma unroll
      for (int t = T - 1; t >= 0; --t) {
        const float b = shared.rows[buffer][a.segment * T + t][RP];
        const float c = shared.rows[buffer][a.segment * T + t][RP + 1];
        float dx[V], ddelta[V], dB = 0.0f, dC = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float u = x[t].get(v), d = dy[t].get(v);
          // y = C h + D x
          dC = __fmaf_rn(d, h[v], dC);
          g[v] = __fmaf_rn(d, c, g[v]);
          // h = exp(dt A) h + dt x B
          dB = __fmaf_rn(dt[t][v] * u, g[v], dB);
          const float d_dtx = g[v] * b;
          g[v] = __fmul_rn(g[v], decay[t][v]);
          h[v] = before[t][v];
          const float d_exponent = g[v] * h[v];
          sum_A[v] = __fmaf_rn(d_exponent, dt[t][v], sum_A[v]);
          ddelta[v] = __fmaf_rn(d_exponent, A[v], d_dtx * u) * slope_of(wide[t][v], dt[t][v]);
          sum_bias[v] += ddelta[v];
          dx[v] = __fmaf_rn(d_dtx, dt[t][v], sum[t].get(v));
        }
        dB_dC[t] = a.there ? dB : 0.0f, dB_dC[T + t] = a.there ? dC : 0.0f;
        const bool inside = mine + t < a.length;
        store_row(ddelta, row_at(ddelta_rows + k * p.n_channels, token[t], 4 * p.n_channels), inside, a.there);
        if (k < 3) store_row(dx, row_at(p.sum + of_image, token[t], p.n_channels), inside, a.there);
        else store_row(dx, row_at(p.dx + of_image, token[t], p.n_channels), inside, a.there);
      }
      const float share = share_out_sums(dB_dC);
      const int which = threadIdx.x % LANES / T, position = mine + threadIdx.x % T;
      if (position < a.length)
        p.share_BC[((a.block * 2 + which) * 4 + k) * n_tokens + a.first_token + order.token(position)] = share;
      buffer ^= 1;
    }

    __syncthreads();  // all have what entered their segments
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (LOG) sum_A[v] *= A[v];
    store_floats(&shared.told[0][a.segment][a.column], sum_A);
    store_floats(&shared.told[1][a.segment][a.column], sum_bias);
    store_floats(&shared.told[2][a.segment][a.column], sum_D);
    __syncthreads();
    if (warp == 0 && channel < p.n_channels) {
      float sums[3] = {0.0f, 0.0f, 0.0f};
      for (int s = 0; s < SEGMENTS; ++s)
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i] += shared.told[i][s][lane];
      float* share = p.shares + (int64(a.image) * 12 + k) * p.n_channels + channel;
      *share = sums[0], share[4 * p.n_channels] = sums[1];
      if (k == 0)
        for (int i = 0; i < 4; ++i) share[(8 + i) * p.n_channels] = sums[2];
    }
  }
}
