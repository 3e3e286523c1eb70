// dt_proj, a step of the states and the gate, of one token: the second half of what lies between the two projections of
// a Mamba block. Nearly all of it is the states' way from memory and back.
//
// A warp has 32 channels, a lane one of them, of the block's sequences one after another. The 2 KB of states that
// it takes for each come to shared memory by themselves (bulk copies), up to SLOTS of them on their way from the time
// before the kernel before has ended, and go back in the same way. A lane takes the four quarters of its channel's
// states in an order of its own, so that the lanes of a warp meet in no bank.
//
// Letters: B sequences, E inner width, R rank of dt, N states (16); macros, but B, as are SPLITS, SEQS (that there
// is room for), ROUNDS (of the block's threads, that bring in what x_proj has made of its sequences), SLOTS, EARLY and
// WARPS.

constexpr int N = 16, OUT = R + 2 * N, THREADS = 32 * WARPS, CHANNELS = 32 * WARPS, GROUPS = E / CHANNELS;
constexpr int OCTETS = (SEQS + 7) / 8, ROWS = 8 * OCTETS, DEEP = (R + 31) / 32;
constexpr int PAIR = 2;    // sequences that a warp takes a step of at a time
constexpr int BEHIND = 2;  // sequences that may be on their way back when a slot is taken anew
constexpr int AHEAD = 4;   // sequences whose u and z are on their way
constexpr bool MANY = ROUNDS > 1;  // sequences: for few, longer code costs more than it gains
constexpr int PIECE = 32 * N * sizeof(float);
static_assert(E % CHANNELS == 0 && R % 16 == 0 && SLOTS > BEHIND && AHEAD % PAIR == 0, "sizes not served");

struct Problem {
  const float* projected;  // (SPLITS, B, OUT), their sum is what x_proj makes
  const bf16 *dt_proj, *dt_bias, *A_log, *D;
  const bf16 *u, *uz;  // (B, E) after the convolution; (B, 2 E) with z
  float* ssm_state;    // (B, E, N)
  bf16* y;             // (B, E)
  int64 n_rows, seqs;  // B, and as many of them a block, SEQS at most
};
struct Shared {
  alignas(128) float h[WARPS][SLOTS][32 * N];
  alignas(16) float low[ROWS][OUT + 4], dt[WARPS][32][8 + 1];  // dt of 8 sequences
  Gate brought[WARPS][SLOTS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
INLINE Shared& shared() { return *reinterpret_cast<Shared*>(own_room()); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan(const GRID_CONSTANT Problem p) {
  Shared& s = shared();
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  int seqs = int(p.seqs), first = int(blockIdx.x) / GROUPS * seqs, channel = int(blockIdx.x) % GROUPS * CHANNELS + warp * 32;
  int e = channel + lane, turned = lane / 2 % 4;
  int n_here = int(p.n_rows) - first < seqs ? int(p.n_rows) - first : seqs;
  let_next_begin();

  // States and weights, before what the kernel before makes.
  unsigned long long policy = first_to_leave();
  auto place = [&](int seq) { return p.ssm_state + (int64(first + seq) * E + channel) * N; };
  auto bring_states = [&](int seq) {
    int slot = seq % SLOTS;
    if constexpr (MANY) bring(s.h[warp][slot], place(seq), PIECE, &s.brought[warp][slot], policy);
    else bring(s.h[warp][slot], place(seq), PIECE, &s.brought[warp][slot]);
  };
  auto give_states = [&](int seq) {
    if constexpr (MANY) give(place(seq), s.h[warp][seq % SLOTS], PIECE, policy);
    else give(place(seq), s.h[warp][seq % SLOTS], PIECE);
  };
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) open(&s.brought[warp][i]);
    all_open();
    for (int i = 0; i < SLOTS && i < EARLY && i < n_here; ++i) bring_states(i);
  }
  uint4 wide[2][DEEP][2];
#pragma unroll
  for (int band = 0; band < 2; ++band)
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      bool here = i * 32 + t * 8 < R;
      const bf16* at = p.dt_proj + int64(channel + band * 16 + g) * R + i * 32 + t * 8;
      wide[band][i][0] = here ? once16(at) : make_uint4(0, 0, 0, 0);
      wide[band][i][1] = here ? once16(at + 8 * R) : make_uint4(0, 0, 0, 0);
    }
  float bias = one(p.dt_bias + e), skip = one(p.D + e);
  Packed<bf16, 4> logs[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) logs[k].load(p.A_log + int64(e) * N + (k ^ turned) * 4);
  wait_for_end_before();
  Packed<bf16, 1> u[AHEAD], z[AHEAD];
  auto fetch = [&](int seq, int i) {
    int64 row = int64(first + seq);
    u[i].word[0] = fresh2(p.u + row * E + e), z[i].word[0] = fresh2(p.uz + (2 * row + 1) * E + e);
  };
  auto ask_for_more = [&] {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (i < n_here) fetch(i, i);
    if (lane == 0)
      for (int i = EARLY; i < SLOTS && i < n_here; ++i) bring_states(i);
  };
  if (!MANY) ask_for_more();

