// What only a GPU has and these kernels need beside ../../selective_scan/cuda_kernels/device.cu.

// What other blocks may have written since: past the L1 cache.
__device__ __forceinline__ float fresh(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ float2 fresh_pair(const float* from) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from));
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
// What nobody writes, once: asked for here and not later, whatever the compiler thinks. (Loads of constants, ld.global.nc,
// it moves behind the wait for the kernel before.)
__device__ __forceinline__ uint4 once16(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}
// What is the same in all lanes, so that the compiler knows it.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

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
__device__ __forceinline__ void wait_at(Gate* gate, int parity = 0) {
  asm volatile("{.reg .pred p; AGAIN_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
               "@p bra.uni DONE_%=; bra.uni AGAIN_%=; DONE_%=: }" ::"r"(unsigned(__cvta_generic_to_shared(gate))),
               "r"(parity)
               : "memory");
}
// Bulk copies, by one thread: whole pieces of memory to shared memory, behind a gate, and back, in order. A gate opens
// again and again, each time when so many have arrived and all bytes that they expect are there.
__device__ __forceinline__ void open(Gate* gate, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(gate))), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arrive(Gate* gate) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(unsigned(__cvta_generic_to_shared(gate))) : "memory");
}
__device__ __forceinline__ void expect_more(Gate* gate, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(gate))),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void all_open() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void bring(void* to, const void* from, int bytes, Gate* gate) {
  asm volatile("{mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;"
               "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];}" ::"r"(
                   unsigned(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes), "r"(unsigned(__cvta_generic_to_shared(gate)))
               : "memory");
}
// Policies of the L2 cache. What passes through it but once is to be the first to leave: weights that leave late push out
// states that have just been written, and these go to memory while the next weights come from there. Of states that are
// many it is better that they leave last: measured.
__device__ __forceinline__ unsigned long long first_to_leave() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ unsigned long long last_to_leave() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void store4(float* to, float4 x, unsigned long long policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void bring(void* to, const void* from, int bytes, Gate* gate, unsigned long long policy) {
  asm volatile("{mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;"
               "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;}" ::
                   "r"(unsigned(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes), "r"(unsigned(__cvta_generic_to_shared(gate))), "l"(policy)
               : "memory");
}
// To the place of `to` in another block of the cluster, behind its gate; this one's shared memory has to stay till then.
__device__ __forceinline__ void copy_to(void* to, const void* from, int bytes, Gate* gate, int rank) {
  asm volatile("{.reg .u32 there, beside;"
               "mapa.shared::cluster.u32 there, %0, %4; mapa.shared::cluster.u32 beside, %3, %4;"
               "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [beside];}" ::"r"(
                   unsigned(__cvta_generic_to_shared(to))),
               "r"(unsigned(__cvta_generic_to_shared(from))), "r"(bytes), "r"(unsigned(__cvta_generic_to_shared(gate))),
               "r"(rank)
               : "memory");
}
// What this thread has written to shared memory, to be seen by a bulk copy that another begins after a barrier.
__device__ __forceinline__ void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void give(void* to, const void* from, int bytes) {
  asm volatile("{cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2; cp.async.bulk.commit_group;}" ::"l"(to),
               "r"(unsigned(__cvta_generic_to_shared(from))), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void give(void* to, const void* from, int bytes, unsigned long long policy) {
  asm volatile("{cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3; "
               "cp.async.bulk.commit_group;}" ::"l"(to),
               "r"(unsigned(__cvta_generic_to_shared(from))), "r"(bytes), "l"(policy)
               : "memory");
}
template <int n> __device__ __forceinline__ void all_read_but() {  // but the last n
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
__device__ __forceinline__ void all_given() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Tiles of a matrix of bfloat16, of 64 columns, by the tensor map of nvrtc.py: they lie in shared memory, from a multiple
// of 1,024 bytes on, as wgmma reads them (rows of 128 bytes, swizzled).
struct alignas(64) TensorMap { unsigned long long words[16]; };
__device__ __forceinline__ void bring_tile(void* to, const TensorMap* map, int column, int row, Gate* gate) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
               "[%4];" ::"r"(unsigned(__cvta_generic_to_shared(to))),
               "l"(map), "r"(column), "r"(row), "r"(unsigned(__cvta_generic_to_shared(gate)))
               : "memory");
}
__device__ __forceinline__ void bring_tile(void* to, const TensorMap* map, int column, int row, Gate* gate,
                                           unsigned long long policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
               "[%1, {%2, %3}], [%4], %5;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
               "l"(map), "r"(column), "r"(row), "r"(unsigned(__cvta_generic_to_shared(gate))), "l"(policy)
               : "memory");
}
#if __CUDA_ARCH__ == 900
// c += a b^T by the 128 threads of four warps, and c = a b^T where not `more`: to be committed, and read after a wait. a is
// a tile of 64 rows, b one of 32, 64, 128 or 192.
__device__ __forceinline__ unsigned long long tile_at(const void* at) {
  return (unsigned(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#define SUMS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_64 SUMS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EIGHT(c, i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define MULTIPLY(p, shape, sums, a, b) \
  "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" sums "}, %" #a ", %" #b ", " #p ", 1, 1, 0, 0;"
#define BEGIN(more) "{.reg .pred p, q; setp.ne.b32 p, %" #more ", 0; setp.eq.b32 q, %" #more ", %" #more ";"
#define SUMS_128 SUMS_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_192 SUMS_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define THIRTY_TWO(c, i) EIGHT(c, i), EIGHT(c, i + 8), EIGHT(c, i + 16), EIGHT(c, i + 24)
#define PIECES \
  "l"(x), "l"(y), "l"(x + 2), "l"(y + 2), "l"(x + 4), "l"(y + 4), "l"(x + 6), "l"(y + 6), "r"(int(more))
__device__ __forceinline__ void multiply_soon(float (&c)[16], const void* a, const void* b, bool more) {
  unsigned long long x = tile_at(a), y = tile_at(b);
  asm volatile(BEGIN(24) MULTIPLY(p, "m64n32k16", SUMS_32, 16, 17) MULTIPLY(q, "m64n32k16", SUMS_32, 18, 19)
                   MULTIPLY(q, "m64n32k16", SUMS_32, 20, 21) MULTIPLY(q, "m64n32k16", SUMS_32, 22, 23) "}"
               : EIGHT(c, 0), EIGHT(c, 8)
               : PIECES
               : "memory");
}
__device__ __forceinline__ void multiply_soon(float (&c)[32], const void* a, const void* b, bool more) {
  unsigned long long x = tile_at(a), y = tile_at(b);
  asm volatile(BEGIN(40) MULTIPLY(p, "m64n64k16", SUMS_64, 32, 33) MULTIPLY(q, "m64n64k16", SUMS_64, 34, 35)
                   MULTIPLY(q, "m64n64k16", SUMS_64, 36, 37) MULTIPLY(q, "m64n64k16", SUMS_64, 38, 39) "}"
               : THIRTY_TWO(c, 0)
               : PIECES
               : "memory");
}
__device__ __forceinline__ void multiply_soon(float (&c)[64], const void* a, const void* b, bool more) {
  unsigned long long x = tile_at(a), y = tile_at(b);
  asm volatile(BEGIN(72) MULTIPLY(p, "m64n128k16", SUMS_128, 64, 65) MULTIPLY(q, "m64n128k16", SUMS_128, 66, 67)
                   MULTIPLY(q, "m64n128k16", SUMS_128, 68, 69) MULTIPLY(q, "m64n128k16", SUMS_128, 70, 71) "}"
               : THIRTY_TWO(c, 0), THIRTY_TWO(c, 32)
               : PIECES
               : "memory");
}
__device__ __forceinline__ void multiply_soon(float (&c)[96], const void* a, const void* b, bool more) {
  unsigned long long x = tile_at(a), y = tile_at(b);
  asm volatile(BEGIN(104) MULTIPLY(p, "m64n192k16", SUMS_192, 96, 97) MULTIPLY(q, "m64n192k16", SUMS_192, 98, 99)
                   MULTIPLY(q, "m64n192k16", SUMS_192, 100, 101) MULTIPLY(q, "m64n192k16", SUMS_192, 102, 103) "}"
               : THIRTY_TWO(c, 0), THIRTY_TWO(c, 32), THIRTY_TWO(c, 64)
               : PIECES
               : "memory");
}
__device__ __forceinline__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n> __device__ __forceinline__ void all_multiplied_but() {  // the last n committed
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
// All bits of each half the sign of that.
__device__ __forceinline__ unsigned signs(unsigned pair) {
  unsigned y;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(y) : "r"(pair));
  return y;
}
// By all threads of four warps: what some leave others may take, up to 65,536 of a block.
template <int n> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n)); }
template <int n> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n)); }
template <int n> __device__ __forceinline__ void read_not_before(float (&c)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
#undef SUMS_128
#undef SUMS_192
#undef THIRTY_TWO
#undef MULTIPLY
#undef BEGIN
#undef SUMS_32
#undef SUMS_64
#undef EIGHT
#undef PIECES
#endif
