// What lies between the two projections of a Mamba block, of one token: convolution, x_proj, dt_proj, states, gate.
//
// A cluster of blocks has all channels of SEQS sequences, a block EC = E / CLUSTER of them. What x_proj makes is a sum
// over all channels: each block adds up its own by the matrix units, its warps sharing out rows and channels; a slice
// of the values is then added up in each block of the cluster, in the order of the blocks, and given to all of them.
// The states, which are nearly all that is read and written, are on their way all the while.
//
// Which 32 elements of a row make which step of the matrix units is free, if it is the same for both: so a lane loads 8
// that lie side by side. Two lanes share a channel's 16 states by quarters (first and third, second and fourth), so
// that they read and write whole sectors.
//
// Letters: B sequences, E inner width, R rank of dt, N states (16), W convolution width; macros, but B, as are CLUSTER,
// SEQS and PASSING (whether states that are written are the first to leave the L2 cache, or the last).

constexpr int N = 16, OUT = R + 2 * N, EC = E / CLUSTER, THREADS = 2 * EC;
constexpr int WARPS = THREADS / 32, OCTETS = (SEQS + 7) / 8, ROWS = 8 * OCTETS;
constexpr int BANDS = OUT / 16, PARTS = EC / 32;  // of x_proj: its rows by 16, a block's channels by 32
constexpr int UNITS = BANDS * PARTS, TURNS = (UNITS + WARPS - 1) / WARPS, AHEAD = TURNS < 3 ? TURNS : 3;
constexpr int VALUES = SEQS * OUT, SLICE = VALUES / CLUSTER, DEEP = (R + 31) / 32;
constexpr int GROUP = SEQS < 4 ? SEQS : 4, GROUPS = (SEQS + GROUP - 1) / GROUP, HELD = GROUPS < 2 ? 1 : 2;
static_assert(E % (32 * CLUSTER) == 0 && R % 16 == 0 && THREADS <= 512, "sizes not served");
static_assert(VALUES % CLUSTER == 0 && SLICE <= THREADS, "sizes not served");

struct Problem {
  const bf16 *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D;  // conv_bias may be 0
  bf16* conv_state;  // (B, E, W - 1)
  float* ssm_state;  // (B, E, N)
  const bf16* uz;    // (B, 2 E), what in_proj makes
  bf16* y;           // (B, E)
  int64 n_rows;      // B
};
struct Shared {
  alignas(16) bf16 u[ROWS][EC + 32], z[SEQS][EC + 8];
  alignas(16) float part[PARTS][ROWS][OUT + 4], low[ROWS][OUT + 4], gathered[CLUSTER][SLICE], dt[WARPS][16][ROWS + 1];
  alignas(16) bf16 window[SEQS][EC * (W - 1)];
  Gate gathering, giving, windows;
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
extern "C" __constant__ int shared_percent = SHARED_PERCENT;
INLINE Shared& shared() { return *reinterpret_cast<Shared*>(own_room()); }

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(THREADS, 1) middle(const GRID_CONSTANT Problem p) {
  Shared& s = shared();
  int tid = threadIdx.x, lane = tid % 32, warp = uniform(tid / 32), g = lane / 4, t = lane % 4;
  int rank = int(blockIdx.x) % CLUSTER, first = int(blockIdx.x) / CLUSTER * SEQS, channel = rank * EC;
  int n_here = int(p.n_rows) - first < SEQS ? int(p.n_rows) - first : SEQS;
  // Of the convolution: the windows of all sequences.
  auto window = [&](int seq) { return p.conv_state + (int64(first + seq) * E + channel) * (W - 1); };
  if (tid == 0) {
    expect(&s.gathering, 4 * VALUES), expect(&s.giving, 4 * VALUES);
    open(&s.windows, n_here);
    all_open();
    for (int seq = 0; seq < n_here; ++seq)
      bring(s.window[seq], window(seq), EC * (W - 1) * sizeof(bf16), &s.windows);
  }
  __syncwarp();
  say_begun();
  let_next_begin();

  // Weights and states, before what the kernel before makes.
  uint4 a[AHEAD][2];
  auto bring_weights = [&](int turn) {
    int unit = turn * WARPS + warp;
    const bf16* at = p.x_proj + int64(unit % BANDS * 16 + g) * E + channel + unit / BANDS * 32 + t * 8;
    a[turn % AHEAD][0] = unit < UNITS ? once16(at) : make_uint4(0, 0, 0, 0);
    a[turn % AHEAD][1] = unit < UNITS ? once16(at + 8 * E) : make_uint4(0, 0, 0, 0);
  };
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) bring_weights(i);

