// The head of a language model for a few sequences: the last norm, and a product with each token's row. A warp has
// whole rows of the weight, in registers, and multiplies them with each sequence's vector.
//
// Letters: M model width; a macro, as are VOCABULARY, ROWS (sequences), BLOCKS, WARPS (of a block) and CENTRED (LayerNorm
// instead of RMSNorm).

constexpr int THREADS = 32 * WARPS;
static_assert(M % 256 == 0 && ROWS * 2 <= 32, "sizes that this kernel does not serve");

struct Problem {
  const float* stream;           // (ROWS, M)
  const bf16 *norm, *norm_bias;  // (M,); norm_bias may be 0
  const bf16* weight;            // (VOCABULARY, M)
  bf16* logits;                  // (ROWS, VOCABULARY)
  double eps;
};
struct Shared {
  float x[ROWS][M], sums[2][ROWS * WARPS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

INLINE float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
INLINE float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
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

// Where element k of a vector lies, so that the lanes of a warp, which take 8 each, find theirs in different banks.
INLINE int place(int k) { return (k & ~255) + (k >> 2 & 1) * 128 + (k >> 3 & 31) * 4 + (k & 3); }

// K elements of each of AT_ONCE rows, 8 a lane at a time.
template <int K, int AT_ONCE> struct Rows {
  uint4 part[AT_ONCE][K / 256];

  INLINE void load(const bf16* matrix, int first, int n, int tid) {
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
#pragma unroll
      for (int i = 0; i < K / 256; ++i)
        if (first + r < n) part[r][i] = once16(matrix + int64(first + r) * K + i * 256 + tid % 32 * 8);
        else part[r][i] = make_uint4(0, 0, 0, 0);
  }
  // Of each row with the vectors of all sequences; lane b AT_ONCE + r gets that of row r and sequence b.
  INLINE float products(const Shared& s, int tid) const {
    float mine = 0.0f;
    int lane = tid % 32;
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
      float sum[AT_ONCE][2];
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) sum[r][0] = sum[r][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < K / 256; ++i) {
        float4 low = *reinterpret_cast<const float4*>(&s.x[b][i * 256 + lane * 4]);
        float4 high = *reinterpret_cast<const float4*>(&s.x[b][i * 256 + 128 + lane * 4]);
#pragma unroll
        for (int r = 0; r < AT_ONCE; ++r) {
          const uint4& w = part[r][i];
          sum[r][0] = __fmaf_rn(low_half(w.x), low.x, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.x), low.y, sum[r][1]);
          sum[r][0] = __fmaf_rn(low_half(w.y), low.z, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.y), low.w, sum[r][1]);
          sum[r][0] = __fmaf_rn(low_half(w.z), high.x, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.z), high.y, sum[r][1]);
          sum[r][0] = __fmaf_rn(low_half(w.w), high.z, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.w), high.w, sum[r][1]);
        }
      }
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) {
        float total = sum[r][0] + sum[r][1];
#pragma unroll
        for (int mask = 16; mask; mask /= 2) total = add_across(total, mask);
        if (lane == b * AT_ONCE + r) mine = total;
      }
    }
    return mine;
  }
};

INLINE int unit_of(int step, int tid) { return (step * WARPS + tid / 32) * BLOCKS + int(blockIdx.x); }
INLINE constexpr int steps_for(int units) { return (units + WARPS * BLOCKS - 1) / (WARPS * BLOCKS); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) head(const GRID_CONSTANT Problem p) {
  constexpr int AT_ONCE = M <= 2048 ? 2 : 1, UNITS = (VOCABULARY + AT_ONCE - 1) / AT_ONCE;
  constexpr int PER = (M + THREADS - 1) / THREADS;
  extern __shared__ float4 room[];
  Shared& s = *reinterpret_cast<Shared*>(room);
  Rows<M, AT_ONCE> rows;
  int tid = threadIdx.x, lane = tid % 32, b = lane / AT_ONCE;
  rows.load(p.weight, unit_of(0, tid) * AT_ONCE, VOCABULARY, tid);
  float weight[PER], shift[PER], value[ROWS][PER], sum[ROWS];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    int d = tid + i * THREADS;
    weight[i] = d < M ? one(p.norm + d) : 0.0f;
    shift[i] = p.norm_bias && d < M ? one(p.norm_bias + d) : 0.0f;
  }
  wait_for_kernel_before();
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    sum[b] = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      int d = tid + i * THREADS;
      value[b][i] = d < M ? fresh(p.stream + int64(b) * M + d) : 0.0f;
      sum[b] += value[b][i];
    }
  }
  if (CENTRED) block_sums(sum, s.sums[0], tid);
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    float mean = sum[b] / M;
    sum[b] = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (CENTRED) value[b][i] -= tid + i * THREADS < M ? mean : 0.0f;
      sum[b] = __fmaf_rn(value[b][i], value[b][i], sum[b]);
    }
  }
  block_sums(sum, s.sums[1], tid);
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    float scale = inverse_root(sum[b] / M + float(p.eps));
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      int d = tid + i * THREADS;
      if (d < M) s.x[b][place(d)] = __fmaf_rn(value[b][i] * scale, weight[i], shift[i]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < steps_for(UNITS); ++step) {
    int token = unit_of(step, tid) * AT_ONCE + lane % AT_ONCE;
    float out = rows.products(s, tid);
    if (b < ROWS && token < VOCABULARY) put(p.logits + int64(b) * VOCABULARY + token, out);
    if (step + 1 < steps_for(UNITS)) rows.load(p.weight, unit_of(step + 1, tid) * AT_ONCE, VOCABULARY, tid);
  }
}
