// A token through a Mamba block for up to 64 sequences, in four kernels: enter (norm, in_proj, convolution), project
// (x_proj), scan (dt_proj, states, gate), leave (out_proj, added to the stream); begin stands before the first block.
// Each begins before the last has ended, and asks for its weights and states before it waits for that.
//
// The matrix units multiply 16 rows of a weight with 8 sequences' vectors. A thread block has one or two such bands of
// 16 rows; its warps share out the width, and their sums are added up in shared memory in a fixed order. Which 32
// elements of a row make which step of the matrix units is free, if it is the same for both: so a lane loads 8 that lie
// side by side. The norm (RMSNorm) is a factor of each sequence, put to in_proj's result.
//
// Letters: B sequences, M model width, E inner width, R rank of dt, N states (16), W convolution width; macros, but B,
// as are OCTETS (B / 8, rounded up), BLOCKS and WARPS (of a block). A kernel has BLOCKS blocks, or as many as there is
// work for if that is less.

constexpr int N = 16, OUT = R + 2 * N, THREADS = 32 * WARPS, MOST = 8 * OCTETS, PAD = 1;
static_assert(M % 256 == 0 && E % 256 == 0 && R % 16 == 0 && THREADS >= 4 * MOST, "sizes not served");

struct Problem {
  const bf16 *in_proj, *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D, *out_proj;  // conv_bias may be 0
  const bf16* norm;   // of the next block, or of the first one where this begins; 0 if there is none
  const bf16* x;      // (B, M): what the stack begins with
  bf16* conv_state;   // (B, E, W - 1)
  float* ssm_state;   // (B, E, N)
  float* stream;      // (B, M)
  bf16* scaled;       // (B, M): the stream times the norm's weight
  float* squares;     // (M / 16, MOST): the stream's sums of squares, of 16 channels each
  bf16* uz;           // (B, 2 E)
  float* low;         // (B, OUT): dt before its widening, B, C
  bf16* y;            // (B, E)
  double eps;
  int64 n_rows;  // B
};
struct Shared {
  union {
    float part[WARPS][32][MOST + PAD];
    struct {
      float dt[16][9], matrices[8][2 * N];  // B and C
    } scan[WARPS];
  };
  float factor[MOST], sums[WARPS];
};
constexpr int FOLDED = WARPS * 32 * ((MOST + 31) / 32 * 32 + 8) * 4;
extern "C" __constant__ int shared_bytes = sizeof(Shared) > FOLDED ? sizeof(Shared) : FOLDED;
INLINE Shared& shared() {
  extern __shared__ float4 room[];
  return *reinterpret_cast<Shared*>(room);
}

INLINE float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
INLINE float softplus(float x) { return softplus_of(x, exp_negative(-fabsf(x))); }
INLINE void put(bf16* to, float x) { to->bits = (unsigned short)floats_to_bf16(x, 0.0f); }

// The convolution of one channel, its SiLU, and the step of its window, the W - 1 inputs before.
struct Convolution {
  float tap[W], bias;

  INLINE void load(const Problem& p, int e) {
    bias = p.conv_bias ? one(p.conv_bias + e) : 0.0f;
#pragma unroll
    for (int k = 0; k < W; ++k) tap[k] = one(p.conv + e * W + k);
  }
  INLINE float run(float newest, const float (&window)[W - 1], bf16* state) const {
    float mixed = __fmaf_rn(newest, tap[W - 1], bias);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) mixed = __fmaf_rn(window[k], tap[k], mixed);
#pragma unroll
    for (int k = 1; k < W - 1; ++k) put(state + k - 1, window[k]);
    put(state + W - 2, newest);
    return mixed * sigmoid(mixed);
  }
};

