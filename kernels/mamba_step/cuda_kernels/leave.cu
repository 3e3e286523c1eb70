// `leave` of stack.cu for more sequences, by tiles.cu: some rows of out_proj for 64 or 128 sequences a block; of a wide
// block a pair of blocks of threads, each of which has half of E and in the end half of the sequences.
//
// Letters: B sequences, M model width, E inner width; macros, but B, as are ROWS and SEQUENCES (of a block), CLUSTER (one
// or two), MOST, and of tiles.cu STAGES, EARLY and PASSING.

static_assert(E % (TILE * CLUSTER) == 0 && M % ROWS == 0 && (CLUSTER == 1 || CLUSTER == 2), "sizes not served");
typedef Tiles<ROWS, E / TILE / CLUSTER, STAGES, EARLY, SEQUENCES> Product;
constexpr int HALVES = 2 / CLUSTER;  // of a lane's two sequences, which are its block's in the end

struct Problem {
  TensorMap y, weight;  // (B, E), what the gate leaves; out_proj
  const bf16* norm;     // of the next block; 0 if there is none
  float* stream;        // (B, M)
  bf16* scaled;         // (B, M): the stream times the norm's weight
  float* squares;       // (M / ROWS, MOST): the stream's sums of squares, of ROWS channels each
  int64 n_rows;         // B
};
struct Shared {
  Product::Room tiles;
  float others[CLUSTER > 1 ? ROWS / 4 : 1][Product::MULTIPLIERS];  // the other block's sums of this one's sequences
  Gate gathering;
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;
extern "C" __constant__ int shared_percent = SHARED_PERCENT;

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(Product::THREADS, 1) leave(const GRID_CONSTANT Problem p) {
  Shared& s = shared<Shared>();
  int tid = threadIdx.x, lane = tid % 32, t = lane % 4, n_rows = int(p.n_rows), rank = int(blockIdx.x) % CLUSTER;
  Product tiles = Product::of_block(s.tiles, p.y, p.weight, n_rows, int(blockIdx.x) / CLUSTER);
  tiles.column = E / CLUSTER * rank;
  let_next_begin();
  if (CLUSTER > 1) {
    if (tid == 0) expect(&s.gathering, ROWS / 4 * Product::MULTIPLIERS * sizeof(float));
    __syncwarp();
    say_begun();
  }
  tiles.begin();
  if (tid >= Product::MULTIPLIERS) {
    wait_for_end_before();
    tiles.bring_all();
    if (CLUSTER > 1) {  // who has said that it has begun has to wait for the others, too
      __syncwarp();
      wait_for_others();
    }
    return;
  }
  // What it is added to was written a layer ago, or by `begin`: before `enter` of this layer went on.
  int row = tiles.row, first = tiles.sequence + tid / 32 * 16 + lane / 4 + rank * 8;
  auto place = [&](int half, int j) { return int64(first + half * 8) * M + row + 8 * j + t * 2; };
  float2 old[HALVES][ROWS / 8];
  Packed<bf16, 2> weight[ROWS / 8];
#pragma unroll
  for (int j = 0; j < ROWS / 8; ++j) {
    weight[j].clear();
    if (p.norm) weight[j].load(p.norm + row + 8 * j + t * 2);
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      old[half][j] = first + half * 8 < n_rows ? fresh_pair(p.stream + place(half, j)) : float2{0.0f, 0.0f};
  }
  wait_for_end_before();
  float sum[ROWS / 2];
  tiles.multiply(sum);
  if (CLUSTER > 1) {
    wait_for_others();
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) {
      float &low = sum[i / 2 * 4 + i % 2], &high = sum[i / 2 * 4 + 2 + i % 2];
      push(&s.others[i][tid], &s.gathering, 1 - rank, rank ? low : high);
      if (rank) low = high;
    }
    wait_at(&s.gathering);
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) sum[i / 2 * 4 + i % 2] += s.others[i][tid];
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    float square = 0.0f;
    bool here = first + half * 8 < n_rows;
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
      float low = sum[4 * j + 2 * half] + old[half][j].x, high = sum[4 * j + 2 * half + 1] + old[half][j].y;
      square = __fmaf_rn(low, low, __fmaf_rn(high, high, square));
      if (!here) continue;
      *reinterpret_cast<float2*>(p.stream + place(half, j)) = float2{low, high};
      if (p.norm)
        *reinterpret_cast<unsigned*>(p.scaled + place(half, j)) =
            floats_to_bf16(low * weight[j].get(0), high * weight[j].get(1));
    }
    square = add_across(square, 1);
    square = add_across(square, 2);
    if (here && t == 0) p.squares[row / ROWS * MOST + first + half * 8] = square;
  }
}
