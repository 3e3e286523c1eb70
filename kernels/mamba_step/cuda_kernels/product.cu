// out (B, V) = x (B, M) weight (V, M)' for up to 64 rows of x and a matrix that is read once: the head of a language model.
//
// The matrix units multiply 16 rows of the matrix with 8 rows of x. A block's warps share out the width, so that a warp's
// share of x stays in its registers while the matrix passes by, and their sums are added up in shared memory in a fixed
// order. Which 32 elements of a row make which step of the matrix units is free, if it is the same for both: so a lane
// loads 8 that lie side by side; its own, of RING bands of 16 rows, wait in shared memory for it alone. Which row is which
// of a band is free, too: so that a lane ends up with four that lie side by side. Of a width of which a block could not
// hold x the CLUSTER blocks of a cluster share out the width; the band's sums are added up in one of them, by turns.
//
// Macros: M, OCTETS (B / 8, rounded up), BLOCKS, WARPS (of a block), CLUSTER, RING.

constexpr int THREADS = 32 * WARPS, ROWS = 8 * OCTETS, PART = M / CLUSTER / 32 / WARPS, STRIDE = (ROWS + 31) / 32 * 32 + 8;
static_assert(M % (32 * WARPS * CLUSTER) == 0 && BLOCKS % CLUSTER == 0 && THREADS >= 4 * ROWS, "sizes not served");

struct Problem {
  const bf16 *weight, *x;
  bf16* out;
  int64 n_rows, n_out;  // B, V
};
struct Shared {
  uint4 weights[RING][PART][2][THREADS];
  float part[CLUSTER > 1 ? 1 : 2][WARPS][16][STRIDE];
  float4 gathered[CLUSTER > 1 ? 2 : 1][CLUSTER][CLUSTER > 1 ? THREADS : 1];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(THREADS, 1) product(const GRID_CONSTANT Problem p) {
  Shared& s = *reinterpret_cast<Shared*>(own_room());
  int tid = threadIdx.x, g = tid % 32 / 4, t = tid % 4, warp = tid / 32, n_rows = int(p.n_rows), n_out = int(p.n_out);
  constexpr int STEP = BLOCKS / CLUSTER;
  int rank = int(blockIdx.x) % CLUSTER, cluster = int(blockIdx.x) / CLUSTER;
  int units = (n_out + 15) / 16, turns = (units - cluster + STEP - 1) / STEP;
  int column = (rank * WARPS + warp) * PART * 32 + t * 8;
  if (CLUSTER > 1) cluster_arrive();
  if (EARLY) let_next_begin();
  auto fetch = [&](int turn) {
    if (turn < turns) {
      int first = (turn * STEP + cluster) * 16;
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
  auto store = [&](int turn, const float (&sum)[4]) {
    int row = (turn * STEP + cluster) * 16 + t * 4, sequence = tid / 4;
    if (sequence < n_rows && row < n_out) {
      Packed<bf16, 4> packed;
      packed.set(sum);
      packed.store(p.out + int64(sequence) * n_out + row);
    }
  };
  auto finish = [&](int turn) {
    if (turn % CLUSTER != rank) return;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
      float4 share = s.gathered[turn % 2][i][tid];
      sum[0] += share.x, sum[1] += share.y, sum[2] += share.z, sum[3] += share.w;
    }
    store(turn, sum);
  };
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
    if (CLUSTER > 1) cluster_wait();  // the blocks have begun, or are through with the turn before
    auto& part = s.part[CLUSTER > 1 ? 0 : turn % 2];
#pragma unroll
    for (int j = 0; j < OCTETS; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(&part[warp][half * 8 + g][j * 8 + 2 * t]) = float2{c[j][2 * half], c[j][2 * half + 1]};
    __syncthreads();
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (tid / 4 < ROWS) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum[k] += part[w][t + 4 * k][tid / 4];
    }
    if (CLUSTER == 1) {
      store(turn, sum);
    } else {
      if (turn) finish(turn - 1);
      push(&s.gathered[turn % 2][rank][tid], turn % CLUSTER, float4{sum[0], sum[1], sum[2], sum[3]});
      cluster_arrive();
    }
  }
  if (CLUSTER > 1) {
    cluster_wait();
    if (turns) finish(turns - 1);
  }
}
