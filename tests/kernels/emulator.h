// Runs a CUDA kernel on the CPU, for tests without a GPU: a thread is a fiber, which gives way to the next one where it
// has to wait (at a barrier of its warp, block or cluster, for bytes, for what another one writes). It stands in for
// cuda_kernels/device.cu. Shared memory starts as NaN, so that what nobody wrote shows; a kernel in which all wait ends.
// Copies are there at once, kernels run one after another, threads in their order: a missing wait for one of these, or a
// fence, does not show.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) float4 { float x, y, z, w; };
struct float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Index { unsigned x; };
static Index threadIdx, blockIdx;
alignas(1024) float4 room[1 << 14];

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<float> exchange;
static unsigned running, threads_of_block, blocks_of_cluster = 1;

inline void give_way() { swapcontext(&fibers[running], &scheduler); }
static unsigned steps_without_waiting;  // of all fibers, since each was run last: 0 where all wait
template <typename Condition> inline void wait_until(Condition met) {
  while (!met()) give_way();
  ++steps_without_waiting;
}
// Where `members` threads, without those that have ended, wait for each other.
struct Meeting {
  unsigned members = 0, here = 0, times = 0;
  bool complete() { return here == members ? (here = 0, ++times, true) : false; }
  unsigned arrive() { unsigned before = times; ++here, complete(), ++steps_without_waiting; return before; }
  void leave() { --members; if (members) complete(); }
  void wait(unsigned before) { wait_until([&] { return times != before; }); }
};
static std::vector<Meeting> of_warps, of_blocks;
static Meeting of_cluster;
static std::vector<unsigned> begun;  // of a thread, the cluster's times when it said so
inline void meet(Meeting& where) { where.wait(where.arrive()); }
inline void __syncwarp() { meet(of_warps[running / 32]); }
inline void __syncthreads() { meet(of_blocks[running / threads_of_block]); }
inline void meet() { __syncthreads(); }
inline int warp_slot() { return 0; }

inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float exp2_fast(float x) { float y = exp2f(x); return std::fabs(y) < 1.17549435e-38f ? 0.0f : y; }
inline float log2_fast(float x) { return log2f(x); }
inline float or_zero(float x) { return x < 0.0f ? 0.0f : x; }
inline float reciprocal(float x) { return 1.0f / x; }
inline float inverse_root(float x) { return 1.0f / sqrtf(x); }
inline float half_to_float(unsigned bits) { uint16_t b = bits; _Float16 x; std::memcpy(&x, &b, 2); return x; }
inline unsigned one_to_half(float x) { _Float16 y = x; uint16_t b; std::memcpy(&b, &y, 2); return b; }
inline unsigned floats_to_half(float low, float high) { return one_to_half(low) | one_to_half(high) << 16; }
inline unsigned one_to_bf16(float x) {
  unsigned b = __float_as_uint(x);
  return x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline unsigned floats_to_bf16(float low, float high) { return one_to_bf16(low) | one_to_bf16(high) << 16; }
inline float across(float x, int mask) {
  exchange[running] = x;
  __syncwarp();
  float other = exchange[running ^ mask];
  __syncwarp();
  return other;
}
inline float add_across(float x, int mask) { return x + across(x, mask); }
inline void* product_added(const void* from, int step, int stride) { return (char*)from + int64_t(step) * stride; }
// A GPU moves what is aligned to its size, and faults for anything else.
inline void check_aligned(const void* at, size_t size) {
  if (reinterpret_cast<uintptr_t>(at) % size) std::fprintf(stderr, "%zu bytes at %p are not aligned\n", size, at), std::abort();
}
template <typename X, unsigned long K> inline void load_over(bool wanted, unsigned (&x)[K], const X* from) {
  if (wanted) check_aligned(from, sizeof(X)), std::memcpy(x, from, sizeof(X));
}
template <typename X> inline void store_if(bool wanted, void* to, X x) {
  if (wanted) check_aligned(to, sizeof(X)), *static_cast<X*>(to) = x;
}

// Of kernels/mamba_step: a kernel is run after another, so none waits.
#define GRID_CONSTANT
inline float fresh(const float* from) { return *from; }
inline float2 fresh_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
inline float4 fresh4(const float* from) { return *reinterpret_cast<const float4*>(from); }
inline uint4 fresh16(const void* from) { return *static_cast<const uint4*>(from); }
inline uint4 once16(const void* from) { return fresh16(from); }
inline int uniform(int x) { return x; }
inline void wait_for_kernel_before() {}
inline void wait_for_end_before() {}
inline void let_next_begin() {}
// A cluster's blocks run side by side.
#define CLUSTERED(n)
struct alignas(1024) OwnRoom { float4 shared[1 << 14]; };
static std::vector<OwnRoom> rooms;
inline float4* room_of(unsigned rank) { return rooms[rank].shared; }
inline float4* own_room() { return room_of(running / threads_of_block); }
// Opens when so many have arrived and all bytes that they expect are there, again and again (an mbarrier).
struct alignas(8) Gate {
  int16_t arrivals, missing;
  int bytes : 31;
  unsigned phase : 1;
  void settle() { if (!missing && !bytes) missing = arrivals, phase ^= 1; }
};
inline void open(Gate* gate, int arrivals = 1) { *gate = {int16_t(arrivals), int16_t(arrivals), 0, 0}; }
inline void arrive(Gate* gate) { --gate->missing, gate->settle(), ++steps_without_waiting; }
inline void expect_more(Gate* gate, int bytes) { gate->bytes += bytes, arrive(gate); }
inline void brought_to(Gate* gate, int bytes) { gate->bytes -= bytes, gate->settle(); }
inline void expect(Gate* gate, int bytes) { open(gate), expect_more(gate, bytes); }
inline void wait_at(Gate* gate, int parity = 0) { wait_until([&] { return int(gate->phase) != parity; }); }
inline void say_begun() { begun[running] = of_cluster.arrive(); }
inline void wait_for_others() { of_cluster.wait(begun[running]); }
inline void all_open() {}
inline unsigned long long first_to_leave() { return 0; }
inline unsigned long long last_to_leave() { return 0; }
inline void store4(float* to, float4 x, unsigned long long) { *reinterpret_cast<float4*>(to) = x; }
inline void bring(void* to, const void* from, int bytes, Gate* gate, unsigned long long = 0) {
  check_aligned(to, 16), check_aligned(from, 16), check_aligned(reinterpret_cast<void*>(int64_t(bytes)), 16);
  expect_more(gate, bytes), std::memcpy(to, from, bytes), brought_to(gate, bytes);
}
inline void written() {}
inline void give(void* to, const void* from, int bytes, unsigned long long = 0) { std::memcpy(to, from, bytes); }
template <int> inline void all_read_but() {}
inline void all_given() {}
template <typename X> inline X* place_in(X* at, int rank) {  // of another block of the cluster
  return reinterpret_cast<X*>((char*)room_of(rank) + ((char*)at - (char*)own_room()));
}
inline void copy_to(void* to, const void* from, int bytes, Gate* gate, int rank) {
  std::memcpy(place_in(static_cast<char*>(to), rank), from, bytes), brought_to(place_in(gate, rank), bytes);
}
inline void push(float* at, Gate* gate, int rank, float x) { *place_in(at, rank) = x, brought_to(place_in(gate, rank), 4); }
struct TensorMap {  // that of nvrtc.py for this
  const uint16_t* matrix;
  int64_t height, width, n_rows, n_columns, rest[11];
};
inline void bring_tile(void* to, const TensorMap* map, int column, int row, Gate* gate, unsigned long long = 0) {
  for (int i = 0; i < map->n_rows; ++i)
    for (int j = 0; j < map->n_columns; ++j) {
      bool inside = row + i < map->height && column + j < map->width;
      static_cast<uint16_t*>(to)[i * map->n_columns + j] = inside ? map->matrix[(row + i) * map->width + column + j] : 0;
    }
  brought_to(gate, map->n_rows * map->n_columns * 2);
}
template <unsigned long K> inline void multiply_soon(float (&c)[K], const void* a, const void* b, bool more) {
  auto number = [](const void* tile, unsigned row, int k) {
    return __uint_as_float(unsigned(static_cast<const uint16_t*>(tile)[row * 64 + k]) << 16);
  };
  unsigned thread = running % threads_of_block % 128;
  for (int i = 0; i < int(K); ++i) {
    if (!more) c[i] = 0.0f;
    for (int k = 0; k < 64; ++k)
      c[i] += number(a, thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, k) *
              number(b, i / 4 * 8 + thread % 4 * 2 + i % 2, k);
  }
}
inline void begin_multiplying() {}
inline void commit() {}
inline unsigned signs(unsigned pair) { return (pair >> 31 ? 0xffff0000u : 0) | (pair >> 15 & 1 ? 0xffffu : 0); }
template <int> inline void all_multiplied_but() {}
template <int> inline void fewer_registers() {}
template <int> inline void more_registers() {}
template <unsigned long K> inline void read_not_before(float (&)[K]) {}
struct Operands { unsigned a[4], b[2]; };
static std::vector<Operands> operands;
inline float bf16_of(unsigned pair, int which) { return __uint_as_float(which ? pair & 0xffff0000u : pair << 16); }
inline void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  operands[running] = {{a0, a1, a2, a3}, {b0, b1}};
  __syncwarp();
  unsigned warp = running & ~31u, lane = running % 32;
  for (int i = 0; i < 4; ++i) {
    unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      unsigned a = operands[warp + row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      unsigned b = operands[warp + column * 4 + k % 8 / 2].b[k / 8];
      c[i] += bf16_of(a, k % 2) * bf16_of(b, k % 2);
    }
  }
  __syncwarp();
}
