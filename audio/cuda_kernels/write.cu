// The sample-by-sample loop of an audio model on a GPU: network, choice of a code, and on to the next sample, for each
// recording in a block of its own. Compiled at run time by NVRTC, with no header of CUDA's.
//
// Blocks never wait for each other. What a recording has of its own at a time (activations, skips, what pools hold) is in
// shared memory; its states are in global memory, and so are the weights, which all blocks read at about the same time
// and find in the L2 cache. A sample is a chain of some hundred short steps with a barrier behind each: what counts is how
// soon a step's numbers are there. So a product asks for its first weights before the barrier that its inputs wait for,
// and matrices and states lie in the order in which threads read them (../fused_cuda.py). A recording that is guided is
// two streams, as labelled and without a label, which share what is read of the weights.
//
// The tables are those of the CPU's loop (../fused.py, ../fused_kernel.py). An instruction's sizes are known when this
// is compiled: each kind of instruction with its sizes is a case of its own (CASES). Every sum has its order fixed by the
// sizes alone: a recording's result depends, to the bit, on nothing but itself and the weights.
//
// Macros, set when compiled: T, the type of matrices; THREADS, MIN_BLOCKS, GUIDED; VALUES and ROW, numbers of a stream without
// and with its states; N_OPS, SPANS, STRIDES, RATES; NORMED, INNER, LOW and Y, the most of each that a block has; WIDTH,
// EMBEDDING_AT, LOGITS_AT, CASES.
//
// Letters: M width, E inner width, N states, R rank of dt, W convolution width, F inner width of an MLP.

constexpr int CODES = 256, OPERANDS = 14, NONE = -1;
constexpr int V = 16 / sizeof(T);  // elements of a matrix in one load
constexpr int AT_ONCE = 8;         // such loads that a thread has in flight for a product, as far as that goes
constexpr int EARLY = 16;          // loads of a whole block up to which all are in flight from its begin
constexpr int S = 1 + GUIDED;
static_assert(THREADS >= CODES, "a thread for each code");

// As fused_cuda.py fills it in: 8 bytes each. B recordings.
struct Problem {
  float *v, *beside;                // (B, ROW): values, then states; and those without a label
  const float* w; const T* m; const int* ops;
  const int64 *positions, *codes;   // (B,)
  const double* uniforms;           // (B, stride)
  int64* out;                       // (B, stride): what was drawn, -1 from where there was nothing to draw from
  float* seen;                      // (B, stride, CODES): the logits, unless null
  int64 n, stride, top_k;           // n: samples to write
  double guidance, temperature, top_p, min_p;
};

INLINE constexpr int filled(int n, int to = 8) { return (n + to - 1) / to * to; }
INLINE constexpr int by4(int n) { return filled(n, 4); }  // the tensors in `w`, each filled up

struct Shared {
  float values[S][filled(VALUES)];
  float normed[S][filled(NORMED)], inner[S][filled(INNER)], low[S][filled(LOW)], y[S][filled(Y)];
  float p[CODES];
  double sums[CODES / 16];
  int ops[N_OPS][OPERANDS];
  int code;
};
enum { ADD, COPY, LINEAR, MAMBA, PUT, TAKE };  // as in fused_kernel.py; CASES number on
extern "C" __constant__ int shared_bytes = sizeof(Shared);
__constant__ int spans[RATES][2] = SPANS;
__constant__ int strides[RATES] = STRIDES;

#define EACH_STREAM _Pragma("unroll") for (int j = 0; j < S; ++j)

typedef float* Rows[S];  // where the streams' values and states are in global memory

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(x * -LOG2E)); }

INLINE float sum_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = add_across(x, mask);
  return x;
}

