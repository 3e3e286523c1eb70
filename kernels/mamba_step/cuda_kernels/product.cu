// out = x weight^T for up to 64 sequences: in_proj and out_proj of wide blocks, as fast as the weights come.
//
// A block has 64 rows of the weight, and a piece of the width where SPLITS blocks share it out: their sums go out as they
// are and are added up where they are read (gather.cu). One warp brings tiles of 64 x 64 to shared memory (tensor maps),
// up to STAGES of them, and asks for weights before the kernel before has ended; four warps multiply (wgmma). The blocks
// of a cluster bring a part of x's tile each, for all of them.
//
// Macros: WIDTH, OUT (rows of the weight), SPLITS, CLUSTER and STAGES.

constexpr int TILE = 64, MULTIPLIERS = 128, THREADS = MULTIPLIERS + 32;
constexpr int STEPS = WIDTH / TILE / SPLITS, FIRST = STEPS < STAGES ? STEPS : STAGES, PART = TILE / CLUSTER;
constexpr int TILE_BYTES = TILE * TILE * sizeof(bf16);
static_assert(WIDTH % (TILE * SPLITS) == 0 && OUT % (TILE * CLUSTER) == 0 && TILE % CLUSTER == 0, "sizes not served");

struct Problem {
  TensorMap x, weight;  // (B, WIDTH) in tiles of PART x 64, (OUT, WIDTH) in tiles of 64 x 64
  bf16* out;            // (B, OUT), where the width is not shared out
  float* sums;          // (SPLITS, B, OUT), where it is
  int64 n_rows;         // B
};
struct Shared {
  alignas(1024) bf16 x[STAGES][TILE * TILE], weight[STAGES][TILE * TILE];
  Gate brought[STAGES], read[STAGES];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;  // what it starts with may have to be passed over

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(THREADS, 1) product(const GRID_CONSTANT Problem p) {
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<unsigned long long>(own_room()) + 1023) / 1024 * 1024);
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  int rank = int(blockIdx.x) % CLUSTER, split = int(blockIdx.x) / (OUT / TILE), n_rows = int(p.n_rows);
  int row = int(blockIdx.x) % (OUT / TILE) * TILE, from = split * STEPS * TILE;
  let_next_begin();
  auto bring_weight = [&](int step) {
    Gate* gate = &s.brought[step % STAGES];
    expect_more(gate, 2 * TILE_BYTES);
    bring_tile(s.weight[step % STAGES], &p.weight, from + step * TILE, row, gate);
  };
  auto bring_x = [&](int step) {
    bf16* to = s.x[step % STAGES] + rank * PART * TILE;
    bring_tile_to_all<CLUSTER>(to, &p.x, from + step * TILE, rank * PART, &s.brought[step % STAGES]);
  };
  if (tid == MULTIPLIERS) {
    for (int i = 0; i < STAGES; ++i) open(&s.brought[i], 1), open(&s.read[i], CLUSTER * MULTIPLIERS / 32);
    all_open();
    for (int i = 0; i < FIRST; ++i) bring_weight(i);
  }
  __syncthreads();
  say_begun();
  wait_for_others();
  wait_for_end_before();

  if (tid >= MULTIPLIERS) {
    if (lane == 0)
      for (int i = 0; i < FIRST; ++i) bring_x(i);
    __syncwarp();
    for (int i = FIRST; i < STEPS; ++i) {
      wait_at(&s.read[i % STAGES], (i / STAGES - 1) % 2);
      if (lane == 0) bring_weight(i), bring_x(i);
    }
  } else {
    float sum[TILE / 2];
#pragma unroll
    for (int i = 0; i < TILE / 2; ++i) sum[i] = 0.0f;
    for (int i = 0; i < STEPS; ++i) {
      wait_at(&s.brought[i % STAGES], i / STAGES % 2);
      multiply_tiles(sum, s.x[i % STAGES], s.weight[i % STAGES]);
      if (i + STAGES < STEPS && lane < CLUSTER) arrive(&s.read[i % STAGES], lane);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int b = warp * 16 + half * 8 + g;
      if (b < n_rows)
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j) {
          float low = sum[4 * j + 2 * half], high = sum[4 * j + 2 * half + 1];
          int64 at = int64(split * n_rows + b) * OUT + row + 8 * j + 2 * t;
          if (SPLITS > 1) *reinterpret_cast<float2*>(p.sums + at) = float2{low, high};
          else *reinterpret_cast<unsigned*>(p.out + at) = floats_to_bf16(low, high);
        }
    }
  }
}
