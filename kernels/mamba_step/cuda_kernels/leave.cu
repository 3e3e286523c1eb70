// The last of the kernels of a block of the stack: out_proj, added to the stream, and what the next norm asks of that. The
// blocks of a cluster share the width out; each adds up and finishes a share of the sequences.
//
// Letters: B sequences, M model width, E inner width; macros, but B, as are OCTETS (B / 8, rounded up), CLUSTER (4) and STAGES.

constexpr int ROWS = 32, SHARE = TILE / CLUSTER, MOST = 8 * OCTETS;
static_assert(E % (TILE * CLUSTER) == 0 && M % ROWS == 0 && SHARE == 16, "sizes not served");
typedef Tiles<ROWS, E / TILE / CLUSTER, STAGES, EARLY, 1> Product;

struct Problem {
  TensorMap y, weight;  // of (B, E); out_proj
  const bf16* norm;     // of the next block; 0 if there is none
  float* stream;        // (B, M)
  bf16* scaled;         // (B, M): the stream times the norm's weight
  float* squares;       // (M / 16, MOST): the stream's sums of squares, of 16 channels each
  int64 n_rows;         // B
};
struct Shared {
  Product::Room room;
  alignas(16) float gathered[CLUSTER][SHARE][ROWS + 4];
  Gate gathering;
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(THREADS, 1) leave(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, n_rows = int(p.n_rows);
  int rank = int(blockIdx.x) % CLUSTER, row = int(blockIdx.x) / CLUSTER * ROWS;
  Shared& s = shared<Shared>();
  Product tiles{s.room, p.y, p.weight, row, rank * (E / CLUSTER), TURNED * (int(blockIdx.x) / CLUSTER)};
  let_next_begin();
  if (tid == 0) expect(&s.gathering, 4 * CLUSTER * SHARE * ROWS);
  tiles.begin();
  // What it is added to was written a layer ago, or by `begin`: before `enter` of this layer went on.
  int seq = tid / 8, c = tid % 8 * 4, b = rank * SHARE + seq;
  int64 at = int64(b) * M + row + c;
  bool here = tid < MULTIPLIERS && b < n_rows;
  float4 old = here ? fresh4(p.stream + at) : float4{0.0f, 0.0f, 0.0f, 0.0f};
  Packed<bf16, 4> weight;
  weight.clear();
  if (p.norm) weight.load(p.norm + row + c);
  wait_for_end_before();
  if (tid >= MULTIPLIERS) return tiles.bring_all();
  float sum[ROWS / 2];
  tiles.multiply(sum);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) {
      float* to = &s.gathered[rank][half * 8 + lane / 4][i / 2 * 8 + lane % 4 * 2 + i % 2];
      push(to, &s.gathering, warp, sum[i / 2 * 4 + 2 * half + i % 2]);
    }
  wait_at(&s.gathering);
  float total[4], scaled[4], square = 0.0f;
  load_floats(&s.gathered[0][seq][c], total);
#pragma unroll
  for (int i = 1; i < CLUSTER; ++i) {
    float part[4];
    load_floats(&s.gathered[i][seq][c], part);
#pragma unroll
    for (int k = 0; k < 4; ++k) total[k] += part[k];
  }
  total[0] += old.x, total[1] += old.y, total[2] += old.z, total[3] += old.w;
#pragma unroll
  for (int k = 0; k < 4; ++k) square = __fmaf_rn(total[k], total[k], square), scaled[k] = total[k] * weight.get(k);
  square = add_across(square, 1);
  square = add_across(square, 2);
  if (!here) return;
  store_floats(p.stream + at, total);
  if (p.norm) {
    Packed<bf16, 4> packed;
    packed.set(scaled);
    packed.store(p.scaled + at);
  }
  if (tid % 4 == 0) p.squares[(row + c) / 16 * MOST + b] = square;
}
