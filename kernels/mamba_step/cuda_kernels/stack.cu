// A token through a Mamba block for up to 64 sequences, in three kernels: enter (norm, in_proj), middle (middle.cu),
// leave (out_proj, added to the stream); begin.cu stands before the first block. Each begins before the last has ended,
// and asks for its weights before it waits for that: see device.cu for what it may read then.
//
// The matrix units multiply 16 rows of a weight with 8 sequences' vectors. A thread block has one or two such bands of
// 16 rows; its warps share out the width, and their sums are added up in shared memory in a fixed order. Which 32
// elements of a row make which step of the matrix units is free, if it is the same for both: so a lane loads 8 that lie
// side by side. Which channel is which row of a band is free, too: so a lane ends up with channels that lie side by
// side. The norm (RMSNorm) is a factor of each sequence, put to in_proj's result.
//
// Letters: B sequences, M model width, E inner width; macros, but B, as are OCTETS (B / 8, rounded up), BLOCKS and
// WARPS (of a block). A kernel has BLOCKS blocks, or as many as there is work for if that is less.

constexpr int THREADS = 32 * WARPS, MOST = 8 * OCTETS;
static_assert(M % 256 == 0 && E % 256 == 0 && THREADS >= 4 * MOST, "sizes not served");

struct Problem {  // what a kernel does not use may be 0
  const bf16 *in_proj, *out_proj;
  const bf16* norm;  // of the next block; 0 if there is none
  float* stream;     // (B, M)
  bf16* scaled;      // (B, M): the stream times the norm's weight
  float* squares;    // (M / 16, MOST): the stream's sums of squares, of 16 channels each
  bf16* uz;          // (B, 2 E)
  bf16* y;           // (B, E)
  double eps;
  int64 n_rows;  // B
};

// BANDS x 16 rows of a matrix of width K, of which a warp has PART blocks of 32 elements; and the block's sums.
template <int K, int BANDS, int COLUMNS> struct Band {
  static_assert(K / 32 % WARPS == 0, "warps that do not share out the width");
  static constexpr int PART = K / 32 / WARPS, NT = COLUMNS / 8, STRIDE = (COLUMNS + 31) / 32 * 32 + 8;
  static INLINE constexpr int most(int n) {
    int d = 8 / BANDS;
    while (n % d) --d;
    return d;
  }
  static constexpr int CHUNK = most(PART);
  struct Room {
    float part[WARPS][16 * BANDS][STRIDE];
  };
  uint4 low[BANDS][CHUNK], high[BANDS][CHUNK];

  // What stands in a row of the bands: so of a lane's rows, four apart, the channels lie side by side.
  static INLINE constexpr int channel(int row) { return row % 4 * 4 * BANDS + row / 4; }
  static INLINE int column(int i, int tid) { return (tid / 32 * PART + i) * 32 + tid % 4 * 8; }
  INLINE void load(const bf16* matrix, int first_row, int chunk, int tid) {
    int g = tid % 32 / 4;
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const bf16* at = matrix + column(chunk * CHUNK + i, tid);
        low[m][i] = once16(at + int64(first_row + channel(m * 16 + g)) * K);
        high[m][i] = once16(at + int64(first_row + channel(m * 16 + 8 + g)) * K);
      }
  }
  // The sums of the block's warps, left in shared memory: part[warp][row][sequence - first].
  INLINE void multiply(const bf16* matrix, int first_row, const bf16* x, int stride, int first, int n_rows, Room& room,
                       int tid) {
    int g = tid % 32 / 4, t = tid % 4, warp = tid / 32;
    float c[BANDS][NT][4];
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j) c[m][j][0] = c[m][j][1] = c[m][j][2] = c[m][j][3] = 0.0f;
    constexpr int DEEP = PART < 20 / NT ? PART : 20 / NT;  // blocks of x on their way
    uint4 b[DEEP][NT];
    auto bring = [&](int i) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        int row = first + j * 8 + g;
        b[i % DEEP][j] = row < n_rows ? fresh16(x + int64(row) * stride + column(i, tid)) : make_uint4(0, 0, 0, 0);
      }
    };
