// What only a GPU has, by name: single instructions, sums over lanes. tests/kernels/emulator.h stands in for it on a CPU.

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// x, or 0 if that is more; NaN if x is.
__device__ __forceinline__ float or_zero(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float half_to_float(unsigned bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)bits));
  return y;
}
__device__ __forceinline__ unsigned floats_to_half(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ unsigned floats_to_bf16(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// The x of the lane whose number differs in the bits of `mask`; x plus it.
__device__ __forceinline__ float across(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float add_across(float x, int mask) { return x + across(x, mask); }

// Where all threads of a block wait for each other, its warps at places of their own.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

// The warp's place among those of its multiprocessor.
__device__ __forceinline__ int warp_slot() {
  int x;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(x));
  return x;
}

// from + step * stride bytes. Left to itself, the compiler widens both factors outside of the backward's loops.
__device__ __forceinline__ void* product_added(const void* from, int step, int stride) {
  long long y;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(y) : "r"(step), "r"(stride), "l"(from));
  return (void*)y;
}

// What the backward reads so, and its gradients in 16 bits, hardly come again: they leave the caches to what does.
#if BACKWARDS
#define LOAD "ld.global.L1::no_allocate."
#define STORE_TWO "st.global.cs.u32"
#else
#define LOAD "ld.global."
#define STORE_TWO "st.global.u32"
#endif

// What is at `from` where it is wanted, else what x holds; without a branch, as below.
__device__ __forceinline__ void load_over(bool wanted, unsigned (&x)[1], const unsigned short* from) {
  unsigned short y = x[0];
  asm("{.reg .pred p; setp.ne.s32 p, %1, 0; @p " LOAD "u16 %0, [%2];}" : "+h"(y) : "r"(int(wanted)), "l"(from));
  x[0] = y;
}
__device__ __forceinline__ void load_over(bool wanted, unsigned (&x)[1], const unsigned* from) {
  asm("{.reg .pred p; setp.ne.s32 p, %1, 0; @p " LOAD "u32 %0, [%2];}" : "+r"(x[0]) : "r"(int(wanted)), "l"(from));
}
__device__ __forceinline__ void load_over(bool wanted, unsigned (&x)[2], const uint2* from) {
  asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p " LOAD "v2.u32 {%0, %1}, [%3];}"
      : "+r"(x[0]), "+r"(x[1])
      : "r"(int(wanted)), "l"(from));
}
__device__ __forceinline__ void load_over(bool wanted, unsigned (&x)[4], const uint4* from) {
  asm("{.reg .pred p; setp.ne.s32 p, %4, 0; @p " LOAD "v4.u32 {%0, %1, %2, %3}, [%5];}"
      : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
      : "r"(int(wanted)), "l"(from));
}

// A store under a condition, without a branch: one would keep the compiler from mixing what stands before with what
// stands behind it.
__device__ __forceinline__ void store_if(bool wanted, void* to, unsigned short x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u16 [%1], %2;}" ::"r"(int(wanted)), "l"(to), "h"(x)
               : "memory");
}
__device__ __forceinline__ void store_if(bool wanted, void* to, unsigned x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p " STORE_TWO " [%1], %2;}" ::"r"(int(wanted)), "l"(to), "r"(x)
               : "memory");
}
__device__ __forceinline__ void store_if(bool wanted, void* to, uint2 x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.u32 [%1], {%2, %3};}" ::"r"(int(wanted)), "l"(to),
               "r"(x.x), "r"(x.y)
               : "memory");
}
__device__ __forceinline__ void store_if(bool wanted, void* to, uint4 x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v4.u32 [%1], {%2, %3, %4, %5};}" ::"r"(int(wanted)),
               "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
