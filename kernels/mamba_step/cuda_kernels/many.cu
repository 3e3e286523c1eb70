// For many sequences: the matrix units multiply 16 rows of a weight with 8 sequences' vectors. A block has one or two
// such bands of 16 rows; its warps share out the width, and their sums are added up in shared memory in a fixed order.
// Which 32 elements of a row make which step of the matrix units is free, if it is the same for both: so a lane loads
// 8 that lie side by side. The norm is a factor of each sequence, put to in_proj's result.

constexpr int OCTETS = (ROWS + 7) / 8, PAD = 1;
static_assert(M % 256 == 0 && E % 256 == 0 && R % 16 == 0 && ROWS <= 64 && !CENTRED, "sizes that these do not serve");
struct Shared {
  union {
    float part[WARPS][32][OCTETS * 8 + PAD];
    float dt[WARPS][16][9];
  };
  float factor[OCTETS * 8], sums[WARPS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
INLINE Shared& shared() {
  extern __shared__ float4 room[];
  return *reinterpret_cast<Shared*>(room);
}

// BANDS x 16 rows of a matrix of width K, of which this warp has PART blocks of 32 elements.
template <int K, int BANDS> struct Band {
  static constexpr int PART = K / 32 / WARPS, CHUNK = PART * BANDS <= 6 ? PART : PART % 3 == 0 ? 3 : PART % 2 == 0 ? 2 : 1;
  uint4 low[BANDS][CHUNK], high[BANDS][CHUNK];

  static INLINE int column(int i) { return (int(threadIdx.x / 32) * PART + i) * 32 + int(threadIdx.x % 4) * 8; }
  INLINE void load(const bf16* matrix, int first_row, int chunk) {
    int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const bf16* at = matrix + int64(first_row + m * 16 + g) * K + column(chunk * CHUNK + i);
        low[m][i] = once16(at), high[m][i] = once16(at + 8 * K);
      }
  }
  // The sums of the block's warps, left in shared memory: part[warp][row][sequence - first].
  template <int NT> INLINE void multiply(const bf16* matrix, int first_row, const bf16* x, int stride, int first, Shared& s) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
    float c[BANDS][NT][4];
#pragma unroll
    for (int m = 0; m < BANDS; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j) c[m][j][0] = c[m][j][1] = c[m][j][2] = c[m][j][3] = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < PART / CHUNK; ++chunk) {
      if (chunk) load(matrix, first_row, chunk);
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        uint4 b[NT];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          int row = first + j * 8 + g;
          b[j] = make_uint4(0, 0, 0, 0);
          if (row < ROWS) b[j] = fresh16(x + int64(row) * stride + column(chunk * CHUNK + i));
        }
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int m = 0; m < BANDS; ++m) {
            multiply_add(c[m][j], low[m][i].x, high[m][i].x, low[m][i].y, high[m][i].y, b[j].x, b[j].y);
            multiply_add(c[m][j], low[m][i].z, high[m][i].z, low[m][i].w, high[m][i].w, b[j].z, b[j].w);
          }
      }
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
INLINE void begin(const Problem& p, int phase) {
  Shared& s = shared();
  wait_for_all(p, phase);
#pragma unroll 1
  for (int b = blockIdx.x; b < ROWS; b += BLOCKS) {
    float sum = 0.0f;
    for (int d = threadIdx.x; d < M; d += THREADS) {
      float x = one(p.x + int64(b) * M + d);
      p.stream[int64(b) * M + d] = x;
      put(p.scaled + int64(b) * M + d, x * one(p.layers[0].norm + d));
      sum = __fmaf_rn(x, x, sum);
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum = add_across(sum, mask);
    if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < M / 16; i += THREADS) {
      sum = 0.0f;
      if (i == 0)
        for (int w = 0; w < WARPS; ++w) sum += s.sums[w];
      p.squares[i * ROWS + b] = sum;
    }
    __syncthreads();
  }
}

