// The convolution of a Mamba block, of one token: u = silu(conv(..)) of the first half of what in_proj makes, the window one
// step on. A thread has 8 channels of a sequence, whose window and taps lie side by side.
//
// Letters: B sequences, E inner width, W convolution width; macros, but B.

constexpr int THREADS = 128;
static_assert(E % 8 == 0, "sizes not served");

struct Problem {
  const bf16 *conv, *conv_bias;  // conv_bias may be 0
  bf16* conv_state;              // (B, E, W - 1)
  const bf16* uz;                // (B, 2 E)
  bf16* u;                       // (B, E)
  int64 n_rows;                  // B
};
extern "C" __constant__ int shared_bytes = 0;

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }

// The last W - 1 inputs of 8 channels, or their W taps, as they lie in memory.
template <int K> struct Eight {
  Packed<bf16, 8> words[K];
  INLINE void load(const bf16* from) {
#pragma unroll
    for (int i = 0; i < K; ++i) words[i].load(from + 8 * i);
  }
  INLINE float get(int channel, int k) const { return words[(channel * K + k) / 8].get((channel * K + k) % 8); }
};

extern "C" __global__ void __launch_bounds__(THREADS) convolve(const GRID_CONSTANT Problem p) {
  int64 item = int64(blockIdx.x) * THREADS + threadIdx.x, b = item / (E / 8);
  int c = int(item % (E / 8)) * 8;
  if (b >= p.n_rows) return;
  bf16* state = p.conv_state + (b * E + c) * (W - 1);
  Eight<W - 1> past;
  Eight<W> taps;
  Packed<bf16, 8> shift, newest, moved;
  past.load(state), taps.load(p.conv + c * W);
  if (p.conv_bias) shift.load(p.conv_bias + c);
  else shift.clear();
  wait_for_kernel_before();
  uint4 words = fresh16(p.uz + b * 2 * E + c);
  newest.word[0] = words.x, newest.word[1] = words.y, newest.word[2] = words.z, newest.word[3] = words.w;
  float mixed[8], next[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mixed[k] = __fmaf_rn(newest.get(k), taps.get(k, W - 1), shift.get(k));
#pragma unroll
    for (int w = 0; w < W - 1; ++w) mixed[k] = __fmaf_rn(past.get(k, w), taps.get(k, w), mixed[k]);
    mixed[k] *= sigmoid(mixed[k]);
  }
#pragma unroll
  for (int i = 0; i < W - 1; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      int at = i * 8 + k, channel = at / (W - 1), tap = at % (W - 1);
      next[k] = tap < W - 2 ? past.get(channel, (tap + 1) % (W - 1)) : newest.get(channel);
    }
    moved.set(next);
    moved.store(state + 8 * i);
  }
  moved.set(mixed);
  moved.store(p.u + b * E + c);
}