// BANDS x 16 rows of a matrix of width K, of which this warp has PART blocks of 32 elements.
template <int K, int BANDS> struct Band {
  static_assert(K / 32 % WARPS == 0, "warps that do not share out the width");
  static INLINE constexpr int most(int n) {
    int d = 8 / BANDS;
    while (n % d) --d;
    return d;
  }
  static constexpr int PART = K / 32 / WARPS, CHUNK = most(PART);
  uint4 low[BANDS][CHUNK], high[BANDS][CHUNK];

  static INLINE int column(int i, int tid) { return (tid / 32 * PART + i) * 32 + tid % 4 * 8; }
  INLINE void load(const bf16* matrix, int first_row, int chunk, int tid) {
    int g = tid % 32 / 4;
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const bf16* at = matrix + int64(first_row + m * 16 + g) * K + column(chunk * CHUNK + i, tid);
        low[m][i] = once16(at), high[m][i] = once16(at + 8 * K);
      }
  }
  // The sums of the block's warps, left in shared memory: part[warp][row][sequence - first].
  template <int NT>
  INLINE void multiply(const bf16* matrix, int first_row, const bf16* x, int stride, int first, int n_rows, Shared& s,
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
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int m = 0; m < BANDS; ++m) {
          const uint4 &v = low[m][i % CHUNK], &w = high[m][i % CHUNK], &u = b[i % DEEP][j];
          multiply_add(c[m][j], v.x, w.x, v.y, w.y, u.x, u.y);
          multiply_add(c[m][j], v.z, w.z, v.w, w.w, u.z, u.w);
        }
      if (i + DEEP < PART) bring(i + DEEP);
    }
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) s.part[warp][m * 16 + g + k / 2 * 8][j * 8 + 2 * t + k % 2] = c[m][j][k];
    __syncthreads();
  }
};
INLINE float total(const Shared& s, int row, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += s.part[w][row][column];
  return sum;
}

// The stream and what in_proj reads of it, at the beginning.
extern "C" __global__ void __launch_bounds__(THREADS, 1) begin(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  Shared& s = shared();
  wait_for_kernel_before();
#pragma unroll 1
  for (int b = blockIdx.x; b < n_rows; b += BLOCKS) {
    float sum = 0.0f;
    for (int d = tid; d < M; d += THREADS) {
      float x = one(p.x + int64(b) * M + d);
      p.stream[int64(b) * M + d] = x;
      put(p.scaled + int64(b) * M + d, x * one(p.norm + d));
      sum = __fmaf_rn(x, x, sum);
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum = add_across(sum, mask);
    if (tid % 32 == 0) s.sums[tid / 32] = sum;
    __syncthreads();
    for (int i = tid; i < M / 16; i += THREADS) {
      sum = 0.0f;
      if (i == 0)
        for (int w = 0; w < WARPS; ++w) sum += s.sums[w];
      p.squares[i * MOST + b] = sum;
    }
    __syncthreads();
  }
}

// BANDS x 16 rows of a matrix of width K, of which a warp has PART blocks of 32 elements; and the block's sums.
template <int K, int BANDS, int COLUMNS> struct Folded {
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

  // The row of a band of 16 or pair of bands that stands for this channel's place: of a lane's rows, four apart, the
  // channels lie side by side.
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
typedef Folded<M, 2, MOST> Enter;
typedef Folded<E, 1, 8 * NARROW> Leave;

// The last W - 1 inputs of 8 channels, or their W taps, as they lie in memory.
template <int K> struct Eight {
  Packed<bf16, 8> words[K];
  INLINE void load(const bf16* from) {
#pragma unroll
    for (int i = 0; i < K; ++i) words[i].load(from + 8 * i);
  }
  INLINE float get(int channel, int k) const { return words[(channel * K + k) / 8].get((channel * K + k) % 8); }
};

// in_proj, norm, convolution: uz.
extern "C" __global__ void __launch_bounds__(THREADS, 1) enter(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  constexpr int ROWS = 16 * 2, UNITS = 2 * E / ROWS, STEPS = (UNITS + BLOCKS - 1) / BLOCKS, SQUARES = M / 64;  // of each of four lanes
  auto& room = *reinterpret_cast<Enter::Room*>(&shared());
  Enter band;
  int quarter = tid % 4, b = tid / 4;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x);
    if (unit >= UNITS) return;
    band.load(p.in_proj, unit * ROWS, 0, tid);
    // Of the thread's 8 channels of a sequence, unless these are the gate's.
    int e = unit * ROWS + quarter * 8;
    bool convolves = e < E && b < n_rows;
    bf16* state = p.conv_state + (int64(b) * E + e) * (W - 1);
    Eight<W - 1> past;
    Eight<W> taps;
    Packed<bf16, 8> shift;
    shift.clear();
    if (convolves) {
      past.load(state), taps.load(p.conv + e * W);
      if (p.conv_bias) shift.load(p.conv_bias + e);
    }
    if (step == 0) wait_for_kernel_before();
    float square[SQUARES];
#pragma unroll
    for (int i = 0; i < SQUARES; ++i)
      square[i] = b < n_rows ? fresh(p.squares + (quarter + 4 * i) * MOST + b) : 0.0f;
    band.multiply(p.in_proj, unit * ROWS, p.scaled, M, 0, n_rows, room, tid);
    float sum = 0.0f, out[ROWS / 4];
#pragma unroll
    for (int i = 0; i < SQUARES; ++i) sum += square[i];
    sum = add_across(sum, 1);
    sum = add_across(sum, 2);
    if (b < n_rows) {
      float factor = inverse_root(sum / M + float(p.eps));
      Enter::total(room, quarter, b, out);
#pragma unroll
      for (int k = 0; k < ROWS / 4; ++k) out[k] *= factor;
      if (convolves) {
        float next[8];
#pragma unroll
        for (int i = 0; i < W - 1; ++i) {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            int at = i * 8 + k, channel = at / (W - 1), tap = at % (W - 1);
            next[k] = tap < W - 2 ? past.get(channel, (tap + 1) % (W - 1)) : out[channel];
          }
          Packed<bf16, 8> moved;
          moved.set(next);
          moved.store(state + 8 * i);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          float mixed = __fmaf_rn(out[k], taps.get(k, W - 1), shift.get(k));
#pragma unroll
          for (int w = 0; w < W - 1; ++w) mixed = __fmaf_rn(past.get(k, w), taps.get(k, w), mixed);
          out[k] = mixed * sigmoid(mixed);
        }
      }
      Packed<bf16, ROWS / 4> packed;
      packed.set(out);
      packed.store(p.uz + int64(b) * 2 * E + unit * ROWS + quarter * (ROWS / 4));
    }
    if (step + 1 < STEPS) __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) project(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  constexpr int BANDS = OUT / 16, UNITS = BANDS * OCTETS, STEPS = (UNITS + BLOCKS - 1) / BLOCKS;
  Shared& s = shared();
  let_next_begin();
  Band<E, 1> band;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x), row = unit / OCTETS * 16, first = unit % OCTETS * 8;
    if (unit >= UNITS) return;
    band.load(p.x_proj, row, 0, tid);
    if (step == 0) wait_for_end_before();
    band.template multiply<1>(p.x_proj, row, p.uz, 2 * E, first, n_rows, s, tid);
    if (tid < 128) {
      int b = first + tid / 16, o = tid % 16;
      if (b < n_rows) p.low[b * OUT + row + o] = total(s, o, tid / 16);
    }
    if (step + 1 < STEPS) __syncthreads();
  }
}