// out = W x: LANES threads share a row, and a thread has PASSES rows, of which it reads STEPS pieces of V.
template <int OUT, int IN, int LANES> struct Product {
  static constexpr int STEPS = (IN + V - 1) / V / LANES, SLOTS = THREADS / LANES, PASSES = (OUT + SLOTS - 1) / SLOTS;
  static constexpr int SIZE = PASSES * STEPS * THREADS * V;
  static INLINE constexpr int ahead() {
    int n = AT_ONCE / PASSES < 1 ? 1 : AT_ONCE / PASSES > STEPS ? STEPS : AT_ONCE / PASSES;
    while (STEPS % n) --n;
    return n;
  }
  static constexpr int AHEAD = ahead(), HELD = AHEAD * PASSES;
  static_assert((IN + V - 1) / V % LANES == 0, "lanes share a row evenly");

  const T* from;
  Packed<T, V> w[AHEAD][PASSES];

  // Ask for the first weights.
  INLINE void begin(const T* matrix) {
    from = matrix + threadIdx.x * V;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) fetch(a, pass, a);
  }
  INLINE void fetch(int a, int pass, int step) {
    const bool there = (pass + 1) * SLOTS <= OUT || int(threadIdx.x) / LANES + pass * SLOTS < OUT;
    if (there) w[a][pass].load(from + (step * PASSES + pass) * THREADS * V);
    else w[a][pass].clear();
  }
  // write(stream, o, (W x)[o]) by one thread for each o; the streams' x are STRIDE numbers apart.
  template <int STRIDE, typename Write> INLINE void run(const float* x, Write write) {
    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
    float sum[S][PASSES];
    EACH_STREAM
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) sum[j][pass] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < STEPS; first += AHEAD) {
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        const int k = ((first + a) * LANES + lane) * V;
        float piece[S][V];
        EACH_STREAM {
          load_floats(x + j * STRIDE + k, piece[j]);
          if constexpr (IN % V) {
#pragma unroll
            for (int v = 0; v < V; ++v) piece[j][v] = k + v < IN ? piece[j][v] : 0.0f;
          }
        }
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
          EACH_STREAM
#pragma unroll
            for (int v = 0; v < V; ++v) sum[j][pass] = __fmaf_rn(w[a][pass].get(v), piece[j][v], sum[j][pass]);
          if (first + a + AHEAD < STEPS) fetch(a, pass, first + a + AHEAD);
        }
      }
    }
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2)
      EACH_STREAM
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) sum[j][pass] = add_across(sum[j][pass], mask);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int o = slot + pass * SLOTS;
      if (lane == 0 && o < OUT) EACH_STREAM write(j, o, sum[j][pass]);
    }
  }
};

// RMSNorm or LayerNorm of the streams' values at `at`, to s.normed; w: weight, bias, epsilon. Every warp sums for itself.
template <int M> constexpr int NORM_WEIGHTS = 2 * by4(M) + 4;
template <int M, bool CENTRED> INLINE void norm(Shared& s, int at, const float* w) {
  constexpr int EACH = (M + 31) / 32, MINE = (M + THREADS - 1) / THREADS;
  const int lane = threadIdx.x % 32;
  float weight[MINE], bias[MINE];
  const float eps = w[2 * by4(M)];
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int k = threadIdx.x + i * THREADS;
    weight[i] = k < M ? w[k] : 0.0f, bias[i] = k < M ? w[by4(M) + k] : 0.0f;
  }
  EACH_STREAM {
    const float* x = s.values[j] + at;
    float all[EACH], mean = 0.0f, square = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) all[i] = lane + 32 * i < M ? x[lane + 32 * i] : 0.0f, mean += all[i];
    mean = CENTRED ? sum_of_warp(mean) / M : 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float centred = lane + 32 * i < M ? all[i] - mean : 0.0f;
      square = __fmaf_rn(centred, centred, square);
    }
    const float scale = inverse_root(sum_of_warp(square) / M + eps);
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const int k = threadIdx.x + i * THREADS;
      if (k < M) s.normed[j][k] = __fmaf_rn((x[k] - mean) * scale, weight[i], bias[i]);
    }
  }
  __syncthreads();
}