  constexpr int AT_ONCE = 16, PASSES = (SEQS + AT_ONCE - 1) / AT_ONCE;
  int c = tid % (EC / 8) * 8, row = tid / (EC / 8);  // of the convolution: 8 channels of a sequence
  Eight<W> taps;
  Packed<bf16, 8> shift;
  taps.load(p.conv + (channel + c) * W);
  if (p.conv_bias) shift.load(p.conv_bias + channel + c);
  else shift.clear();

  unsigned long long policy = PASSING ? first_to_leave() : last_to_leave();
  float h[HELD][GROUP][8];
  int quarter = lane % 2 * 4;
  int own = warp * 16 + lane / 2, e = channel + own;  // its channel in this block, and of all
  auto place = [&](int seq) { return p.ssm_state + (int64(first + seq) * E + e) * N + quarter; };
  auto fetch = [&](float (&held)[GROUP][8], int group) {
#pragma unroll
    for (int j = 0; j < GROUP; ++j)
      if (group * GROUP + j < n_here) {
        const float* from = place(group * GROUP + j);
        float4 x = *reinterpret_cast<const float4*>(from), y = *reinterpret_cast<const float4*>(from + 8);
        held[j][0] = x.x, held[j][1] = x.y, held[j][2] = x.z, held[j][3] = x.w;
        held[j][4] = y.x, held[j][5] = y.y, held[j][6] = y.z, held[j][7] = y.w;
      }
  };
  fetch(h[0], 0);
  uint4 wide[DEEP][2];
#pragma unroll
  for (int i = 0; i < DEEP; ++i) {
    bool here = i * 32 + t * 8 < R;
    const bf16* at = p.dt_proj + int64(channel + warp * 16 + g) * R + i * 32 + t * 8;
    wide[i][0] = here ? once16(at) : make_uint4(0, 0, 0, 0);
    wide[i][1] = here ? once16(at + 8 * R) : make_uint4(0, 0, 0, 0);
  }
  wait_for_end_before();

  // The convolution: u and z in shared memory, the window one step on.
  __syncthreads();
  wait_at(&s.windows);
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    int j = row + i * AT_ONCE;
    if (j < SEQS) {
      Packed<bf16, 8> u, z;
      u.clear(), z.clear();
      if (j < n_here) {
        const bf16* at = p.uz + int64(first + j) * 2 * E + channel + c;
        u = packed(fresh16(at)), z = packed(fresh16(at + E));
        convolve(u, &s.window[j][c * (W - 1)], taps, shift);
      }
      u.store(&s.u[j][c]);
      z.store(&s.z[j][c]);
    }
  }
  written();
  __syncthreads();
  if (tid == 0)
    for (int seq = 0; seq < n_here; ++seq) give(window(seq), s.window[seq], EC * (W - 1) * sizeof(bf16));

  // x_proj: this block's share of each value, then its slice of the sums.
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    int unit = turn * WARPS + warp, part = unit / BANDS;
    float sum[OCTETS][4];
#pragma unroll
    for (int o = 0; o < OCTETS; ++o) {
      sum[o][0] = sum[o][1] = sum[o][2] = sum[o][3] = 0.0f;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (unit < UNITS && o * 8 + g < SEQS) x = *reinterpret_cast<const uint4*>(&s.u[o * 8 + g][part * 32 + t * 8]);
      const uint4 &v = a[turn % AHEAD][0], &w = a[turn % AHEAD][1];
      multiply_add(sum[o], v.x, w.x, v.y, w.y, x.x, x.y);
      multiply_add(sum[o], v.z, w.z, v.w, w.w, x.z, x.w);
    }
    if (unit < UNITS) {
#pragma unroll
      for (int o = 0; o < OCTETS; ++o)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          s.part[part][o * 8 + 2 * t + k % 2][unit % BANDS * 16 + g + k / 2 * 8] = sum[o][k];
    }
    if (turn + AHEAD < TURNS) bring_weights(turn + AHEAD);
  }
  __syncthreads();
  wait_for_others();
