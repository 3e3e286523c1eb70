// The 2-D scan forwards. The directions are added up in memory, each when it is run, in order; if split, every direction
// has a block and a y of its own.

// One warp: the state that enters each segment, in place of that which it ends with from 0. `h` is a lane's channel's.
INLINE void chain(const Problem& p, Shared& shared, const Place& a, int k, int begin, float& h) {
  constexpr int AT_ONCE = 4;
  const int lane = threadIdx.x;
  const int e = a.block * CB + lane;
  const int every = p.every, slots = (a.length + every - 1) / every, slot = (begin + every - 1) / every;
  float* saved = p.saved + ((int64(a.image) * 4 + k) * slots + slot) * p.n_channels + e;
  int next = p.saved && e < p.n_channels ? slot * every : a.length;  // the next position before which h is saved
#pragma unroll
  for (int s = 0; s < SEGMENTS; s += AT_ONCE) {
    float end[AT_ONCE], passed[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) end[i] = shared.told[0][s + i][lane], passed[i] = shared.told[1][s + i][lane];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int position = begin + (s + i) * T;
      if (position == next && position < a.length) *saved = h, saved += p.n_channels, next += every;
      shared.told[0][s + i][lane] = h;
      h = __fmaf_rn(passed[i], h, end[i]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Problem p) {
  extern __shared__ float4 room[];
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const Place a(p);
  const int warp = threadIdx.x / 32;
  const int last = p.split ? a.direction : 3;
  const int64 first = a.first_token * p.n_channels + (a.there ? a.e : 0);
  const U* x_rows = p.x + first;
  float* y_rows = p.y + first;
  y_rows += p.split ? a.direction * p.n_images * a.length * p.n_channels : 0;

  for (int k = a.direction; k <= last; ++k) {
    const Order order(p, k, a.length);
    __syncthreads();  // the last direction's y is there, and its rows and weights are done with
    stage_weight(p, shared, a, k);
    stage_rows(p, shared.rows[0], a, k, order, 0, threadIdx.x, THREADS);
    float bias[V], A2[V], skip[V];
    load_parameter(bias, p.bias, p, a, k);
    load_A(A2, p, a, k);
    load_skip(skip, p, a, k);
#pragma unroll
    for (int v = 0; v < V; ++v) bias[v] *= SCALE, A2[v] *= LOG2E;
    __syncthreads();

    float carried = 0.0f;  // of the first warp: the state of channel `lane` that enters the steps at hand
    int buffer = 0;
    for (int begin = 0; begin < a.length; begin += STEPS) {
      const int mine = begin + a.segment * T;
      int token[T];
      Packed<U, V> x[T];
#pragma unroll
      for (int t = 0; t < T; ++t) {
        // Beyond the end the last token is read; B is 0 there, and no state is used.
        token[t] = order.token(mine + t < a.length ? mine + t : a.length - 1);
        load_row(x[t], row_at(x_rows, token[t], p.n_channels), a.there);
      }
      float decay[T][V], drive[T][V], end[V], passed[V];
      widen(drive, shared, buffer, a, bias);
#pragma unroll
      for (int v = 0; v < V; ++v) end[v] = 0.0f, passed[v] = 1.0f;
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float b = shared.rows[buffer][a.segment * T + t][RP];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float dt = step_size(drive[t][v]);
          decay[t][v] = exp2_fast(__fmul_rn(dt, A2[v]));
          drive[t][v] = __fmul_rn(__fmul_rn(dt, x[t].get(v)), b);
          end[v] = __fmaf_rn(decay[t][v], end[v], drive[t][v]);
          passed[v] = __fmul_rn(passed[v], decay[t][v]);
        }
      }
      store_floats(&shared.told[0][a.segment][a.column], end);
      store_floats(&shared.told[1][a.segment][a.column], passed);
      __syncthreads();
      if (warp == 0) chain(p, shared, a, k, begin, carried);
      if (WARPS == 1) stage_rows(p, shared.rows[buffer ^ 1], a, k, order, begin + STEPS, threadIdx.x, THREADS);
      else if (warp > 0) stage_rows(p, shared.rows[buffer ^ 1], a, k, order, begin + STEPS, threadIdx.x - 32, THREADS - 32);
      __syncthreads();
      Packed<float, V> y[T];  // of the directions before
#pragma unroll
      for (int t = 0; t < T; ++t) {
        if (k == 0) {
          float of_x[V];
#pragma unroll
          for (int v = 0; v < V; ++v) of_x[v] = __fmul_rn(skip[v], x[t].get(v));
          y[t].set(of_x);
        } else if (k > a.direction) {
          load_row(y[t], row_at(y_rows, token[t], p.n_channels), a.there);
        } else {
          y[t].clear();
        }
      }
      float h[V];
      load_floats(&shared.told[0][a.segment][a.column], h);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float c = shared.rows[buffer][a.segment * T + t][RP + 1];
        float sum[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          h[v] = __fmaf_rn(decay[t][v], h[v], drive[t][v]);
          // Rounded before it is added, so that split or not gives the same.
          sum[v] = __fmul_rn(c, h[v]) + y[t].get(v);
        }
        store_row(sum, row_at(y_rows, token[t], p.n_channels), mine + t < a.length, a.there);
      }
      buffer ^= 1;
    }
  }
}
