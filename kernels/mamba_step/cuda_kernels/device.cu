// What only a GPU has and these kernels need beside ../../selective_scan/cuda_kernels/device.cu.

// What other blocks may have written since: past the L1 cache.
__device__ __forceinline__ float fresh(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ float4 fresh4(const float* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
  return x;
}
__device__ __forceinline__ uint4 fresh16(const void* from) {
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
}
// What nobody writes, once: asked for here and not later, whatever the compiler thinks.
__device__ __forceinline__ uint4 once16(const void* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// A kernel waits for the end of the one before, and so for that of all before it, as each of these waits, too. It may
// let the next one begin before or after its wait. What is read before the wait has to be written by a kernel that
// stands before one that lets the next begin after its own wait, as `begin` and `enter` do: what this has seen the end of.
__device__ __forceinline__ void wait_for_end_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_kernel_before() {
  wait_for_end_before();
  let_next_begin();
}
// c (16, 8) += a (16, 16) b (16, 8), a and b in bfloat16.
__device__ __forceinline__ void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                             unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#define GRID_CONSTANT __grid_constant__
#define CLUSTERED(n) __cluster_dims__(n, 1, 1)
__device__ __forceinline__ void* own_room() {
  extern __shared__ float4 room[];
  return room;
}
// Distributed shared memory, a number at a time: a block says how many bytes the others will push to it behind a gate
// of its own, waits until all of the cluster have begun, and at the gate for the bytes. Nothing else is ordered: a
// barrier of the cluster with release and acquire would wait for all that is on its way to and from memory, the states
// above all.
typedef unsigned long long Gate;
__device__ __forceinline__ void expect(Gate* gate, int bytes) {  // by one thread
  asm volatile("{mbarrier.init.shared::cta.b64 [%0], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;}" ::"r"(
                   unsigned(__cvta_generic_to_shared(gate))),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void say_begun() {
  asm volatile("fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_others() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// To the place in the shared memory of another block of the cluster that `at` is in this one's.
__device__ __forceinline__ void push(float* at, Gate* gate, int rank, float x) {
  asm volatile("{.reg .u32 there, beside;"
               "mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 beside, %1, %2;"
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [beside];}" ::"r"(
                   unsigned(__cvta_generic_to_shared(at))),
               "r"(unsigned(__cvta_generic_to_shared(gate))), "r"(rank), "f"(x)
               : "memory");
}
__device__ __forceinline__ void wait_at(Gate* gate) {
  asm volatile("{.reg .pred p; AGAIN_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;"
               "@p bra.uni DONE_%=; bra.uni AGAIN_%=; DONE_%=: }" ::"r"(unsigned(__cvta_generic_to_shared(gate)))
               : "memory");
}