#pragma unroll
  for (int i = 0; i < (VALUES + THREADS - 1) / THREADS; ++i) {
    int v = i * THREADS + tid;
    if (v < VALUES) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) sum += s.part[part][v / OUT][v % OUT];
      push(&s.gathered[rank][v % SLICE], &s.gathering, v / SLICE, sum);
    }
  }
  if (HELD > 1) fetch(h[HELD - 1], 1);
  Packed<bf16, 4> logs[2];
  logs[0].load(p.A_log + int64(e) * N + quarter), logs[1].load(p.A_log + int64(e) * N + 8 + quarter);
  float bias = one(p.dt_bias + e), skip = one(p.D + e);
  wait_at(&s.gathering);
  if (tid < SLICE) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) sum += s.gathered[i][tid];
    int v = rank * SLICE + tid;
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) push(&s.low[v / OUT][v % OUT], &s.giving, i, sum);
  }
  wait_at(&s.giving);

  // dt's wide projection, a step of the states, gate: a warp has 16 channels, a lane half a channel.
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    float dt[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      float x[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      if (i * 32 + t * 8 < R && o * 8 + g < SEQS) load_floats(&s.low[o * 8 + g][i * 32 + t * 8], x);
      multiply_add(dt, wide[i][0].x, wide[i][1].x, wide[i][0].y, wide[i][1].y, floats_to_bf16(x[0], x[1]),
                   floats_to_bf16(x[2], x[3]));
      multiply_add(dt, wide[i][0].z, wide[i][1].z, wide[i][0].w, wide[i][1].w, floats_to_bf16(x[4], x[5]),
                   floats_to_bf16(x[6], x[7]));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) s.dt[warp][g + k / 2 * 8][o * 8 + 2 * t + k % 2] = dt[k];
  }
  float A2[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) A2[k] = -exp2_fast(logs[k / 4].get(k % 4) * LOG2E) * LOG2E;
  __syncwarp();
#pragma unroll 1
  for (int base = 0; base < GROUPS; base += HELD)
#pragma unroll
    for (int held = 0; held < HELD; ++held) {
      int group = base + held;
      if (group >= GROUPS) break;
#pragma unroll
      for (int j = 0; j < GROUP; ++j) {
        int seq = group * GROUP + j;
        float out = 0.0f, u = 0.0f;
        if (seq < n_here) {
          float drive[2][4], readout[2][4];
          const float* matrices = &s.low[seq][R + quarter];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            load_floats(matrices + 8 * k, drive[k]);
            load_floats(matrices + N + 8 * k, readout[k]);
          }
          u = one(&s.u[seq][own]);
          float size = softplus(s.dt[warp][lane / 2][seq] + bias), driven = size * u;
          float(&x)[8] = h[held][j];
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            x[k] = __fmaf_rn(exp2_fast(size * A2[k]), x[k], driven * drive[k / 4][k % 4]);
            out = __fmaf_rn(x[k], readout[k / 4][k % 4], out);
          }
          float* to = place(seq);
          store4(to, float4{x[0], x[1], x[2], x[3]}, policy);
          store4(to + 8, float4{x[4], x[5], x[6], x[7]}, policy);
        }
        out = add_across(out, 1);
        if (seq < n_here && quarter == 0) {
          float gate = one(&s.z[seq][own]);
          Packed<bf16, 1> y;
          y.set({__fmaf_rn(skip, u, out) * gate * sigmoid(gate)});
          y.store(p.y + int64(first + seq) * E + channel + own);
        }
      }
      if (group + HELD < GROUPS) fetch(h[held], group + HELD);
    }
  if (tid == 0) all_given();
}