// A step of the states of SLOTS channels at a time, four threads for each, of which each has NL states side by side.
template <int E, int N, int R> struct States {
  static constexpr int SLOTS = THREADS / 4, PASSES = (E + SLOTS - 1) / SLOTS, RL = (R + 3) / 4;
  static constexpr int NL = N <= 4 ? 1 : N <= 8 ? 2 : filled(N, 16) / 4;
  float h[S][NL], A[NL], widen[RL], bias, skip;
  int e, quarter;

  INLINE void load(int pass, const Rows& rows, int at, const float* w, const T* dt_proj) {
    e = pass * SLOTS + threadIdx.x / 4, quarter = threadIdx.x % 4;
    const bool there = e < E;
    const int mine = there ? (e * 4 + quarter) * NL : 0;
    bias = there ? w[e] : 0.0f, skip = there ? w[by4(E) + e] : 0.0f;
    EACH_STREAM load_floats(rows[j] + at + mine, h[j]);
    load_floats(w + 2 * by4(E) + mine, A);
#pragma unroll
    for (int i = 0; i < RL; ++i) {
      const int r = quarter + 4 * i;
      widen[i] = there && r < R ? one(dt_proj + r * E + e) : 0.0f;
    }
  }
  INLINE void run(Shared& s, const Rows& rows, int at) {
    const bool there = e < E;
    EACH_STREAM {
      const float* low = s.low[j];
      float dt = 0.0f, sum = 0.0f;
#pragma unroll
      for (int i = 0; i < RL; ++i) {
        const int r = quarter + 4 * i;
        if (r < R) dt = __fmaf_rn(low[r], widen[i], dt);
      }
      dt = add_across(add_across(dt, 1), 2) + bias;
      dt = softplus_of(dt, exp_negative(-fabsf(dt)));
      const float u = there ? s.inner[j][e] : 0.0f, z = there ? s.inner[j][E + e] : 0.0f, drive = dt * u;
#pragma unroll
      for (int i = 0; i < NL; ++i) {
        const int n = quarter * NL + i;
        if (4 * NL == N || n < N) {
          h[j][i] = __fmaf_rn(exp2_fast(dt * A[i]), h[j][i], drive * low[R + n]);
          sum = __fmaf_rn(h[j][i], low[R + N + n], sum);
        }
      }
      if (there) store_floats(rows[j] + at + (e * 4 + quarter) * NL, h[j]);
      sum = add_across(add_across(sum, 1), 2);
      if (there && quarter == 0) s.y[j][e] = __fmaf_rn(skip, u, sum) * (z * sigmoid(z));
    }
  }
};

// x += out_proj(..(norm(x))): a whole block; then, if so told, x is kept at another place, or what stands there is added
// to it. The order of its weights is fused.py's.
template <int M, int E, int N, int R, int W, bool CENTRED, int IN_LANES, int X_LANES, int OUT_LANES>
INLINE void mamba(const Problem& p, Shared& s, const Rows& rows, const int* op) {
  constexpr int N_LOW = (R + 2 * N + 15) / 16 * 16, MINE = (E + THREADS - 1) / THREADS;
  typedef Product<2 * E, M, IN_LANES> In;
  typedef Product<N_LOW, E, X_LANES> X;
  typedef Product<M, E, OUT_LANES> Out;
  typedef States<E, N, R> Scan;
  constexpr bool early = In::HELD + X::HELD + Out::HELD <= EARLY;
  const float* w = p.w + op[7];
  const T* m = p.m + op[11];
  const int x_at = op[1], conv_at = op[8], ssm_at = op[9], keep_at = op[12], add_at = op[13];
  const T *x_proj = m + In::SIZE, *dt_proj = x_proj + X::SIZE, *out_proj = dt_proj + filled(R * E);
  In in;
  X low;
  Out out;
  Scan now;
  in.begin(m);
  if (early) low.begin(x_proj), out.begin(out_proj);
  norm<M, CENTRED>(s, x_at, w);
  w += NORM_WEIGHTS<M>;
  if (early) now.load(0, rows, ssm_at, w + by4(E) + by4(W * E), dt_proj);
  float taps[MINE][W], window[S][MINE][W], shift[MINE];
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int e = threadIdx.x + i * THREADS;
    shift[i] = e < E ? w[e] : 0.0f;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      taps[i][k] = e < E ? w[by4(E) + k * E + e] : 0.0f;
      EACH_STREAM window[j][i][k] = e < E && k < W - 1 ? rows[j][conv_at + k * E + e] : 0.0f;
    }
  }
  in.template run<filled(NORMED)>(s.normed[0], [&](int j, int o, float value) { s.inner[j][o] = value; });
  if (!early) low.begin(x_proj);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int e = threadIdx.x + i * THREADS;
    if (e < E) EACH_STREAM {
      window[j][i][W - 1] = s.inner[j][e];
      float mixed = shift[i];
#pragma unroll
      for (int k = 0; k < W; ++k) mixed = __fmaf_rn(window[j][i][k], taps[i][k], mixed);
#pragma unroll
      for (int k = 1; k < W; ++k) rows[j][conv_at + (k - 1) * E + e] = window[j][i][k];
      s.inner[j][e] = mixed * sigmoid(mixed);
    }
  }
  w += by4(E) + by4(W * E);
  if (!early) now.load(0, rows, ssm_at, w, dt_proj);
  __syncthreads();
  low.template run<filled(INNER)>(s.inner[0], [&](int j, int o, float value) { s.low[j][o] = value; });
  if (!early) out.begin(out_proj);
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < Scan::PASSES; ++pass) {
    Scan next;
    if (pass + 1 < Scan::PASSES) next.load(pass + 1, rows, ssm_at, w, dt_proj);
    now.run(s, rows, ssm_at);
    now = next;
  }
  __syncthreads();
  out.template run<filled(Y)>(s.y[0], [&](int j, int o, float value) {
    float* x = s.values[j];
    value += x[x_at + o];
    if (add_at != NONE) value += x[add_at + o];
    if (keep_at != NONE) x[keep_at + o] = value;
    x[x_at + o] = value;
  });
  __syncthreads();
}