  // What x_proj has made, of all sequences of the block: of many before more of the states, which would hold it up.
  float4 part[ROUNDS][SPLITS];
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    int i = tid + r * THREADS, seq = i / (OUT / 4), k = i % (OUT / 4) * 4;
    if (seq < n_here)
#pragma unroll
      for (int j = 0; j < SPLITS; ++j) part[r][j] = fresh4(p.projected + (int64(j) * p.n_rows + first + seq) * OUT + k);
  }
  if (MANY) ask_for_more();
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    int i = tid + r * THREADS, seq = i / (OUT / 4), k = i % (OUT / 4) * 4;
    if (seq >= n_here) continue;
    float total[4] = {part[r][0].x, part[r][0].y, part[r][0].z, part[r][0].w};
#pragma unroll
    for (int j = 1; j < SPLITS; ++j)
      total[0] += part[r][j].x, total[1] += part[r][j].y, total[2] += part[r][j].z, total[3] += part[r][j].w;
    store_floats(&s.low[seq][k], total);
  }
  __syncthreads();

  // dt's wide projection: a warp's 32 channels of 8 sequences, each time before they are taken.
  auto widen = [&](int o) {
    float dt[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      float x[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      if (i * 32 + t * 8 < R && o * 8 + g < n_here) load_floats(&s.low[o * 8 + g][i * 32 + t * 8], x);
      unsigned b[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) b[k] = floats_to_bf16(x[2 * k], x[2 * k + 1]);
#pragma unroll
      for (int band = 0; band < 2; ++band) {
        const uint4 &v = wide[band][i][0], &w = wide[band][i][1];
        multiply_add(dt[band], v.x, w.x, v.y, w.y, b[0], b[1]);
        multiply_add(dt[band], v.z, w.z, v.w, w.w, b[2], b[3]);
      }
    }
#pragma unroll
    for (int band = 0; band < 2; ++band)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        s.dt[warp][band * 16 + g + k / 2 * 8][2 * t + k % 2] = dt[band][k];
    __syncwarp();
  };
  if (OCTETS == 1) widen(0);
  float A2[N];
#pragma unroll
  for (int k = 0; k < N; ++k) A2[k] = -exp2_fast(logs[k / 4].get(k % 4) * LOG2E) * LOG2E;

  // n sequences side by side, PAIR or one.
  auto step = [&](int n, int seq, const Packed<bf16, 1>* packed_u, const Packed<bf16, 1>* packed_z) {
    float x[PAIR], size[PAIR], driven[PAIR], out[PAIR];
    float* own[PAIR];
#pragma unroll
    for (int j = 0; j < PAIR; ++j) {
      if (j >= n) break;
      x[j] = packed_u[j].get(0), out[j] = 0.0f;
      size[j] = softplus(s.dt[warp][lane][(seq + j) % 8] + bias), driven[j] = size[j] * x[j];
      own[j] = s.h[warp][(seq + j) % SLOTS] + lane * N;
    }
#pragma unroll
    for (int j = 0; j < PAIR; ++j)
      if (j < n) wait_at(&s.brought[warp][(seq + j) % SLOTS], (seq + j) / SLOTS % 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      int quarter = (k ^ turned) * 4;
#pragma unroll
      for (int j = 0; j < PAIR; ++j) {
        if (j >= n) break;
        float h[4], drive[4], readout[4];
        load_floats(own[j] + quarter, h);
        load_floats(&s.low[seq + j][R + quarter], drive);
        load_floats(&s.low[seq + j][R + N + quarter], readout);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          h[i] = __fmaf_rn(exp2_fast(size[j] * A2[4 * k + i]), h[i], driven[j] * drive[i]);
          out[j] = __fmaf_rn(h[i], readout[i], out[j]);
        }
        store_floats(own[j] + quarter, h);
      }
    }
    written();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < PAIR; ++j)
        if (j < n) give_states(seq + j);
      for (int j = 0; j < n; ++j) {
        int next = seq + j - BEHIND + SLOTS;
        if (seq + j >= BEHIND && next < n_here) {
          all_read_but<BEHIND>();
          bring_states(next);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < PAIR; ++j) {
      if (j >= n) break;
      float gate = packed_z[j].get(0);
      Packed<bf16, 1> y;
      y.set({__fmaf_rn(skip, x[j], out[j]) * gate * sigmoid(gate)});
      y.store(p.y + int64(first + seq + j) * E + e);
    }
  };
#pragma unroll 1
  for (int base = 0; base < n_here; base += AHEAD) {
    if (OCTETS > 1 && base % 8 == 0) widen(base / 8);
#pragma unroll
    for (int i = 0; i < AHEAD; i += PAIR) {
      if (base + i + PAIR <= n_here) step(PAIR, base + i, u + i, z + i);
      else if (base + i < n_here) step(1, base + i, u + i, z + i);
#pragma unroll
      for (int j = i; j < i + PAIR; ++j)
        if (base + AHEAD + j < n_here) fetch(base + AHEAD + j, j);
    }
  }
  if (lane == 0) all_given();
}
