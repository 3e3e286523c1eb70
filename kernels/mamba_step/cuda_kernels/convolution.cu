// A token through the convolution, 8 channels of a sequence, whose windows lie in shared memory: for middle.cu and
// project.cu. W, its width, is a macro.

// K numbers of each of 8 channels as they lie in memory: the last W - 1 inputs, or the W taps.
template <int K> struct Eight {
  Packed<bf16, 8> words[K];
  INLINE void load(const bf16* from) {
#pragma unroll
    for (int i = 0; i < K; ++i) words[i].load(from + 8 * i);
  }
  INLINE float get(int channel, int k) const { return words[(channel * K + k) / 8].get((channel * K + k) % 8); }
};

// u, the newest input, becomes silu(convolution); the window, the inputs before, moves on by one.
INLINE void convolve(Packed<bf16, 8>& u, bf16* window, const Eight<W>& taps, const Packed<bf16, 8>& shift) {
  Eight<W - 1> past;
  past.load(window);
  float mixed[8], next[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mixed[k] = __fmaf_rn(u.get(k), taps.get(k, W - 1), shift.get(k));
#pragma unroll
    for (int w = 0; w < W - 1; ++w) mixed[k] = __fmaf_rn(past.get(k, w), taps.get(k, w), mixed[k]);
    mixed[k] *= sigmoid(mixed[k]);
  }
#pragma unroll
  for (int w = 0; w < W - 1; ++w) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      int at = w * 8 + k, of = at / (W - 1), tap = at % (W - 1);
      next[k] = tap < W - 2 ? past.get(of, (tap + 1) % (W - 1)) : u.get(of);
    }
    Packed<bf16, 8> moved;
    moved.set(next);
    moved.store(window + 8 * w);
  }
  u.set(mixed);
}
