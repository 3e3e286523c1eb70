// What stands before the first block of cuda.py's stack: the stream, and what in_proj and its norm ask of that.
//
// A block of threads has a sequence. Letters: B sequences, M model width; macros, but B, as are PARTS and MOST.

constexpr int WARPS = 8, THREADS = 32 * WARPS;

struct Problem {
  const bf16* x;      // (B, M): what the stack begins with; or of which these rows are that
  const int64* rows;  // (B,), or 0
  const bf16* norm;   // of the first block
  float* stream;      // (B, M)
  bf16* scaled;       // (B, M): the stream times the norm's weight
  float* squares;     // (PARTS, MOST): the stream's sums of squares, of M / PARTS channels each; here in the first
};
struct Shared {
  float sums[WARPS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
extern "C" __constant__ int shared_percent = SHARED_PERCENT;

extern "C" __global__ void __launch_bounds__(THREADS, 1) begin(const GRID_CONSTANT Problem p) {
  Shared& s = *reinterpret_cast<Shared*>(own_room());
  int tid = threadIdx.x, b = blockIdx.x;
  wait_for_kernel_before();
  float sum = 0.0f;
  const bf16* row = p.x + (p.rows ? p.rows[b] : int64(b)) * M;
  for (int d = tid; d < M; d += THREADS) {
    float x = one(row + d);
    p.stream[int64(b) * M + d] = x;
    p.scaled[int64(b) * M + d].bits = (unsigned short)floats_to_bf16(x * one(p.norm + d), 0.0f);
    sum = __fmaf_rn(x, x, sum);
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum = add_across(sum, mask);
  if (tid % 32 == 0) s.sums[tid / 32] = sum;
  __syncthreads();
  for (int i = tid; i < PARTS; i += THREADS) {
    sum = 0.0f;
    if (i == 0)
      for (int w = 0; w < WARPS; ++w) sum += s.sums[w];
    p.squares[i * MOST + b] = sum;
  }
}
