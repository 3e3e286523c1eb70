// What a part of a chunk by itself does to the gradient of the state: dL/dh before it if it is 0 after it, own (part, N,
// D), and the part's sum of dt, sums (part, D). Not of a sequence's first chunk, before which nothing comes.
//
// Or (SPANS) the gradient that enters each of its spans, from the one that enters the chunk: one step after another by
// the arithmetic of scan_backward, so that it does not matter to a bit who comes by it.

constexpr int RUN = SPANS ? CHUNK : PART;
constexpr int BC = WARPS * WC;  // channels of a block, which shares out rows: each is a long piece of memory

// For two tiles: one is left here while another warp still reads the other.
struct Shared {
#if !STATIC_C
  alignas(16) float C[2][T][NP];
#endif
  alignas(16) float dt[2][T][BC], dout[2][T][BC];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

struct Tile {
  Packed<DELTA, V> delta[ITS];
  Packed<DY, V> dy[ITS];
#if GATE
  Packed<Z, V> z[ITS];
#endif
#if !STATIC_C
  MatrixRows<MC, T, THREADS> C;
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) chunk_gradients(const Problem p) {
  extern __shared__ float4 room[];
  Place a(p);
  const int64 first = int64(a.tile) * BC;
  a.row = threadIdx.x / (BC / V), a.column = threadIdx.x % (BC / V) * V;
  a.e = a.group * p.per_group + first + a.column;
  a.in_row = first + a.column < p.per_group;
  const Piece chunk(p, a.number, pieces_of(p.length, RUN), RUN);
  const int length = chunk.length, begin = chunk.begin;
  if (begin >= (SPANS && length == 0 ? 1 : length)) return;
  if (!SPANS && begin < CHUNK) return;
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const int end = begin + RUN < length ? begin + RUN : length;

  Pairs A2, grad;
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(grad);
#if SPANS
  const int last = end > 0 ? end - 1 : 0;
  if (p.own) load_by_state(grad, p.own + chunk.number_of(p, last, PART) * N * p.n_channels, p, a);
  store_by_state(p.entering + chunk.number_of(p, last, SPAN) * N * p.n_channels, grad, p, a);
#endif
#if STATIC_C
  Pairs c_static;
  load_by_channel(c_static, p.C, a);
#else
  MC* C = first_row(p.C, p.C_stride, p, chunk) + a.group * p.C_group;
#endif
  float bias[V], total[CL];
  load_of_row(bias, p.bias, a);
#pragma unroll
  for (int j = 0; j < CL; ++j) total[j] = 0.0f;
  const Rows<DELTA> delta_rows(p.delta, p.delta_stride, p, chunk, a);
  const Rows<DY> dy_rows(p.dy, p.dy_stride, p, chunk, a);
#if GATE
  const Rows<Z> z_rows(p.z, p.z_stride, p, chunk, a);
#endif

  Tile next;
  auto load = [&](int step, int end) {
    delta_rows.load(next.delta, a, step, end);
    dy_rows.load(next.dy, a, step, end);
#if GATE
    z_rows.load(next.z, a, step, end);
#endif
#if !STATIC_C
    next.C.load(C, p.C_stride, threadIdx.x, step, end);
#endif
  };
  const int stop = SPANS ? begin + SPAN : begin;
  int step = begin + (end - 1 - begin) / T * T;
  load(step, end);
  for (int turn = 0; step >= stop; step -= T, turn ^= 1) {
#if !STATIC_C
    next.C.put(&shared.C[turn][0][0], threadIdx.x);
#endif
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      const int t = i * ROWS + a.row;
      float dt[V], dout[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float size = step_size(next.delta[i].get(v) + bias[v]);
        dt[v] = step + t < end ? size : 0.0f;
        dout[v] = next.dy[i].get(v);
#if GATE
        const float gate = next.z[i].get(v);
        dout[v] *= gate * sigmoid(gate);
#endif
      }
      store_floats(&shared.dt[turn][t][a.column], dt);
      store_floats(&shared.dout[turn][t][a.column], dout);
    }
    __syncthreads();
    load(step - T, step - T < begin ? 0 : end);
#pragma unroll
    for (int t = T - 1; t >= 0; --t) {
      float dt[CL], dout[CL];
      load_floats(&shared.dt[turn][t][a.warp * WC + a.lane / S * CL], dt);
      load_floats(&shared.dout[turn][t][a.warp * WC + a.lane / S * CL], dout);
#if !STATIC_C
      float c[NL];
      load_floats(&shared.C[turn][t][a.n], c);
#endif
#pragma unroll
      for (int j = 0; j < CL; ++j) total[j] += dt[j];
      EACH_PAIR {
#if STATIC_C
        grad[j][i] = __fmaf_rn(dout[j], c_static[j][i], grad[j][i]);
#else
        grad[j][i] = __fmaf_rn(dout[j], c[i], grad[j][i]);
#endif
        grad[j][i] = __fmul_rn(grad[j][i], exp2_fast(__fmul_rn(dt[j], A2[j][i])));
      }
    }
#if SPANS
    if (step % SPAN == 0)
      store_by_state(p.entering + chunk.number_of(p, step - 1, SPAN) * N * p.n_channels, grad, p, a);
#endif
  }
#if !SPANS
  store_by_state(p.own + a.number * N * p.n_channels, grad, p, a);
  if (a.lane % S == 0)
    for (int j = 0; j < a.there; ++j) p.sums[a.number * p.n_channels + a.d + j] = total[j];
#endif
}
