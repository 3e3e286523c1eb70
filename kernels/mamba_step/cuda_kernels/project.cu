// Convolution and x_proj of one token: the first half of what lies between the two projections of a Mamba block.
//
// A block has CHANNELS channels of SEQS sequences. What x_proj makes is a sum over all channels: a warp has 16 of its
// values, by the matrix units; a cluster of blocks adds up its own, in the order of the blocks, and what the E /
// (CHANNELS * CLUSTER) clusters of a sequence leave is added up where it is read (scan.cu).
//
// Which 32 elements of a row make which step of the matrix units is free, if it is the same for both: so a lane loads 8
// that lie side by side.
//
// Letters: B sequences, E inner width, R rank of dt, N states (16), W convolution width; macros, but B, as are CLUSTER,
// CHANNELS and SEQS.

constexpr int N = 16, OUT = R + 2 * N, WARPS = OUT / 16, THREADS = 32 * WARPS, OCTETS = SEQS / 8;
// Blocks of a processor, and so how many parts of x_proj's rows may be on their way to registers: all of 128 channels.
// With 256 channels and room for two, an H200 runs 62 clusters at once, and of the 64 that have 256 sequences two had
// to wait for the others.
constexpr int AT_ONCE = CHANNELS > 128 ? 3 : 2, PARTS = CHANNELS / 32, AHEAD = CHANNELS > 128 ? 1 : PARTS;
// Of the convolution: lanes of a sequence, sequences of a warp side by side, and how often.
constexpr int LANES = CHANNELS / 8, BESIDE = 32 / LANES, PASSES = (SEQS + WARPS * BESIDE - 1) / (WARPS * BESIDE);
constexpr int WINDOW = CHANNELS * (W - 1);
constexpr int STRIDE = OUT + 4;  // of sums, so that lanes meet in no bank
constexpr int GROUPS = E / CHANNELS, SHARE = SEQS / CLUSTER;  // sequences that a block adds up
static_assert((CHANNELS == 128 || CHANNELS == 256) && E % (CHANNELS * CLUSTER) == 0 && R % 16 == 0, "sizes not served");
static_assert(SEQS % 8 == 0 && SEQS % CLUSTER == 0 && THREADS <= 1024, "sizes not served");