// in_proj, norm, convolution: uz.
INLINE void enter(const Problem& p, const Layer& l, int phase) {
  constexpr int UNITS = 2 * E / 32, STEPS = (UNITS + BLOCKS - 1) / BLOCKS, PER = (32 * ROWS + THREADS - 1) / THREADS;
  Shared& s = shared();
  Band<M, 2> band;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x), e = unit * 32 + lane;
    bool valid = unit < UNITS;
    float window[PER][W - 1];
    if (valid) {
      band.load(l.in_proj, unit * 32, 0);
      if (e < E)
#pragma unroll
        for (int i = 0; i < PER; ++i)
#pragma unroll
          for (int k = 0; k < W - 1; ++k) {
            int b = warp + i * WARPS;
            window[i][k] = b < ROWS ? one(l.conv_state + (int64(b) * E + e) * (W - 1) + k) : 0.0f;
          }
    }
    if (step == 0) wait_for_all(p, phase);
    if (!valid) return;
    float sum = 0.0f;  // four threads for each sequence
    if (threadIdx.x / 4 < ROWS) {
#pragma unroll 4
      for (int i = threadIdx.x % 4; i < M / 16; i += 4) sum += fresh(p.squares + i * ROWS + threadIdx.x / 4);
    }
    sum = add_across(sum, 1);
    sum = add_across(sum, 2);
    if (threadIdx.x % 4 == 0 && threadIdx.x / 4 < ROWS) s.factor[threadIdx.x / 4] = inverse_root(sum / M + p.eps);
    band.template multiply<OCTETS>(l.in_proj, unit * 32, p.scaled, M, 0, s);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      int b = warp + i * WARPS;
      if (b < ROWS) {
        float out = total(s, lane, b) * s.factor[b];
        bf16* state = l.conv_state + (int64(b) * E + e) * (W - 1);
        put(static_cast<bf16*>(p.uz) + int64(b) * 2 * E + e, e < E ? convolved(out, window[i], l, e, state) : out);
      }
    }
    if (step + 1 < STEPS) __syncthreads();
  }
}

INLINE void project(const Problem& p, const Layer& l, int phase) {
  constexpr int BANDS = OUT / 16, UNITS = BANDS * OCTETS, STEPS = (UNITS + BLOCKS - 1) / BLOCKS;
  Shared& s = shared();
  Band<E, 1> band;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x), row = unit / OCTETS * 16, first = unit % OCTETS * 8;
    if (unit < UNITS) band.load(l.x_proj, row, 0);
    if (step == 0) wait_for_all(p, phase);
    if (unit >= UNITS) return;
    band.template multiply<1>(l.x_proj, row, static_cast<const bf16*>(p.uz), 2 * E, first, s);
    if (threadIdx.x < 128) {
      int b = first + threadIdx.x / 16, o = threadIdx.x % 16;
      if (b < ROWS) p.low[b * OUT + row + o] = total(s, o, threadIdx.x / 16);
    }
    if (step + 1 < STEPS) __syncthreads();
  }
}

// dt's wide projection, a step of the state, gate: y. A warp has 16 channels of 8 sequences, a lane half a channel.
INLINE void scan(const Problem& p, const Layer& l, int phase) {
  constexpr int UNITS = E / 16 * OCTETS, STEPS = (UNITS + WARPS * BLOCKS - 1) / (WARPS * BLOCKS), DEEP = (R + 31) / 32;
  Shared& s = shared();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, half = lane % 2 * 8;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = (step * WARPS + warp) * BLOCKS + int(blockIdx.x), first = unit % OCTETS * 8;
    int channel = unit < UNITS ? unit / OCTETS * 16 : 0, e = channel + lane / 2, n_here = unit < UNITS ? ROWS - first : 0;
    float h[8][8], A2[8], dt[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float* state = l.ssm_state + (int64(first) * E + channel) * N + lane * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < n_here) {
        float4 a = *reinterpret_cast<const float4*>(state + int64(j) * E * N);
        float4 b = *reinterpret_cast<const float4*>(state + int64(j) * E * N + 4);
        h[j][0] = a.x, h[j][1] = a.y, h[j][2] = a.z, h[j][3] = a.w;
        h[j][4] = b.x, h[j][5] = b.y, h[j][6] = b.z, h[j][7] = b.w;
      }
    uint4 low[DEEP], high[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      low[i] = high[i] = make_uint4(0, 0, 0, 0);
      if (i * 32 + t * 8 < R) {
        low[i] = once16(l.dt_proj + int64(channel + g) * R + i * 32 + t * 8);
        high[i] = once16(l.dt_proj + int64(channel + g + 8) * R + i * 32 + t * 8);
      }
    }
    Packed<bf16, 8> logs;
    logs.load(l.A_log + int64(e) * N + half);
#pragma unroll
    for (int k = 0; k < 8; ++k) A2[k] = -exp2_fast(logs.get(k) * LOG2E) * LOG2E;
    float bias = one(l.dt_bias + e), skip = one(l.D + e);
    if (step == 0) wait_for_all(p, phase);
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      uint4 b = make_uint4(0, 0, 0, 0);
      if (i * 32 + t * 8 < R && g < n_here) {
        const float* from = p.low + (first + g) * OUT + i * 32 + t * 8;
        float4 x = fresh4(from), y = fresh4(from + 4);
        b = make_uint4(floats_to_bf16(x.x, x.y), floats_to_bf16(x.z, x.w), floats_to_bf16(y.x, y.y),
                       floats_to_bf16(y.z, y.w));
      }
      multiply_add(dt, low[i].x, high[i].x, low[i].y, high[i].y, b.x, b.y);
      multiply_add(dt, low[i].z, high[i].z, low[i].w, high[i].w, b.z, b.w);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) s.dt[warp][g + k / 2 * 8][2 * t + k % 2] = dt[k];
    __syncwarp();
    const bf16* uz = static_cast<const bf16*>(p.uz) + int64(first) * 2 * E + e;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float out = 0.0f, u = 0.0f, gate = 0.0f;
      if (j < n_here) {
        const float* from = p.low + (first + j) * OUT + R + half;
        float4 b[2] = {fresh4(from), fresh4(from + 4)}, c[2] = {fresh4(from + N), fresh4(from + N + 4)};
        float drive[8] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
        float readout[8] = {c[0].x, c[0].y, c[0].z, c[0].w, c[1].x, c[1].y, c[1].z, c[1].w};
        u = low_half(fresh2(uz + int64(j) * 2 * E)), gate = low_half(fresh2(uz + int64(j) * 2 * E + E));
        float size = softplus(s.dt[warp][lane / 2][j] + bias), driven = size * u;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          h[j][k] = __fmaf_rn(exp2_fast(size * A2[k]), h[j][k], driven * drive[k]);
          out = __fmaf_rn(h[j][k], readout[k], out);
        }
        *reinterpret_cast<float4*>(state + int64(j) * E * N) = float4{h[j][0], h[j][1], h[j][2], h[j][3]};
        *reinterpret_cast<float4*>(state + int64(j) * E * N + 4) = float4{h[j][4], h[j][5], h[j][6], h[j][7]};
      }
      out = add_across(out, 1);
      if (j < n_here && lane % 2 == 0)
        put(static_cast<bf16*>(p.y) + int64(first + j) * E + e, __fmaf_rn(skip, u, out) * gate * sigmoid(gate));
    }
    if (step + 1 < STEPS) __syncwarp();
  }
}

