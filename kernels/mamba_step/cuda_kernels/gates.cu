// Of an input's gate and of its step size; and eight numbers as they come.

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
INLINE float softplus(float x) { return softplus_of(x, exp_negative(-fabsf(x))); }

INLINE Packed<bf16, 8> packed(uint4 x) {
  Packed<bf16, 8> y;
  y.word[0] = x.x, y.word[1] = x.y, y.word[2] = x.z, y.word[3] = x.w;
  return y;
}