struct Problem {
  const bf16 *conv, *conv_bias, *x_proj;  // conv_bias may be 0
  bf16* conv_state;                       // (B, E, W - 1)
  const bf16* uz;                         // (B, 2 E), what in_proj makes
  bf16* u;                                // (B, E), after the convolution
  float* projected;                       // (GROUPS / CLUSTER, B, OUT): what its sum is made of
  int64 n_rows;                           // B
};
struct Shared {
  alignas(16) bf16 u[SEQS][CHANNELS + 32];
  alignas(16) float sums[SEQS][STRIDE], gathered[CLUSTER][SHARE][STRIDE];
  alignas(16) bf16 window[SEQS][WINDOW];
  Gate gathering, brought[WARPS][PASSES];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
INLINE Shared& shared() { return *reinterpret_cast<Shared*>(own_room()); }

extern "C" __global__ void CLUSTERED(CLUSTER) __launch_bounds__(THREADS, AT_ONCE)
    project(const GRID_CONSTANT Problem p) {
  Shared& s = shared();
  int tid = threadIdx.x, lane = tid % 32, warp = uniform(tid / 32), g = lane / 4, t = lane % 4;
  int group = int(blockIdx.x) % GROUPS, rank = group % CLUSTER, first = int(blockIdx.x) / GROUPS * SEQS;
  int n_here = int(p.n_rows) - first < SEQS ? int(p.n_rows) - first : SEQS;
  if (tid == 0) expect(&s.gathering, 4 * SEQS * STRIDE);
  __syncwarp();
  say_begun();
  let_next_begin();

  auto window = [&](int row) { return p.conv_state + (int64(first + row) * E + group * CHANNELS) * (W - 1); };
  // Of a warp, each time: the first sequence, and how many.
  auto row_of = [&](int pass) { return (pass * WARPS + warp) * BESIDE; };
  auto rows_of = [&](int pass) {
    int n = n_here - row_of(pass);
    return n < 0 ? 0 : n < BESIDE ? n : BESIDE;
  };

  // Weights and windows, before what the kernel before makes.
  if (lane == 0) {
    for (int i = 0; i < PASSES; ++i)
      if (rows_of(i)) open(&s.brought[warp][i], rows_of(i));
    all_open();
    for (int i = 0; i < PASSES; ++i)
      for (int j = 0; j < rows_of(i); ++j)
        bring(s.window[row_of(i) + j], window(row_of(i) + j), WINDOW * sizeof(bf16), &s.brought[warp][i]);
  }
  int c = lane % LANES * 8, channel = group * CHANNELS + c;
  uint4 low[AHEAD], high[AHEAD];
  auto bring_weights = [&](int part) {
    const bf16* at = p.x_proj + int64(warp * 16 + g) * E + group * CHANNELS + part * 32 + t * 8;
    low[part % AHEAD] = once16(at), high[part % AHEAD] = once16(at + 8 * E);
  };
#pragma unroll
  for (int part = 0; part < AHEAD; ++part) bring_weights(part);
  Eight<W> taps;
  Packed<bf16, 8> shift;
  taps.load(p.conv + channel * W);
  if (p.conv_bias) shift.load(p.conv_bias + channel);
  else shift.clear();
  wait_for_end_before();
  uint4 fresh_u[PASSES];
#pragma unroll
  for (int i = 0; i < PASSES; ++i)
    if (lane / LANES < rows_of(i))
      fresh_u[i] = fresh16(p.uz + int64(first + row_of(i) + lane / LANES) * 2 * E + channel);

  // The convolution: u in shared memory and out, the window one step on.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    int row = row_of(i) + lane / LANES;
    bool here = row < n_here;
    if (rows_of(i)) wait_at(&s.brought[warp][i]);
    Packed<bf16, 8> u;
    u.clear();
    if (here) {
      u = packed(fresh_u[i]);
      convolve(u, &s.window[row][c * (W - 1)], taps, shift);
    }
    if (row < SEQS) u.store(&s.u[row][c]);
    written();
    __syncwarp();
    if (lane == 0)
      for (int j = 0; j < rows_of(i); ++j) give(window(row + j), s.window[row + j], WINDOW * sizeof(bf16));
    if (here) u.store(p.u + int64(first + row) * E + channel);
  }
  __syncthreads();

  float sum[OCTETS][4];
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) sum[o][0] = sum[o][1] = sum[o][2] = sum[o][3] = 0.0f;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const uint4 &v = low[part % AHEAD], &w = high[part % AHEAD];
#pragma unroll
    for (int o = 0; o < OCTETS; ++o) {
      uint4 x = *reinterpret_cast<const uint4*>(&s.u[o * 8 + g][part * 32 + t * 8]);
      multiply_add(sum[o], v.x, w.x, v.y, w.y, x.x, x.y);
      multiply_add(sum[o], v.z, w.z, v.w, w.w, x.z, x.w);
    }
    if (part + AHEAD < PARTS) bring_weights(part + AHEAD);
  }
#pragma unroll
  for (int o = 0; o < OCTETS; ++o)
#pragma unroll
    for (int k = 0; k < 4; ++k) s.sums[o * 8 + 2 * t + k % 2][warp * 16 + g + k / 2 * 8] = sum[o][k];
  written();
  wait_for_others();
  __syncthreads();
  if (tid < CLUSTER) copy_to(s.gathered[rank], s.sums[tid * SHARE], 4 * SHARE * STRIDE, &s.gathering, tid);
  wait_at(&s.gathering);
  say_begun();  // in fact: has all that the others had for this block
  for (int i = tid; i < SHARE * OUT; i += THREADS) {
    int seq = rank * SHARE + i / OUT;
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < CLUSTER; ++other) total += s.gathered[other][i / OUT][i % OUT];
    if (seq < n_here) p.projected[(int64(group / CLUSTER) * p.n_rows + first + seq) * OUT + i % OUT] = total;
  }
  if (lane == 0) all_given();
  __syncwarp();
  wait_for_others();  // who may still be reading this one's sums
}
