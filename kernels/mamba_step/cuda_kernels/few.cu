// For a few sequences: a warp has whole rows of a weight, in registers, and multiplies them with each sequence's vector.

static_assert(M % 256 == 0 && E % 256 == 0 && ROWS * 2 <= 32, "sizes that these kernels do not serve");
constexpr int LONGEST = M > E ? M : E;
struct Shared {
  float x[ROWS][LONGEST], sums[2][ROWS * WARPS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
INLINE Shared& shared() {
  extern __shared__ float4 room[];
  return *reinterpret_cast<Shared*>(room);
}

// Where element k of a vector lies, so that the lanes of a warp, which take 8 each, find theirs in different banks.
INLINE int place(int k) { return (k & ~255) + (k >> 2 & 1) * 128 + (k >> 3 & 31) * 4 + (k & 3); }

// K elements of each of AT_ONCE rows, 8 a lane at a time.
template <int K, int AT_ONCE> struct Rows {
  uint4 part[AT_ONCE][K / 256];

  INLINE void load(const bf16* matrix, int first, int n, int tid) {
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
#pragma unroll
      for (int i = 0; i < K / 256; ++i)  // something always, so that nothing is kept from phase to phase
        if (first + r < n) part[r][i] = once16(matrix + int64(first + r) * K + i * 256 + tid % 32 * 8);
        else part[r][i] = make_uint4(0, 0, 0, 0);
  }
  // Of each row with the vectors of all sequences; lane b AT_ONCE + r gets that of row r and sequence b.
  INLINE float products(const Shared& s, int tid) const {
    float mine = 0.0f;
    int lane = tid % 32;
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
      float sum[AT_ONCE][2];
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) sum[r][0] = sum[r][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < K / 256; ++i) {
        float4 low = *reinterpret_cast<const float4*>(&s.x[b][i * 256 + lane * 4]);
        float4 high = *reinterpret_cast<const float4*>(&s.x[b][i * 256 + 128 + lane * 4]);
#pragma unroll
        for (int r = 0; r < AT_ONCE; ++r) {
          const uint4& w = part[r][i];
          sum[r][0] = __fmaf_rn(low_half(w.x), low.x, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.x), low.y, sum[r][1]);
          sum[r][0] = __fmaf_rn(low_half(w.y), low.z, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.y), low.w, sum[r][1]);
          sum[r][0] = __fmaf_rn(low_half(w.z), high.x, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.z), high.y, sum[r][1]);
          sum[r][0] = __fmaf_rn(low_half(w.w), high.z, sum[r][0]);
          sum[r][1] = __fmaf_rn(high_half(w.w), high.w, sum[r][1]);
        }
      }
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) {
        float total = sum[r][0] + sum[r][1];
#pragma unroll
        for (int mask = 16; mask; mask /= 2) total = add_across(total, mask);
        if (lane == b * AT_ONCE + r) mine = total;
      }
    }
    return mine;
  }
};

INLINE int unit_of(int step, int tid) { return (step * WARPS + tid / 32) * BLOCKS + int(blockIdx.x); }
INLINE constexpr int steps_for(int units) { return (units + WARPS * BLOCKS - 1) / (WARPS * BLOCKS); }

// Vectors that a phase before wrote, (ROWS, K), to shared memory.
template <int K> INLINE void bring(const float* from, Shared& s, int tid) {
#pragma unroll
  for (int b = 0; b < ROWS; ++b)
    for (int k = tid * 4; k < K; k += THREADS * 4)
      *reinterpret_cast<float4*>(&s.x[b][place(k)]) = fresh4(from + int64(b) * K + k);
  __syncthreads();
}

INLINE float stream_at(const Problem& p, bool begins, int64 at) { return begins ? one(p.x + at) : fresh(p.stream + at); }