#pragma unroll
    for (int i = 0; i < DEEP; ++i) bring(i);
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      if (i && i % CHUNK == 0) load(matrix, first_row, i / CHUNK, tid);
#pragma unroll
      for (int m = 0; m < BANDS; ++m) {
        const uint4 &v = low[m][i % CHUNK], &w = high[m][i % CHUNK];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const uint4& u = b[i % DEEP][j];
          multiply_add(c[m][j], v.x, w.x, v.y, w.y, u.x, u.y);
          multiply_add(c[m][j], v.z, w.z, v.w, w.w, u.z, u.w);
        }
      }
      if (i + DEEP < PART) bring(i + DEEP);
    }
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(&room.part[warp][m * 16 + half * 8 + g][j * 8 + 2 * t]) =
              float2{c[m][j][2 * half], c[m][j][2 * half + 1]};
    __syncthreads();
  }
  // Of 4 BANDS channels from 4 BANDS * quarter on.
  static INLINE void total(const Room& room, int quarter, int column, float (&sum)[4 * BANDS]) {
#pragma unroll
    for (int k = 0; k < 4 * BANDS; ++k) {
      sum[k] = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum[k] += room.part[w][quarter + 4 * k][column];
    }
  }
};
constexpr int NARROW = OCTETS > 4 ? 4 : OCTETS;  // octets of sequences that a block of `leave` has
typedef Band<M, 2, MOST> Enter;
typedef Band<E, 1, 8 * NARROW> Leave;
struct Shared {
  union {
    Enter::Room enter;
    Leave::Room leave;
  };
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
extern "C" __constant__ int shared_percent = SHARED_PERCENT;
INLINE Shared& shared() { return *reinterpret_cast<Shared*>(own_room()); }

// in_proj and norm: uz.
extern "C" __global__ void __launch_bounds__(THREADS, 1) enter(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  constexpr int UNITS = 2 * E / 32, STEPS = (UNITS + BLOCKS - 1) / BLOCKS, SQUARES = M / 64;  // of each of four lanes
  auto& room = shared().enter;
  Enter band;
  int quarter = tid % 4, b = tid / 4;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x);
    if (unit >= UNITS) return;
    band.load(p.in_proj, unit * 32, 0, tid);
    if (step == 0) wait_for_kernel_before();
    float square[SQUARES];
#pragma unroll
    for (int i = 0; i < SQUARES; ++i)
      square[i] = b < n_rows ? fresh(p.squares + (quarter + 4 * i) * MOST + b) : 0.0f;
    band.multiply(p.in_proj, unit * 32, p.scaled, M, 0, n_rows, room, tid);
    float sum = 0.0f, out[8];
#pragma unroll
    for (int i = 0; i < SQUARES; ++i) sum += square[i];
    sum = add_across(sum, 1);
    sum = add_across(sum, 2);
    if (b < n_rows) {
      float factor = inverse_root(sum / M + float(p.eps));
      Enter::total(room, quarter, b, out);
#pragma unroll
      for (int k = 0; k < 8; ++k) out[k] *= factor;
      Packed<bf16, 8> packed;
      packed.set(out);
      packed.store(p.uz + int64(b) * 2 * E + unit * 32 + quarter * 8);
    }
    if (step + 1 < STEPS) __syncthreads();
  }
}

// out_proj, added to the stream, and what the next norm asks of that.
extern "C" __global__ void __launch_bounds__(THREADS, 1) leave(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  constexpr int COLUMNS = 8 * NARROW, GROUPS = (OCTETS + NARROW - 1) / NARROW, UNITS = M / 16 * GROUPS;
  constexpr int STEPS = (UNITS + BLOCKS - 1) / BLOCKS;
  auto& room = shared().leave;
  let_next_begin();
  Leave band;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x), row = unit / GROUPS * 16, first = unit % GROUPS * COLUMNS;
    if (unit >= UNITS) return;
    band.load(p.out_proj, row, 0, tid);
    // What it is added to was written a layer ago, or by `begin`: before `enter` of this layer went on.
    int column = tid / 4, quarter = tid % 4, b = first + column;
    int64 at = int64(b) * M + row + 4 * quarter;
    bool here = column < COLUMNS && b < n_rows;
    float4 old = here ? fresh4(p.stream + at) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    Packed<bf16, 4> weight;
    if (p.norm) weight.load(p.norm + row + 4 * quarter);
    if (step == 0) wait_for_end_before();
    float square = 0.0f;
    band.multiply(p.out_proj, row, p.y, E, first, n_rows, room, tid);
    if (here) {
      float sum[4], scaled[4];
      Leave::total(room, quarter, column, sum);
      sum[0] += old.x, sum[1] += old.y, sum[2] += old.z, sum[3] += old.w;
      store_floats(p.stream + at, sum);
      if (p.norm) {
#pragma unroll
        for (int k = 0; k < 4; ++k) scaled[k] = sum[k] * weight.get(k);
        Packed<bf16, 4> packed;
        packed.set(scaled);
        packed.store(p.scaled + at);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) square = __fmaf_rn(sum[k], sum[k], square);
    }
    square = add_across(square, 1);
    square = add_across(square, 2);
    if (here && quarter == 0) p.squares[row / 16 * MOST + b] = square;
    if (step + 1 < STEPS) __syncthreads();
  }
}
