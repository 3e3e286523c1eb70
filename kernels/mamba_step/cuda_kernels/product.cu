// in_proj and out_proj of cuda_wide.py: out = x weight^T for up to 64 sequences, by tiles.cu.
//
// Where SPLITS blocks share the width out, their sums go out as they are and are added up where they are read (gather.cu).
//
// Macros: WIDTH, OUT (rows of the weight), SPLITS, and of tiles.cu STAGES, EARLY and PASSING.

constexpr int ROWS = 64, STEPS = WIDTH / TILE / SPLITS;
static_assert(WIDTH % (TILE * SPLITS) == 0 && OUT % ROWS == 0, "sizes not served");
typedef Tiles<ROWS, STEPS, STAGES, EARLY> Product;

struct Problem {
  TensorMap x, weight;  // of (B, WIDTH), (OUT, WIDTH)
  bf16* out;            // (B, OUT), where the width is not shared out
  float* sums;          // (SPLITS, B, OUT), where it is
  int64 n_rows;         // B
};
extern "C" __constant__ int shared_bytes = sizeof(Product::Room) + 1024;

extern "C" __global__ void __launch_bounds__(Product::THREADS, 1) product(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  int split = int(blockIdx.x) / (OUT / ROWS), row = int(blockIdx.x) % (OUT / ROWS) * ROWS, n_rows = int(p.n_rows);
  Product tiles{shared<Product::Room>(), p.x, p.weight, row, split * STEPS * TILE, int(blockIdx.x)};
  let_next_begin();
  tiles.begin();
  wait_for_end_before();
  if (tid >= Product::MULTIPLIERS) return tiles.bring_all();
  float sum[ROWS / 2];
  tiles.multiply(sum);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int b = warp * 16 + half * 8 + lane / 4;
    if (b < n_rows)
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j) {
        float low = sum[4 * j + 2 * half], high = sum[4 * j + 2 * half + 1];
        int64 at = int64(split * n_rows + b) * OUT + row + 8 * j + lane % 4 * 2;
        if (SPLITS > 1) *reinterpret_cast<float2*>(p.sums + at) = float2{low, high};
        else *reinterpret_cast<unsigned*>(p.out + at) = floats_to_bf16(low, high);
      }
  }
}