// Norm, in_proj, convolution: uz. Or, if HEAD, the last norm and a product with HEIGHT rows: logits.
template <bool HEAD, int HEIGHT> INLINE void enter(const Problem& p, const Layer& l, int phase, int tid) {
  constexpr int AT_ONCE = M <= 2048 ? 2 : 1, UNITS = (HEIGHT + AT_ONCE - 1) / AT_ONCE;
  constexpr int PER = (M + THREADS - 1) / THREADS;
  Shared& s = shared();
  bool begins = !HEAD && p.x && phase == 0;
  Rows<M, AT_ONCE> rows;
  Convolution conv;
  float window[W - 1];
  int lane = tid % 32, b = lane / AT_ONCE;
  auto element = [&](int step) { return unit_of(step, tid) * AT_ONCE + lane % AT_ONCE; };
  auto state_of = [&](int e) { return l.conv_state + (int64(b) * E + e) * (W - 1); };
  auto load = [&](int step) {
    rows.load(l.in_proj, unit_of(step, tid) * AT_ONCE, HEIGHT, tid);
    int e = element(step);
    bool mine = !HEAD && b < ROWS && e < E;
    if constexpr (!HEAD) conv.load(l, mine ? e : 0);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) window[k] = mine ? one(state_of(e) + k) : 0.0f;
  };
  load(0);
  float weight[PER], shift[PER], value[ROWS][PER], sum[ROWS];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    int d = tid + i * THREADS;
    weight[i] = d < M ? one(l.norm + d) : 0.0f;
    shift[i] = l.norm_bias && d < M ? one(l.norm_bias + d) : 0.0f;
  }
  if (!HEAD) ahead(l.out_proj, int64(M) * E);
  wait_for_all(p, phase);
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    sum[b] = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      int d = tid + i * THREADS;
      value[b][i] = d < M ? stream_at(p, begins, int64(b) * M + d) : 0.0f;
      sum[b] += value[b][i];
    }
  }
  if (CENTRED) block_sums(sum, s.sums[0], tid);
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    float mean = sum[b] / M;
    sum[b] = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (CENTRED) value[b][i] -= tid + i * THREADS < M ? mean : 0.0f;
      sum[b] = __fmaf_rn(value[b][i], value[b][i], sum[b]);
    }
  }
  block_sums(sum, s.sums[1], tid);
#pragma unroll
  for (int b = 0; b < ROWS; ++b) {
    float scale = inverse_root(sum[b] / M + p.eps);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      int d = tid + i * THREADS;
      if (d < M) s.x[b][place(d)] = __fmaf_rn(value[b][i] * scale, weight[i], shift[i]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < steps_for(UNITS); ++step) {
    int e = element(step);
    bool mine = b < ROWS && e < HEIGHT;
    float out = rows.products(s, tid);
    if (mine) {
      if constexpr (HEAD) put(static_cast<bf16*>(p.uz) + int64(b) * HEIGHT + e, out);
      else static_cast<float*>(p.uz)[int64(b) * HEIGHT + e] = e < E ? conv.run(out, window, state_of(e)) : out;
    }
    if (step + 1 < steps_for(UNITS)) load(step + 1);
  }
}

INLINE void project(const Problem& p, const Layer& l, int phase, int tid) {
  Rows<E, 1> rows;
  rows.load(l.x_proj, unit_of(0, tid), OUT, tid);
  static_assert(steps_for(OUT) == 1, "more rows of x_proj than warps");
  if (phase / 4 + 1 < p.n_layers) ahead(p.layers[phase / 4 + 1].in_proj, int64(2) * E * M);
  wait_for_all(p, phase);
  if (int(blockIdx.x) >= OUT) return;
  Shared& s = shared();
#pragma unroll
  for (int b = 0; b < ROWS; ++b)
    for (int k = tid * 4; k < E; k += THREADS * 4)
      *reinterpret_cast<float4*>(&s.x[b][place(k)]) = fresh4(static_cast<float*>(p.uz) + int64(b) * 2 * E + k);
  __syncthreads();
  float out = rows.products(s, tid);
  int b = tid % 32, o = unit_of(0, tid);
  if (b < ROWS && o < OUT) p.low[b * OUT + o] = out;
}

