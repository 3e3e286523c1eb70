// The largest of each row of x weight^T, and where it is, without that product in memory (wgmma: Hopper GPUs only).
//
// A block goes through tiles of ROWS rows of the weight, PROCESSORS tiles apart; the last one may begin before the end of
// the one before, so that it is whole. One warp, behind those that multiply, brings what they need to shared memory, 64
// columns at a time (tensor maps), as many as there are stages, and never waits for a tile's end. A lane keeps the
// largest of its own rows.
//
// Macros: WIDTH, PROCESSORS, GROUPS (64s of sequences: 1, 2 or 4), ROWS (64, 128 or 192), STAGES, EARLY (tiles of the
// weight that are asked for before the kernel before has ended).

constexpr int TILE = 64, STEPS = (WIDTH + TILE - 1) / TILE;
constexpr int WARPGROUPS = GROUPS < 2 ? 1 : 2, EACH = GROUPS / WARPGROUPS;
// Where a lane has two groups' sums, it needs the registers of those that bring: whole groups of four warps give them.
constexpr int MULTIPLIERS = 128 * WARPGROUPS, THREADS = MULTIPLIERS + (EACH > 1 ? 128 : 32);

struct Problem {
  TensorMap x, weight;  // (B, WIDTH) in tiles of 64 GROUPS x 64, (V, WIDTH) in tiles of ROWS x 64
  int64* keys;           // (blocks, B): the largest
  int64 n_rows, height;  // B, V
};
struct Room {
  alignas(1024) bf16 x[STAGES][GROUPS * TILE * TILE], weight[STAGES][ROWS * TILE];
  Gate brought[STAGES], read[STAGES];
};
extern "C" __constant__ int shared_bytes = sizeof(Room) + 1024;

// Two numbers of bfloat16 as integers of 16 bits in their order; NaN, which is one of 0x7fff, stands above all.
INLINE unsigned in_order(unsigned pair) { return pair ^ (signs(pair) & 0x7fff7fff); }
// A number, in order, and its row of the weight: the larger for a larger number, and among equal ones for an earlier row.
INLINE int64 key(int number, int row) { return int64(number) << 32 | unsigned(~row); }
INLINE int64 larger(int64 x, int64 y) { return x > y ? x : y; }
INLINE int64 across(int64 x, int mask) {
  unsigned low = __float_as_uint(across(__uint_as_float(unsigned(x)), mask));
  unsigned high = __float_as_uint(across(__uint_as_float(unsigned(x >> 32)), mask));
  return int64(high) << 32 | low;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) likeliest(const GRID_CONSTANT Problem p) {
  Room& room = *reinterpret_cast<Room*>((reinterpret_cast<unsigned long long>(own_room()) + 1023) / 1024 * 1024);
  int tid = threadIdx.x, lane = tid % 32, n_rows = int(p.n_rows), height = int(p.height);
  int tiles = (height + ROWS - 1) / ROWS, own_tiles = (tiles - int(blockIdx.x) + PROCESSORS - 1) / PROCESSORS;
  int steps = own_tiles * STEPS;
  auto row_of = [&](int tile) {
    int row = (int(blockIdx.x) + tile * PROCESSORS) * ROWS;
    return row < height - ROWS ? row : height - ROWS;
  };
  auto bring_weight = [&](int i) {
    Gate* gate = &room.brought[i % STAGES];
    expect_more(gate, (ROWS + GROUPS * TILE) * TILE * sizeof(bf16));
    bring_tile(room.weight[i % STAGES], &p.weight, i % STEPS * TILE, row_of(i / STEPS), gate);
  };
  auto bring_x = [&](int i) {
    bring_tile(room.x[i % STAGES], &p.x, i % STEPS * TILE, 0, &room.brought[i % STAGES]);
  };
  let_next_begin();
  const int first = steps < STAGES ? steps : STAGES, soon = first < EARLY ? first : EARLY;
  if (tid == MULTIPLIERS) {
    for (int i = 0; i < STAGES; ++i) open(&room.brought[i], 1), open(&room.read[i], MULTIPLIERS / 32);
    all_open();
    for (int i = 0; i < soon; ++i) bring_weight(i);
  }
  __syncthreads();
  wait_for_end_before();
  if (tid >= MULTIPLIERS) {
    if (EACH > 1) fewer_registers<24>();
    if (tid >= MULTIPLIERS + 32) return;
    if (lane == 0)
      for (int i = 0; i < first; ++i) {
        if (i >= soon) bring_weight(i);
        bring_x(i);
      }
    __syncwarp();
    for (int i = first; i < steps; ++i) {
      wait_at(&room.read[i % STAGES], (i / STAGES - 1) % 2);
      if (lane == 0) bring_weight(i), bring_x(i);
    }
    return;
  }
  if (EACH > 1) more_registers<240>();

  // A lane has of each 64 sequences the two 16 warp + lane / 4 + 8 half, and of these the weight's rows
  // 8 j + lane % 4 * 2 and the next: sum[..][4 j + 2 half] and the next.
  int group = tid / 128 * EACH;
  float sum[EACH][ROWS / 2];
  int64 top[EACH][2];
#pragma unroll
  for (int g = 0; g < EACH; ++g) top[g][0] = top[g][1] = key(-1 << 16, 0);
  for (int tile = 0, i = 0; tile < own_tiles; ++tile) {
    for (int step = 0; step < STEPS; ++step, ++i) {
      wait_at(&room.brought[i % STAGES], i / STAGES % 2);
      begin_multiplying();
#pragma unroll
      for (int g = 0; g < EACH; ++g)
        multiply_soon(sum[g], room.x[i % STAGES] + (group + g) * TILE * TILE, room.weight[i % STAGES], step > 0);
      commit();
      all_multiplied_but<1>();
      if (step && lane == 0) arrive(&room.read[(i - 1) % STAGES]);
    }
    all_multiplied_but<0>();
    if (lane == 0) arrive(&room.read[(i - 1) % STAGES]);
    int begin = row_of(tile) + lane % 4 * 2;
#pragma unroll
    for (int g = 0; g < EACH; ++g) {
      read_not_before(sum[g]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int best = -1 << 31;  // in short: a number, and how far its row is from the last that 16 bits could say
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j) {
          unsigned pair = in_order(floats_to_bf16(sum[g][4 * j + 2 * half], sum[g][4 * j + 2 * half + 1]));
          int low = int(pair << 16 | (0xffff - 8 * j)), high = int((pair & 0xffff0000) | (0xfffe - 8 * j));
          best = best > low ? best : low;
          best = best > high ? best : high;
        }
        top[g][half] = larger(top[g][half], key(best >> 16, begin + 0xffff - (best & 0xffff)));
      }
    }
  }
#pragma unroll
  for (int g = 0; g < EACH; ++g)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) top[g][half] = larger(top[g][half], across(top[g][half], mask));
      int b = (group + g) * TILE + tid % 128 / 32 * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && b < n_rows) p.keys[int64(blockIdx.x) * n_rows + b] = top[g][half];
    }
}
