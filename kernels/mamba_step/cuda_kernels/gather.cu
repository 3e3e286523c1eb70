// What stands before a block of cuda_wide.py's stack: product.cu's sums added up and to the stream, and the norm of that.
//
// A block of threads has a sequence, a thread 8 channels. Letters: B sequences, M model width; SPLITS and CENTRED
// (LayerNorm) are macros, too.

constexpr int THREADS = M / 8, WARPS = THREADS / 32;
static_assert(M % 256 == 0 && THREADS <= 1024, "sizes not served");

struct Problem {
  const bf16* x;               // (B, M), what the first block begins with, or of which these rows are that; 0 elsewhere
  const int64* rows;           // (B,), or 0
  const float* sums;           // (SPLITS, B, M), what the last block left
  const bf16 *weight, *shift;  // of the norm; 0 behind the last block; shift may be 0
  float* stream;               // (B, M)
  bf16* normed;                // (B, M)
  double eps;
  int64 n_rows;  // B
};
struct Shared {
  float sums[2][WARPS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// Of all the block's threads; `place` is used once.
INLINE float all_added(float x, float* place) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = add_across(x, mask);
  if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) x += place[warp];
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gather(const GRID_CONSTANT Problem p) {
  Shared& s = *reinterpret_cast<Shared*>(own_room());
  int c = threadIdx.x * 8;
  int64 at = int64(blockIdx.x) * M + c;
  Packed<bf16, 8> weight, shift, x;
  weight.clear(), shift.clear();
  if (p.weight) weight.load(p.weight + c);
  if (p.shift) shift.load(p.shift + c);
  wait_for_kernel_before();
  float row[8], total = 0.0f, squares = 0.0f;
  if (p.x) {
    x.load(p.x + (p.rows ? p.rows[blockIdx.x] : int64(blockIdx.x)) * M + c);
#pragma unroll
    for (int k = 0; k < 8; ++k) row[k] = x.get(k);
  } else {
    float4 part[SPLITS][2];
#pragma unroll
    for (int i = 0; i < SPLITS; ++i) {
      const float* from = p.sums + i * p.n_rows * M + at;
      part[i][0] = fresh4(from), part[i][1] = fresh4(from + 4);
    }
    float4 old[2] = {fresh4(p.stream + at), fresh4(p.stream + at + 4)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 sum = part[0][half];
#pragma unroll
      for (int i = 1; i < SPLITS; ++i)
        sum.x += part[i][half].x, sum.y += part[i][half].y, sum.z += part[i][half].z, sum.w += part[i][half].w;
      row[4 * half] = old[half].x + sum.x, row[4 * half + 1] = old[half].y + sum.y;
      row[4 * half + 2] = old[half].z + sum.z, row[4 * half + 3] = old[half].w + sum.w;
    }
  }
  store_floats(p.stream + at, row);
  if (!p.weight) return;
  if (CENTRED) {
#pragma unroll
    for (int k = 0; k < 8; ++k) total += row[k];
    total = all_added(total, s.sums[0]) / M;
#pragma unroll
    for (int k = 0; k < 8; ++k) row[k] -= total;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) squares = __fmaf_rn(row[k], row[k], squares);
  float factor = inverse_root(all_added(squares, s.sums[1]) / M + float(p.eps));
#pragma unroll
  for (int k = 0; k < 8; ++k) row[k] = __fmaf_rn(row[k] * factor, weight.get(k), shift.get(k));
  x.set(row);
  x.store(p.normed + at);
}