// dt's wide projection, a step of the state, gate: y. Half a warp has a channel, a lane one state of it.
INLINE void scan(const Problem& p, const Layer& l, int phase, int tid) {
  constexpr int PER = (R + N - 1) / N, STEPS = steps_for((E + 1) / 2);
  int n = tid % N;
  const float* uz = static_cast<const float*>(p.uz);
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    int wanted = unit_of(step, tid) * 2 + tid % 32 / N, e = wanted < E ? wanted : E - 1;
    float h[ROWS], widen[PER], bias = one(l.dt_bias + e), skip = one(l.D + e);
#pragma unroll
    for (int b = 0; b < ROWS; ++b) h[b] = l.ssm_state[(int64(b) * E + e) * N + n];
#pragma unroll
    for (int i = 0; i < PER; ++i) widen[i] = i * N + n < R ? one(l.dt_proj + int64(e) * R + i * N + n) : 0.0f;
    float A2 = -exp2_fast(one(l.A_log + int64(e) * N + n) * LOG2E) * LOG2E;
    if (step == 0) wait_for_all(p, phase);
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
      const float* low = p.low + b * OUT;
      float drive = fresh(low + R + n), readout = fresh(low + R + N + n);
      float u = fresh(uz + int64(b) * 2 * E + e), gate = fresh(uz + int64(b) * 2 * E + E + e), dt = 0.0f;
#pragma unroll
      for (int i = 0; i < PER; ++i) dt = __fmaf_rn(widen[i], i * N + n < R ? fresh(low + i * N + n) : 0.0f, dt);
#pragma unroll
      for (int mask = N / 2; mask; mask /= 2) dt = add_across(dt, mask);
      dt = softplus(dt + bias);
      float next = __fmaf_rn(exp2_fast(dt * A2), h[b], dt * u * drive), out = next * readout;
#pragma unroll
      for (int mask = N / 2; mask; mask /= 2) out = add_across(out, mask);
      if (wanted < E) {
        l.ssm_state[(int64(b) * E + e) * N + n] = next;
        if (n == 0) static_cast<float*>(p.y)[int64(b) * E + e] = __fmaf_rn(skip, u, out) * gate * sigmoid(gate);
      }
    }
  }
}

// out_proj, added to the stream. What it is added to this lane wrote itself, a layer ago, or it is the stack's input.
INLINE void leave(const Problem& p, const Layer& l, int phase, int tid) {
  Shared& s = shared();
  Rows<E, 1> rows;
  float before = 0.0f;
  int b = tid % 32;
  auto load = [&](int step) {
    rows.load(l.out_proj, unit_of(step, tid), M, tid);
    before = 0.0f;
    if (b < ROWS && unit_of(step, tid) < M) before = stream_at(p, p.x && phase == 3, int64(b) * M + unit_of(step, tid));
  };
  load(0);
  wait_for_all(p, phase);
  bring<E>(static_cast<const float*>(p.y), s, tid);
#pragma unroll 1
  for (int step = 0; step < steps_for(M); ++step) {
    float out = rows.products(s, tid);
    if (b < ROWS && unit_of(step, tid) < M) p.stream[int64(b) * M + unit_of(step, tid)] = before + out;
    if (step + 1 < steps_for(M)) load(step + 1);
  }
}

// ONLY: the one phase that is compiled, or -1 for a layer's four; 4 is that of the head.
extern "C" __global__ void __launch_bounds__(THREADS, 1) stack(const GRID_CONSTANT Problem p) {
#pragma unroll 1
  for (int phase = p.first; phase < p.last; ++phase) {
    const Layer& l = p.layers[phase / 4];
    int tid = opaque(threadIdx.x);  // or all that follows from it were kept in registers from phase to phase
    int part = ONLY < 0 ? phase % 4 : ONLY;
    if (part == 0) enter<false, 2 * E>(p, l, phase, tid);
    if (part == 1) project(p, l, phase, tid);
    if (part == 2) scan(p, l, phase, tid);
    if (part == 3) leave(p, l, phase, tid);
    if constexpr (ONLY == 4) enter<true, VOCABULARY>(p, l, phase, tid);
    tell_all(p, phase);
  }
}
