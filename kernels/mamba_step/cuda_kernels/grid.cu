// A token through a stack of Mamba blocks, in phases: four of a layer, each of which takes all of the GPU and reads what
// the one before it wrote. A launch runs one phase or many. Between two phases all blocks meet (a counter in memory);
// between two launches the second waits for the end of the first. Before it waits, a phase asks for what it needs and
// nobody writes meanwhile: its weights and its states.
//
// Letters: M model width, E inner width, R rank of dt, N states (16), W convolution width; macros, as are ROWS
// (sequences), BLOCKS, WARPS (of a block) and CENTRED (LayerNorm instead of RMSNorm).

constexpr int N = 16, OUT = R + 2 * N, THREADS = 32 * WARPS;

struct Layer {
  const bf16 *norm, *norm_bias, *in_proj, *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D, *out_proj;
  bf16* conv_state;  // (ROWS, E, W - 1)
  float* ssm_state;  // (ROWS, E, N)
};

struct Problem {
  Layer layers[LAYERS];
  const bf16* x;          // (ROWS, M): what the stack begins with; 0 where `stream` goes on
  const bf16* next_norm;  // of the layer behind the last; 0 if there is none
  float* stream;          // (ROWS, M)
  void* uz;               // (ROWS, 2 E)
  float* low;             // (ROWS, OUT): dt before its widening, B, C
  void* y;                // (ROWS, E)
  bf16* scaled;           // (ROWS, M): the stream times the norm's weight
  float* squares;         // (M / 16, ROWS): the stream's sums of squares, of 16 channels each
  unsigned* arrivals;     // zero at the beginning
  int first, last, n_layers;
  float eps;
};

// To the first phase of a launch, or to another.
INLINE void wait_for_all(const Problem& p, int phase) {
  if (phase == p.first) {
    wait_for_launch_before();
  } else {
    if (threadIdx.x == 0) await_arrivals(p.arrivals, unsigned(phase - p.first) * BLOCKS);
    __syncthreads();
  }
}
INLINE void tell_all(const Problem& p, int phase) {
  if (phase + 1 < p.last) {
    __syncthreads();
    if (threadIdx.x == 0) arrive(p.arrivals);
  }
}

// This block's share of a matrix that a later phase reads, on its way to the L2 cache.
INLINE void ahead(const bf16* matrix, int64 elements) {
  constexpr int64 UNIT = 64;
  int64 share = (elements / UNIT + BLOCKS - 1) / BLOCKS * UNIT, from = share * blockIdx.x;
  if (AHEAD && threadIdx.x == 0 && from < elements)
    prefetch(matrix + from, unsigned((from + share < elements ? share : elements - from) * 2));
}

INLINE float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
INLINE float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
INLINE float softplus(float x) { return softplus_of(x, exp_negative(-fabsf(x))); }
INLINE void put(bf16* to, float x) { to->bits = (unsigned short)floats_to_bf16(x, 0.0f); }

// The sums over a block of ROWS numbers of each thread, in `scratch` of ROWS x WARPS, not to be written again soon.
INLINE void block_sums(float (&x)[ROWS], float* scratch, int tid) {
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x[b] = add_across(x[b], mask);
    if (tid % 32 == 0) scratch[b * WARPS + tid / 32] = x[b];
  }
  __syncthreads();
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    x[b] = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) x[b] += scratch[b * WARPS + w];
  }
}

// The convolution of one channel, its SiLU, and the step of its window, the W - 1 inputs before.
struct Convolution {
  float tap[W], bias;

  INLINE void load(const Layer& l, int e) {
    bias = l.conv_bias ? one(l.conv_bias + e) : 0.0f;
#pragma unroll
    for (int k = 0; k < W; ++k) tap[k] = one(l.conv + e * W + k);
  }
  INLINE float run(float newest, const float (&window)[W - 1], bf16* state) const {
    float mixed = __fmaf_rn(newest, tap[W - 1], bias);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) mixed = __fmaf_rn(window[k], tap[k], mixed);
#pragma unroll
    for (int k = 1; k < W - 1; ++k) put(state + k - 1, window[k]);
    put(state + W - 2, newest);
    return mixed * sigmoid(mixed);
  }
};