// dt's wide projection, a step of the state, gate: y. A warp has 16 channels of 8 sequences, a lane half a channel.
extern "C" __global__ void __launch_bounds__(THREADS, 1) scan(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  constexpr int UNITS = E / 16 * OCTETS, STEPS = (UNITS + WARPS * BLOCKS - 1) / (WARPS * BLOCKS), DEEP = (R + 31) / 32;
  Shared& s = shared();
  let_next_begin();
  int lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4, half = QUARTERS ? lane % 2 * 4 : lane % 2 * 8;
  constexpr int SECOND = QUARTERS ? 8 : 4;  // the second four states of a lane
  auto& own = s.scan[warp];
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = (step * WARPS + warp) * BLOCKS + int(blockIdx.x), first = unit % OCTETS * 8;
    bool valid = unit < UNITS;
    int channel = valid ? unit / OCTETS * 16 : 0, e = channel + lane / 2, n_here = valid ? n_rows - first : 0;
    float h[8][8], A2[8], dt[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float* state = p.ssm_state + (int64(first) * E + channel) * N + lane / 2 * N + half;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < n_here) {
        float4 a = *reinterpret_cast<const float4*>(state + int64(j) * E * N);
        float4 b = *reinterpret_cast<const float4*>(state + int64(j) * E * N + SECOND);
        h[j][0] = a.x, h[j][1] = a.y, h[j][2] = a.z, h[j][3] = a.w;
        h[j][4] = b.x, h[j][5] = b.y, h[j][6] = b.z, h[j][7] = b.w;
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) h[j][k] = 0.0f;
      }
    uint4 low[DEEP], high[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      low[i] = high[i] = make_uint4(0, 0, 0, 0);
      if (i * 32 + t * 8 < R) {
        low[i] = once16(p.dt_proj + int64(channel + g) * R + i * 32 + t * 8);
        high[i] = once16(p.dt_proj + int64(channel + g + 8) * R + i * 32 + t * 8);
      }
    }
    Packed<bf16, 4> logs[2];
    logs[0].load(p.A_log + int64(e) * N + half), logs[1].load(p.A_log + int64(e) * N + half + SECOND);
