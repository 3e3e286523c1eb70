// Of an input's gate and of its step size.

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
INLINE float softplus(float x) { return softplus_of(x, exp_negative(-fabsf(x))); }
