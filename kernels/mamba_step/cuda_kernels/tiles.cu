// The sums of a product x weight^T for 64 or 128 sequences, as fast as the weights come (wgmma: Hopper GPUs only).
//
// A block of threads has some rows of the weight. One warp, behind those that multiply (four for 64 sequences), brings
// tiles of 64 columns to shared memory (tensor maps), as many as there are stages, and some of the weights before the
// kernel before has ended. (Blocks that share tiles by multicast take as long.)
//
// PASSING, a macro: whether the weight is to be the first to leave the L2 cache.

constexpr int TILE = 64;

template <int rows, int steps, int stages, int early, int sequences = 64> struct Tiles {
  static constexpr int MULTIPLIERS = 2 * sequences, THREADS = MULTIPLIERS + 32;
  static constexpr int FIRST = steps < stages ? steps : stages, SOON = FIRST < early ? FIRST : early;
  static_assert(stages > 2, "sizes not served");
  struct Room {
    alignas(1024) bf16 x[stages][sequences * TILE], weight[stages][rows * TILE];
    Gate brought[stages], read[stages];
  };
  Room& room;
  const TensorMap &x, &weight;  // (B, width) in tiles of sequences x 64, (rows, width) in tiles of rows x 64
  int row, column;              // that the block begins with
  int turn;                     // the tile of the width that it begins with: not all with the same
  int sequence = 0;             // likewise

  // That of this block (a pair counts as one): neighbours have the same rows of the weight, as many as it takes for all
  // sequences.
  static INLINE Tiles of_block(Room& room, const TensorMap& x, const TensorMap& weight, int n_rows, int block) {
    int groups = (n_rows + sequences - 1) / sequences, row_block = block / groups;
    return {room, x, weight, row_block * rows, 0, row_block, block % groups * sequences};
  }
  INLINE int column_of(int step) const { return column + (step + turn) % steps * TILE; }
  INLINE void bring_weight(int step) const {
    Gate* gate = &room.brought[step % stages];
    expect_more(gate, (sequences + rows) * TILE * sizeof(bf16));
    bf16* to = room.weight[step % stages];
    if constexpr (PASSING) bring_tile(to, &weight, column_of(step), row, gate, first_to_leave());
    else bring_tile(to, &weight, column_of(step), row, gate);
  }
  INLINE void bring_x(int step) const {
    bring_tile(room.x[step % stages], &x, column_of(step), sequence, &room.brought[step % stages]);
  }
  // By all threads, before the kernel before has ended.
  INLINE void begin() const {
    if (threadIdx.x == MULTIPLIERS) {
      for (int i = 0; i < stages; ++i) open(&room.brought[i], 1), open(&room.read[i], MULTIPLIERS / 32);
      all_open();
      for (int i = 0; i < SOON; ++i) bring_weight(i);
    }
    __syncthreads();
  }
  // By the last warp, when x is there.
  INLINE void bring_all() const {
    int lane = threadIdx.x % 32;
    if (lane == 0)
      for (int i = 0; i < FIRST; ++i) {
        if (i >= SOON) bring_weight(i);
        bring_x(i);
      }
    __syncwarp();
    for (int i = FIRST; i < steps; ++i) {
      wait_at(&room.read[i % stages], (i / stages - 1) % 2);
      if (lane == 0) bring_weight(i), bring_x(i);
    }
  }
  // By the others. A lane has of sequences 16 warp + lane / 4 and 8 more (half) the rows 8 j + lane % 4 * 2 and the next:
  // sum[4 j + 2 half] and the next.
  INLINE void multiply(float (&sum)[rows / 2]) const {
    int lane = threadIdx.x % 32, own = threadIdx.x / 128 * TILE * TILE;
    for (int i = 0; i < steps; ++i) {
      wait_at(&room.brought[i % stages], i / stages % 2);
      begin_multiplying();
      multiply_soon(sum, room.x[i % stages] + own, room.weight[i % stages], i > 0);
      commit();
      all_multiplied_but<1>();  // so that the next tile is there for the matrix units when they are done with this one
      if (i > 0 && i - 1 + stages < steps && lane == 0) arrive(&room.read[(i - 1) % stages]);
    }
    all_multiplied_but<0>();
    read_not_before(sum);
  }
};

// Shared memory from a multiple of 1,024 bytes on; `shared_bytes` has as much more.
template <typename Shared> INLINE Shared& shared() {
  return *reinterpret_cast<Shared*>((reinterpret_cast<unsigned long long>(own_room()) + 1023) / 1024 * 1024);
}