#pragma unroll
    for (int k = 0; k < 8; ++k) A2[k] = -exp2_fast(logs[k / 4].get(k % 4) * LOG2E) * LOG2E;
    float bias = one(p.dt_bias + e), skip = one(p.D + e);
    if (step == 0) wait_for_end_before();
    // All that the kernels before have written, at once.
    float4 wide[DEEP][2];
#pragma unroll
    for (int i = 0; i < DEEP; ++i)
      if (i * 32 + t * 8 < R && g < n_here) {
        const float* from = p.low + (first + g) * OUT + i * 32 + t * 8;
        wide[i][0] = fresh4(from), wide[i][1] = fresh4(from + 4);
      } else {
        wide[i][0] = wide[i][1] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      }
    if (g < n_here) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float4*>(&own.matrices[g][t * 8 + i * 4]) =
            fresh4(p.low + (first + g) * OUT + R + t * 8 + i * 4);
    }
    const bf16* uz = p.uz + int64(first) * 2 * E + e;
    unsigned u_of[8], gate_of[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      u_of[j] = j < n_here ? fresh2(uz + int64(j) * 2 * E) : 0;
      gate_of[j] = j < n_here ? fresh2(uz + int64(j) * 2 * E + E) : 0;
    }
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      const float4 &x = wide[i][0], &y = wide[i][1];
      uint4 b = make_uint4(floats_to_bf16(x.x, x.y), floats_to_bf16(x.z, x.w), floats_to_bf16(y.x, y.y),
                           floats_to_bf16(y.z, y.w));
      multiply_add(dt, low[i].x, high[i].x, low[i].y, high[i].y, b.x, b.y);
      multiply_add(dt, low[i].z, high[i].z, low[i].w, high[i].w, b.z, b.w);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) own.dt[g + k / 2 * 8][2 * t + k % 2] = dt[k];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float out = 0.0f, u = low_half(u_of[j]), gate = low_half(gate_of[j]);
      if (j < n_here) {
        float drive[2][4], readout[2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          load_floats(&own.matrices[j][half + k * SECOND], drive[k]);
          load_floats(&own.matrices[j][N + half + k * SECOND], readout[k]);
        }
        float size = softplus(own.dt[lane / 2][j] + bias), driven = size * u;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          h[j][k] = __fmaf_rn(exp2_fast(size * A2[k]), h[j][k], driven * drive[k / 4][k % 4]);
          out = __fmaf_rn(h[j][k], readout[k / 4][k % 4], out);
        }
        *reinterpret_cast<float4*>(state + int64(j) * E * N) = float4{h[j][0], h[j][1], h[j][2], h[j][3]};
        *reinterpret_cast<float4*>(state + int64(j) * E * N + SECOND) = float4{h[j][4], h[j][5], h[j][6], h[j][7]};
      }
      out = add_across(out, 1);
      if (j < n_here && lane % 2 == 0)
        put(p.y + int64(first + j) * E + e, __fmaf_rn(skip, u, out) * gate * sigmoid(gate));
    }
    if (step + 1 < STEPS) __syncwarp();
  }
}

// out_proj, added to the stream, and what the next norm asks of that.
extern "C" __global__ void __launch_bounds__(THREADS, 1) leave(const GRID_CONSTANT Problem p) {
  int tid = threadIdx.x, n_rows = int(p.n_rows);
  constexpr int COLUMNS = 8 * NARROW, GROUPS = (OCTETS + NARROW - 1) / NARROW, UNITS = M / 16 * GROUPS;
  constexpr int STEPS = (UNITS + BLOCKS - 1) / BLOCKS;
  auto& room = *reinterpret_cast<Leave::Room*>(&shared());
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
