// Numbers of 16 and 32 bits and elementary functions, for all CUDA kernels: see common.cu and, of the 2-D scan,
// ../../cross_scan/cuda_kernels/common.cu.

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
typedef long long int64;

#define INLINE __device__ __forceinline__

constexpr float LOG2E = 1.4426950408889634f, LOG2E_LOW = 1.925962989e-8f, LN2 = 0.6931471805599453f;

INLINE float to_float(unsigned bits, bf16) { return __uint_as_float(bits << 16); }
INLINE float to_float(unsigned bits, f16) { return half_to_float(bits); }
INLINE float to_float(unsigned bits, float) { return __uint_as_float(bits); }
INLINE unsigned to_bits(float low, float high, bf16) { return floats_to_bf16(low, high); }
INLINE unsigned to_bits(float low, float high, f16) { return floats_to_half(low, high); }

// K numbers as they lie in memory, moved by one instruction. K * sizeof(X) is 2, 4, 8 or 16.
template <typename X, int K> struct Packed {
  static constexpr int BYTES = K * sizeof(X), WORDS = (BYTES + 3) / 4;
  unsigned word[WORDS];

  INLINE void clear() {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) word[i] = 0;
  }
  INLINE void load(const X* from) {
    if constexpr (BYTES == 2) word[0] = *reinterpret_cast<const unsigned short*>(from);
    if constexpr (BYTES == 4) word[0] = *reinterpret_cast<const unsigned*>(from);
    if constexpr (BYTES == 8) {
      uint2 w = *reinterpret_cast<const uint2*>(from);
      word[0] = w.x, word[1] = w.y;
    }
    if constexpr (BYTES == 16) {
      uint4 w = *reinterpret_cast<const uint4*>(from);
      word[0] = w.x, word[1] = w.y, word[2] = w.z, word[3] = w.w;
    }
  }
  // Zeros where it is not wanted.
  INLINE void load_if(bool wanted, const X* from) { clear(), load_over(wanted, from); }
  // What was there where it is not wanted.
  INLINE void load_over(bool wanted, const X* from) {
    if constexpr (BYTES == 2) ::load_over(wanted, word, reinterpret_cast<const unsigned short*>(from));
    if constexpr (BYTES == 4) ::load_over(wanted, word, reinterpret_cast<const unsigned*>(from));
    if constexpr (BYTES == 8) ::load_over(wanted, word, reinterpret_cast<const uint2*>(from));
    if constexpr (BYTES == 16) ::load_over(wanted, word, reinterpret_cast<const uint4*>(from));
  }
  INLINE void store(X* to) const {
    if constexpr (BYTES == 2) *reinterpret_cast<unsigned short*>(to) = word[0];
    if constexpr (BYTES == 4) *reinterpret_cast<unsigned*>(to) = word[0];
    if constexpr (BYTES == 8) *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    if constexpr (BYTES == 16) *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  }
  INLINE void store_if(bool wanted, X* to) const {
    if constexpr (BYTES == 2) ::store_if(wanted, to, (unsigned short)word[0]);
    if constexpr (BYTES == 4) ::store_if(wanted, to, word[0]);
    if constexpr (BYTES == 8) ::store_if(wanted, to, make_uint2(word[0], word[1]));
    if constexpr (BYTES == 16) ::store_if(wanted, to, make_uint4(word[0], word[1], word[2], word[3]));
  }
  INLINE float get(int i) const {
    if constexpr (sizeof(X) == 4) return to_float(word[i], X());
    else return to_float(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffff, X());
  }
  INLINE void set(const float (&x)[K]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (sizeof(X) == 4) word[i] = __float_as_uint(x[i]);
      else word[i] = to_bits(x[2 * i], x[(2 * i + 1) % K], X());
    }
  }
};
INLINE Packed<bf16, 8> packed(uint4 x) {
  Packed<bf16, 8> y;
  y.word[0] = x.x, y.word[1] = x.y, y.word[2] = x.z, y.word[3] = x.w;
  return y;
}

template <typename X> INLINE float one(const X* at) {
  Packed<X, 1> x;
  x.load(at);
  return x.get(0);
}

template <int K> INLINE void load_floats(const float* from, float (&x)[K]) {
  constexpr int PIECE = K % 4 == 0 ? 4 : K % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < K; i += PIECE) {
    Packed<float, PIECE> p;
    p.load(from + i);
#pragma unroll
    for (int k = 0; k < PIECE; ++k) x[i + k] = p.get(k);
  }
}

template <int K> INLINE void store_floats(float* to, const float (&x)[K]) {
  constexpr int PIECE = K % 4 == 0 ? 4 : K % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < K; i += PIECE) {
    Packed<float, PIECE> p;
#pragma unroll
    for (int k = 0; k < PIECE; ++k) p.word[k] = __float_as_uint(x[i + k]);
    p.store(to + i);
  }
}

// Elementary functions -----------------------------------------------------------------------------------------------

// exp(x) for x <= 0 to a few units in the last place: 0 below -88, something finite for NaN. exp2(x log2 e) by itself
// would lose about |x| units to the rounding of its argument, which is put back here.
INLINE float exp_negative(float x) {
  x = fmaxf(x, -150.0f);
  float t = __fmul_rn(x, LOG2E);
  float lost = __fmaf_rn(x, LOG2E_LOW, __fmaf_rn(x, LOG2E, -t));
  float e = exp2_fast(t);
  return __fmaf_rn(e, lost * LN2, e);
}

// max(x, 0), or NaN. By one instruction in forward.cu alone: forward_pairs.cu is slower with it, since the compiler then
// has its loads wait for each other (benchmarks/SCAN_NOTES.md).
#if FORWARD
INLINE float positive(float x) { return or_zero(x); }
#else
INLINE float positive(float x) { return x < 0.0f ? 0.0f : x; }
#endif

// The highest power's coefficient first.
template <int K> INLINE float polynomial(const float (&coefficients)[K], float x) {
  float p = coefficients[0];
#pragma unroll
  for (int k = 1; k < K; ++k) p = __fmaf_rn(p, x, coefficients[k]);
  return p;
}

// log(1 + exp(x)), given e = exp(-|x|): max(x, 0) + log1p(e), log1p(e) / e as a polynomial (relative error 3.4e-8), since
// a rounded 1 + e has lost what a small e holds.
INLINE float softplus_of(float x, float e) {
  constexpr float LOG1P[] = {0.0051261018961668015f, -0.029074065387248993f, 0.0775160863995552f,
                             -0.13602247834205627f,  0.19076880812644958f,   -0.2483539879322052f,
                             0.3331812024116516f,    -0.4999944567680359f,   0.9999999403953552f};
  return __fmaf_rn(e, polynomial(LOG1P, e), positive(x));
}