// x += out_proj(gelu(in_proj(norm(x)))), with biases.
template <int M, int F, bool CENTRED, int IN_LANES, int OUT_LANES>
INLINE void mlp(const Problem& p, Shared& s, const int* op) {
  typedef Product<F, M, IN_LANES> In;
  const float* w = p.w + op[7];
  const T* m = p.m + op[11];
  const int x_at = op[1];
  In in;
  in.begin(m);
  norm<M, CENTRED>(s, x_at, w);
  w += NORM_WEIGHTS<M>;
  in.template run<filled(NORMED)>(s.normed[0], [&](int j, int o, float value) {
    value += w[o];
    s.inner[j][o] = value * 0.5f * (1.0f + erff(value * 0.70710678f));
  });
  Product<M, F, OUT_LANES> out;
  out.begin(m + In::SIZE);
  __syncthreads();
  out.template run<filled(INNER)>(
      s.inner[0], [&](int j, int o, float value) { s.values[j][x_at + o] += value + w[by4(F) + o]; });
  __syncthreads();
}

template <int IN, int OUT, int LANES> INLINE void linear(const Problem& p, Shared& s, const int* op) {
  Product<OUT, IN, LANES> product;
  product.begin(p.m + op[6]);
  const float* bias = p.w + op[5];
  const int out_at = op[3];
  product.template run<filled(VALUES)>(
      s.values[0] + op[1], [&](int j, int o, float value) { s.values[j][out_at + o] = value + bias[o]; });
  __syncthreads();
}

template <int M, bool CENTRED> INLINE void norm_in_place(const Problem& p, Shared& s, const int* op) {
  norm<M, CENTRED>(s, op[1], p.w + op[7]);
  EACH_STREAM for (int d = threadIdx.x; d < M; d += THREADS) s.values[j][op[1] + d] = s.normed[j][d];
  __syncthreads();
}

// Instructions from `first` to `last`: each ends with a barrier.
INLINE void network(const Problem& p, Shared& s, const Rows& rows, int first, int last, int phase) {
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    const int* op = s.ops[i];
    switch (op[0]) {
      case ADD:
      case COPY:
      case PUT:
      case TAKE: {
        const int to = op[1], from = op[2], n = op[3];
        // A pool's pending steps, and those of its queue, stand side by side: channel d's from d p on.
        const int pool = op[0] < LINEAR ? 1 : op[4], slot = op[0] < LINEAR ? 0 : phase / op[5] % pool;
        EACH_STREAM for (int d = threadIdx.x; d < n; d += THREADS) {
          float* x = s.values[j];
          const float value = x[from + (op[0] == TAKE ? d * pool + slot : d)];
          float& there = x[to + (op[0] == PUT ? d * pool + slot : d)];
          there = op[0] == ADD ? there + value : value;
        }
        __syncthreads();
        break;
      }
      CASES
    }
  }
}

