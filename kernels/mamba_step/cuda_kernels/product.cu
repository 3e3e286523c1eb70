// out (B, V) = x (B, M) weight (V, M)' for up to 64 rows of x and a matrix that is read once: the head of a language model.
//
// The matrix units multiply 16 rows of the matrix with 8 rows of x. A block's warps share out the width, so that a warp's
// share of x stays in its registers while the matrix passes by, and their sums are added up in shared memory in a fixed
// order. Which 32 elements of a row make which step of the matrix units is free, if it is the same for both: so a lane
// loads 8 that lie side by side; its own, of RING bands of 16 rows, wait in shared memory for it alone. Which row is which
// of a band is free, too: so that a lane ends up with four that lie side by side.
//
// Macros: M, OCTETS (B / 8, rounded up), BLOCKS, WARPS (of a block), RING.

constexpr int THREADS = 32 * WARPS, ROWS = 8 * OCTETS, PART = M / 32 / WARPS, STRIDE = (ROWS + 31) / 32 * 32 + 8;
static_assert(M % (32 * WARPS) == 0 && THREADS >= 4 * ROWS, "sizes not served");

struct Problem {
  const bf16 *weight, *x;
  bf16* out;
  int64 n_rows, n_out;  // B, V
};
struct Shared {
  uint4 weights[RING][PART][2][THREADS];
  float part[2][WARPS][16][STRIDE];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const GRID_CONSTANT Problem p) {
  Shared& s = *reinterpret_cast<Shared*>(own_room());
  int tid = threadIdx.x, g = tid % 32 / 4, t = tid % 4, warp = tid / 32, n_rows = int(p.n_rows), n_out = int(p.n_out);
  int units = (n_out + 15) / 16, turns = (units - int(blockIdx.x) + BLOCKS - 1) / BLOCKS, column = warp * PART * 32 + t * 8;
  if (EARLY) let_next_begin();
  auto fetch = [&](int turn) {
    if (turn < turns) {
      int first = (turn * BLOCKS + int(blockIdx.x)) * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int r = half * 8 + g, row = first + r % 4 * 4 + r / 4;
        const bf16* at = p.weight + int64(row < n_out ? row : n_out - 1) * M + column;
#pragma unroll
        for (int i = 0; i < PART; ++i) bring16(&s.weights[turn % RING][i][half][tid], at + i * 32);
      }
    }
    end_of_group();
  };
#pragma unroll 1
  for (int i = 0; i < RING - 1; ++i) fetch(i);
  wait_for_end_before();
  if (!EARLY) let_next_begin();
  uint4 b[PART][OCTETS];
#pragma unroll
  for (int i = 0; i < PART; ++i)
#pragma unroll
    for (int j = 0; j < OCTETS; ++j) {
      int row = j * 8 + g;
      b[i][j] = row < n_rows ? fresh16(p.x + int64(row) * M + column + i * 32) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    float c[OCTETS][4];
#pragma unroll
    for (int j = 0; j < OCTETS; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
    all_groups_brought_but<RING - 2>();
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      const uint4 v = s.weights[turn % RING][i][0][tid], w = s.weights[turn % RING][i][1][tid];
#pragma unroll
      for (int j = 0; j < OCTETS; ++j) {
        const uint4& u = b[i][j];
        multiply_add(c[j], v.x, w.x, v.y, w.y, u.x, u.y);
        multiply_add(c[j], v.z, w.z, v.w, w.w, u.z, u.w);
      }
    }
    fetch(turn + RING - 1);
    auto& part = s.part[turn % 2];
#pragma unroll
    for (int j = 0; j < OCTETS; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(&part[warp][half * 8 + g][j * 8 + 2 * t]) = float2{c[j][2 * half], c[j][2 * half + 1]};
    __syncthreads();
    int row = (turn * BLOCKS + int(blockIdx.x)) * 16 + t * 4, sequence = tid / 4;
    if (sequence < n_rows && row < n_out) {
      float sum[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[k] = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum[k] += part[w][t + 4 * k][sequence];
      }
      Packed<bf16, 4> packed;
      packed.set(sum);
      packed.store(p.out + int64(sequence) * n_out + row);
    }
  }
}
