// in_proj of cuda_wide.py for more sequences, by tiles.cu: out = x weight^T for all of them.
//
// A pair of blocks of threads has some rows of the weight. Each of the two has half of the width, so that it reads half
// of x, and in the end half of the sequences.
//
// Macros: WIDTH, OUT (rows of the weight), SEQUENCES (that there is room for), ROWS (of a pair), CLUSTER (two), and of
// tiles.cu STAGES, EARLY and PASSING.

constexpr int STEPS = WIDTH / TILE / CLUSTER, HALF = SEQUENCES / 2;
static_assert(CLUSTER == 2 && WIDTH % (TILE * CLUSTER) == 0 && OUT % ROWS == 0 && HALF % 32 == 0, "sizes not served");
typedef Tiles<ROWS, STEPS, STAGES, EARLY, SEQUENCES, true> Product;

struct Problem {
  TensorMap x, weight;  // of (B, WIDTH), (OUT, WIDTH)
  bf16* out;            // (B, OUT)
  int64 n_rows;         // B
};
struct Sums {  // where the tiles were
  float others[HALF / 2][Product::MULTIPLIERS];  // the other block's of this one's sequences
  alignas(16) bf16 out[HALF][ROWS + 8];          // so that lanes meet in no bank
};
struct Shared {
  union {
    Product::Room tiles;
    Sums sums;
  };
  Gate gathering;
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(Product::THREADS, 1)
    product(const GRID_CONSTANT Problem p) {
  Shared& s = shared<Shared>();
  int tid = threadIdx.x, lane = tid % 32, warp = uniform(tid / 32), n_rows = int(p.n_rows);
  int rank = int(blockIdx.x) % CLUSTER, pair = int(blockIdx.x) / CLUSTER;
  Product tiles{s.tiles, p.x, p.weight, pair * ROWS, rank * STEPS * TILE, pair};
  let_next_begin();
  if (tid == 0) expect(&s.gathering, sizeof(s.sums.others));
  tiles.begin();
  wait_for_end_before();
  float sum[Product::SUMS];
  if (tid >= Product::MULTIPLIERS) tiles.bring_all();
  else tiles.multiply(sum);
  __syncwarp();
  say_begun();  // in fact: is done with its tiles
  wait_for_others();
  if (tid < Product::MULTIPLIERS) {
#pragma unroll
    for (int i = 0; i < HALF / 2; ++i) {
      push(&s.sums.others[i][tid], &s.gathering, 1 - rank, rank ? sum[i] : sum[i + HALF / 2]);
      if (rank) sum[i] = sum[i + HALF / 2];
    }
    wait_at(&s.gathering);
#pragma unroll
    for (int i = 0; i < HALF / 2; ++i) {
      float total = sum[i] + s.sums.others[i][tid];
      s.sums.out[i / 4 * 8 + lane % 4 * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + lane / 4].bits =
          (unsigned short)floats_to_bf16(total, 0.0f);
    }
  }
  __syncthreads();
  constexpr int PIECES = ROWS / 8;  // of 16 bytes
  for (int i = tid; i < HALF * PIECES; i += Product::THREADS) {
    int row = i / PIECES, b = rank * HALF + row;
    if (b < n_rows)
      *reinterpret_cast<uint4*>(p.out + int64(b) * OUT + pair * ROWS + i % PIECES * 8) =
          *reinterpret_cast<const uint4*>(&s.sums.out[row][i % PIECES * 8]);
  }
}