// The code at a quantile: core/sampling.py's rules; -1 if the logits are not finite.
INLINE int choose(const Problem& p, Shared& s, const float* logits, double uniform) {
  const int i = threadIdx.x, lane = threadIdx.x % 32;
  float largest = __uint_as_float(0xff800000u), bad = 0.0f;
#pragma unroll
  for (int k = lane; k < CODES; k += 32) {
    largest = fmaxf(largest, logits[k]);
    bad += logits[k] - logits[k];  // NaN if it is not finite
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) largest = fmaxf(largest, across(largest, mask));
  bad = sum_of_warp(bad);
  if (i == 0) s.code = -1;
  __syncthreads();
  if (p.temperature == 0.0) {
    float best = CODES;  // the first of the largest
#pragma unroll
    for (int k = lane; k < CODES; k += 32)
      if (logits[k] == largest) best = fminf(best, k);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) best = fminf(best, across(best, mask));
    return bad == 0.0f ? int(best) : -1;
  }
  float mine = 0.0f;  // its probability, the largest being 1
  if (i < CODES) s.p[i] = mine = exp_negative((logits[i] - largest) / float(p.temperature));
  __syncthreads();
  if (p.top_k) {
    int more = 0;
    for (int k = 0; k < CODES; ++k) more += s.p[k] > mine;
    if (more >= p.top_k) mine = 0.0f;
    __syncthreads();
    if (i < CODES) s.p[i] = mine;
    __syncthreads();
  }
  if (p.top_p < 1.0) {
    float before[4] = {0.0f, 0.0f, 0.0f, 0.0f}, all[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int k = 0; k < CODES; k += 4) {
      float four[4];
      load_floats(s.p + k, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) all[j] += four[j], before[j] += four[j] > mine ? four[j] : 0.0f;
    }
    const double total = double(all[0] + all[1]) + double(all[2] + all[3]);
    if (double(before[0] + before[1]) + double(before[2] + before[3]) >= p.top_p * total) mine = 0.0f;
  }
  if (mine < float(p.min_p)) mine = 0.0f;
  __syncthreads();
  if (i < CODES) s.p[i] = mine;
  __syncthreads();
  // Sums of all up to each: within 16, then over those before.
  double sum = 0.0;
  const int begin = i / 16 * 16;
  if (i < CODES) {
    for (int k = begin; k <= i; ++k) sum += s.p[k];
    if (i % 16 == 15) s.sums[i / 16] = sum;
  }
  __syncthreads();
  if (i < CODES) {
    double before = 0.0, total = 0.0;
    for (int k = 0; k < CODES / 16; ++k) {
      if (k == i / 16) before = total;
      total += s.sums[k];
    }
    const double target = uniform * total, cumulative = before + sum;
    // The first whose sum exceeds the target, or reaches all there is. Those of no probability add nothing.
    s.p[i] = cumulative > target || cumulative >= total ? 1.0f : 0.0f;
  }
  __syncthreads();
  if (i < CODES && bad == 0.0f && s.p[i] != 0.0f && (i == 0 || s.p[i - 1] == 0.0f)) s.code = i;
  __syncthreads();
  return s.code;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) write_on(const Problem p) {
  extern __shared__ float4 room[];
  Shared& s = *reinterpret_cast<Shared*>(room);
  const int64 recording = blockIdx.x;
  Rows rows;
  EACH_STREAM rows[j] = (j ? p.beside : p.v) + recording * ROW;
  for (int i = threadIdx.x; i < N_OPS * OPERANDS; i += THREADS) s.ops[0][i] = p.ops[i];
  EACH_STREAM for (int i = threadIdx.x; i < VALUES; i += THREADS) s.values[j][i] = rows[j][i];
  __syncthreads();
  int code = p.codes[recording], phase = p.positions[recording] % strides[RATES - 1];
#pragma unroll 1
  for (int64 t = 0; t < p.n; ++t) {
    const int64 at = recording * p.stride + t;
    if (code < 0) {
      for (int64 i = threadIdx.x; i < p.n - t; i += THREADS) p.out[at + i] = -1;
      break;
    }
    for (int d = threadIdx.x; d < WIDTH; d += THREADS) {
      const float x = p.w[EMBEDDING_AT + code * WIDTH + d];
      EACH_STREAM s.values[j][d] = x;
    }
    __syncthreads();
    int depth = 0;
    while (depth + 1 < RATES && (phase + 1) % strides[depth + 1] == 0) ++depth;
    network(p, s, rows, spans[depth][0], spans[depth][1], phase);
    float* logits = s.values[0] + LOGITS_AT;
    for (int i = threadIdx.x; i < CODES; i += THREADS) {
      if (GUIDED) {
        const float without = s.values[GUIDED][LOGITS_AT + i];
        logits[i] = without + float(p.guidance) * (logits[i] - without);
      }
      if (p.seen) p.seen[at * CODES + i] = logits[i];
    }
    __syncthreads();
    code = choose(p, s, logits, p.uniforms[at]);
    if (threadIdx.x == 0) p.out[at] = code;
    phase = (phase + 1) % strides[RATES - 1];
  }
  __syncthreads();
  EACH_STREAM for (int i = threadIdx.x; i < VALUES; i += THREADS) rows[j][i] = s.values[j][i];
}