// out_proj, added to the stream, and what the next norm asks of that.
INLINE void leave(const Problem& p, const Layer& l, int phase) {
  constexpr int NT = OCTETS > 4 ? 4 : OCTETS, GROUPS = (OCTETS + NT - 1) / NT, UNITS = M / 16 * GROUPS;
  constexpr int STEPS = (UNITS + BLOCKS - 1) / BLOCKS, PER = (16 * NT * 8 + THREADS - 1) / THREADS;
  Shared& s = shared();
  Band<E, 1> band;
  int layer = (phase - 1) / 4;
  const bf16* norm = layer + 1 < p.n_layers ? p.layers[layer + 1].norm : p.next_norm;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int unit = step * BLOCKS + int(blockIdx.x), row = unit / GROUPS * 16, first = unit % GROUPS * NT * 8;
    if (unit < UNITS) band.load(l.out_proj, row, 0);
    if (step == 0) wait_for_all(p, phase);
    if (unit >= UNITS) return;
    band.template multiply<NT>(l.out_proj, row, static_cast<const bf16*>(p.y), E, first, s);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      int at = threadIdx.x + i * THREADS, m = row + at % 16, b = first + at / 16;
      float square = 0.0f;
      if (at / 16 < NT * 8 && b < ROWS) {
        float sum = fresh(p.stream + int64(b) * M + m) + total(s, at % 16, at / 16);
        p.stream[int64(b) * M + m] = sum;
        if (norm) put(p.scaled + int64(b) * M + m, sum * one(norm + m));
        square = sum * sum;
      }
#pragma unroll
      for (int mask = 8; mask; mask /= 2) square = add_across(square, mask);
      if (at % 16 == 0 && at / 16 < NT * 8 && b < ROWS) p.squares[row / 16 * ROWS + b] = square;
    }
    if (step + 1 < STEPS) __syncthreads();
  }
}

// ONLY: the one phase that is compiled, or -1 for all.
extern "C" __global__ void __launch_bounds__(THREADS, 1) stack(const GRID_CONSTANT Problem p) {
#pragma unroll 1
  for (int phase = p.first; phase < p.last; ++phase) {
    const Layer& l = p.layers[phase ? (phase - 1) / 4 : 0];
    int part = ONLY >= 0 ? ONLY : phase == 0 ? 4 : (phase - 1) % 4;
    if (part == 0) enter(p, l, phase);
    if (part == 1) project(p, l, phase);
    if (part == 2) scan(p, l, phase);
    if (part == 3) leave(p, l, phase);
    if (part == 4) begin(p, phase);
    tell_all(p, phase);
  }
}
