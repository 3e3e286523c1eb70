// `enter` of stack.cu for more sequences, by tiles.cu: some rows of in_proj for 64 or 128 sequences a block.
//
// Letters: B sequences, M model width, E inner width; macros, but B, as are ROWS and SEQUENCES (of a block), PARTS and
// MOST, and of tiles.cu STAGES, EARLY and PASSING.

static_assert(M % TILE == 0 && 2 * E % ROWS == 0 && PARTS % 4 == 0, "sizes not served");
typedef Tiles<ROWS, M / TILE, STAGES, EARLY, SEQUENCES> Product;

struct Problem {
  TensorMap x, weight;   // of the stream times the norm's weight (B, M); in_proj
  const float* squares;  // (PARTS, MOST): the stream's sums of squares, of M / PARTS channels each
  bf16* uz;              // (B, 2 E)
  double eps;
  int64 n_rows;  // B
};
extern "C" __constant__ int shared_bytes = sizeof(Product::Room) + 1024;
extern "C" __constant__ int shared_percent = SHARED_PERCENT;

extern "C" __global__ void __launch_bounds__(Product::THREADS, 1) enter(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, lane = tid % 32, t = lane % 4, n_rows = int(p.n_rows);
  Product tiles = Product::of_block(shared<Product::Room>(), p.x, p.weight, n_rows, int(blockIdx.x));
  tiles.begin();
  wait_for_kernel_before();
  if (tid >= Product::MULTIPLIERS) return tiles.bring_all();
  float square[2][PARTS / 4], sum[ROWS / 2];
  int row = tiles.row, first = tiles.sequence + tid / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < PARTS / 4; ++i) {
      int b = first + half * 8;
      square[half][i] = b < n_rows ? fresh(p.squares + (t + 4 * i) * MOST + b) : 0.0f;
    }
  tiles.multiply(sum);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int b = first + half * 8;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS / 4; ++i) total += square[half][i];
    total = add_across(total, 1);
    total = add_across(total, 2);
    float factor = inverse_root(total / M + float(p.eps));
    if (b < n_rows)
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j)
        *reinterpret_cast<unsigned*>(p.uz + int64(b) * 2 * E + row + 8 * j + t * 2) =
            floats_to_bf16(sum[4 * j + 2 * half] * factor, sum[4 * j + 2 * half + 1] * factor);
  }
}
