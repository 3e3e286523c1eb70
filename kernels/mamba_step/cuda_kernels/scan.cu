// dt_proj, a step of the states and the gate, of one token: the second half of what lies between the two projections of
// a Mamba block. Nearly all of it is the states' way from memory and back.
//
// A warp has 32 channels, a lane one of them, of the block's sequences one after another. The 2 KB of states that
// it takes for each come to shared memory by themselves (bulk copies), up to SLOTS of them on their way from the time
// before the kernel before has ended, and go back in the same way. So do the warp's rows of dt_proj: loads to registers
// have to find room in the L1 cache, and small ones have to wait behind them. A lane takes the four quarters of its
// channel's states in an order of its own, so that the lanes of a warp meet in no bank.
//
// With a journal (../journal.py) the states may lie in memory as they were some tokens ago: HELD, whose inputs come with
// them and are taken first, by the same operations. Where the token is to be KEPT its inputs go to the journal and no
// states back.
//
// Letters: B sequences, E inner width, R rank of dt, N states (16); macros, but B, as are SPLITS, SEQS (that there
// is room for), ROUNDS (of the block's threads, that bring in what x_proj has made of its sequences), SLOTS, EARLY,
// WARPS, HELD, KEPT, ENTRIES (of the journal, of a channel of a sequence) and ENTRY (their words of 32 channels).

constexpr int N = 16, OUT = R + 2 * N, THREADS = 32 * WARPS, CHANNELS = 32 * WARPS, GROUPS = E / CHANNELS;
constexpr int OCTETS = (SEQS + 7) / 8, ROWS = 8 * OCTETS, DEEP = (R + 31) / 32;
constexpr int PAIR = 2;    // sequences that a warp takes a step of at a time
constexpr int BEHIND = KEPT ? 0 : 2;  // sequences that may be on their way back when a slot is taken anew
constexpr bool MANY = ROUNDS > 1;  // sequences
constexpr int PIECE = 32 * N * sizeof(float);
constexpr int HELD_BYTES = HELD * ENTRY * sizeof(float);
static_assert(ENTRY == 32 + 16, "sizes of steps, float, and u, bf16");
static_assert(E % CHANNELS == 0 && R % 16 == 0 && SLOTS > BEHIND && EARLY + DEEP <= SLOTS, "sizes not served");

struct Problem {
  const float* projected;  // (SPLITS, B, OUT), their sum is what x_proj makes
  const bf16 *dt_proj, *dt_bias, *A_log, *D;
  const bf16 *u, *uz;  // (B, E) after the convolution; (B, 2 E) with z
  float* ssm_state;    // (B, E, N)
  bf16* y;             // (B, E)
  float* inputs;       // the journal: (B, E / 32, ENTRIES, ENTRY); 0 if there is none
  float* drives;       // and (ENTRIES, B, N), what x_proj has made that the states are driven by
  int64 n_rows, seqs;  // B, and as many of them a block, SEQS at most
  int64 soon;          // blocks that begin while x_proj is still being made
};
struct Shared {
  alignas(128) float h[WARPS][SLOTS][32 * N + HELD * ENTRY];
  alignas(16) float drives[HELD ? HELD : 1][ROWS][N];
  alignas(16) float low[ROWS][OUT + 4];
  // Of 8 sequences: sizes of steps, gates and u, in whose place comes y.
  alignas(16) float size[WARPS][32][8 + 1], gate[WARPS][8][32 + 1];
  alignas(16) bf16 u[WARPS][8][32];
  Gate brought[WARPS][SLOTS], weights[WARPS], held;
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);
INLINE Shared& shared() { return *reinterpret_cast<Shared*>(own_room()); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan(const GRID_CONSTANT Problem p) {
  Shared& s = shared();
  int tid = threadIdx.x, lane = tid % 32, warp = uniform(tid / 32), g = lane / 4, t = lane % 4;
  int seqs = int(p.seqs), first = int(blockIdx.x) / GROUPS * seqs;
  int channel = int(blockIdx.x) % GROUPS * CHANNELS + warp * 32;
  int e = channel + lane, turned = lane / 2 % 4;
  int n_here = int(p.n_rows) - first < seqs ? int(p.n_rows) - first : seqs;
  let_next_begin();

  // States and weights, before what the kernel before makes: dt_proj's to the last slots.
  unsigned long long policy = first_to_leave();
  auto place = [&](int seq) { return p.ssm_state + (int64(first + seq) * E + channel) * N; };
  auto entries = [&](int seq) { return p.inputs + (int64(first + seq) * E + channel) / 32 * (ENTRIES * ENTRY); };
  auto bring_states = [&](int seq) {
    int slot = seq % SLOTS;
    if constexpr (MANY) bring(s.h[warp][slot], place(seq), PIECE, &s.brought[warp][slot], policy);
    else bring(s.h[warp][slot], place(seq), PIECE, &s.brought[warp][slot]);
    if constexpr (HELD > 0) bring(s.h[warp][slot] + 32 * N, entries(seq), HELD_BYTES, &s.brought[warp][slot]);
  };
  auto give_states = [&](int seq) {
    if constexpr (MANY) give(place(seq), s.h[warp][seq % SLOTS], PIECE, policy);
    else give(place(seq), s.h[warp][seq % SLOTS], PIECE);
  };
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) open(&s.brought[warp][i], HELD ? 2 : 1);
    open(&s.weights[warp]);
    if (HELD && warp == 0) open(&s.held, HELD);
    all_open();
    bring(s.h[warp][SLOTS - DEEP], p.dt_proj + int64(channel) * R, 32 * R * sizeof(bf16), &s.weights[warp]);
    for (int i = 0; i < EARLY && i < n_here; ++i) bring_states(i);
    if (HELD && warp == 0)
      for (int i = 0; i < HELD; ++i)
        bring(s.drives[i], p.drives + (i * p.n_rows + first) * N, n_here * N * sizeof(float), &s.held);
  }
  float bias[2][2], skip = one(p.D + e);  // of a lane's rows of two bands
#pragma unroll
  for (int band = 0; band < 2; ++band)
#pragma unroll
    for (int half = 0; half < 2; ++half) bias[band][half] = one(p.dt_bias + channel + band * 16 + half * 8 + g);
  Packed<bf16, 4> logs[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) logs[k].load(p.A_log + int64(e) * N + (k ^ turned) * 4);
  __syncwarp();
  wait_at(&s.weights[warp]);
  uint4 wide[2][DEEP][2];
#pragma unroll
  for (int band = 0; band < 2; ++band)
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      bool here = i * 32 + t * 8 < R;
      const bf16* at = reinterpret_cast<const bf16*>(s.h[warp][SLOTS - DEEP]) + (band * 16 + g) * R + i * 32 + t * 8;
      wide[band][i][0] = here ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
      wide[band][i][1] = here ? *reinterpret_cast<const uint4*>(at + 8 * R) : make_uint4(0, 0, 0, 0);
    }
  float A2[N];
#pragma unroll
  for (int k = 0; k < N; ++k) A2[k] = -exp2_fast(logs[k / 4].get(k % 4) * LOG2E) * LOG2E;
  __syncwarp();  // all lanes have their part of dt_proj
  // The rest of the states: while x_proj is made memory has nothing else to do. Other blocks begin when that is over: for
  // them the sums come first.
  bool soon = int(blockIdx.x) < p.soon;
  auto bring_rest = [&] {
    if (lane == 0)
      for (int i = EARLY; i < SLOTS && i < n_here; ++i) bring_states(i);
  };
  if (soon) bring_rest();
  wait_for_end_before();
  uint4 next_u = make_uint4(0, 0, 0, 0), next_z = next_u;  // of 8 sequences, of which four lanes have 8 channels each
  auto fetch = [&](int o) {
    int64 row = first + o * 8 + g;
    if (o * 8 + g >= n_here) return;
    next_u = fresh16(p.u + row * E + channel + t * 8), next_z = fresh16(p.uz + (2 * row + 1) * E + channel + t * 8);
  };
  fetch(0);
  // What x_proj has made, of all sequences of the block.
  float4 part[ROUNDS][SPLITS];
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    int i = tid + r * THREADS, seq = i / (OUT / 4), k = i % (OUT / 4) * 4;
    if (seq < n_here)
#pragma unroll
      for (int j = 0; j < SPLITS; ++j) part[r][j] = fresh4(p.projected + (int64(j) * p.n_rows + first + seq) * OUT + k);
  }
  if (!soon) bring_rest();
  // u and gates: a warp's 32 channels of 8 sequences, each time before they are taken.
  auto take = [&](int o) {
    *reinterpret_cast<uint4*>(&s.u[warp][g][t * 8]) = next_u;
    Packed<bf16, 8> z = packed(next_z);
#pragma unroll
    for (int k = 0; k < 8; ++k) s.gate[warp][g][t * 8 + k] = z.get(k) * sigmoid(z.get(k));
    if (OCTETS > 1) fetch(o + 1);
  };
  take(0);
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    int i = tid + r * THREADS, seq = i / (OUT / 4), k = i % (OUT / 4) * 4;
    if (seq >= n_here) continue;
    float total[4] = {part[r][0].x, part[r][0].y, part[r][0].z, part[r][0].w};
#pragma unroll
    for (int j = 1; j < SPLITS; ++j)
      total[0] += part[r][j].x, total[1] += part[r][j].y, total[2] += part[r][j].z, total[3] += part[r][j].w;
    store_floats(&s.low[seq][k], total);
    if (KEPT && int(blockIdx.x) % GROUPS == 0 && k >= R && k < R + N)
      store_floats(p.drives + (HELD * p.n_rows + first + seq) * N + k - R, total);
  }
  __syncthreads();
  if (HELD) wait_at(&s.held);

  // Likewise sizes of steps, by dt's wide projection.
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
        s.size[warp][band * 16 + g + k / 2 * 8][2 * t + k % 2] = softplus(dt[band][k] + bias[band][k / 2]);
    __syncwarp();
  };

  // n sequences side by side, PAIR or one.
  auto step = [&](int n, int seq) {
    float x[PAIR], size[PAIR], driven[PAIR], out[PAIR], h[PAIR][4][4];  // quarters, in the lane's order
    float past_size[PAIR][HELD ? HELD : 1], past_driven[PAIR][HELD ? HELD : 1];
    float* own[PAIR];
#pragma unroll
    for (int j = 0; j < PAIR; ++j) {
      if (j >= n) break;
      x[j] = one(&s.u[warp][(seq + j) % 8][lane]), out[j] = 0.0f;
      size[j] = s.size[warp][lane][(seq + j) % 8], driven[j] = size[j] * x[j];
      own[j] = s.h[warp][(seq + j) % SLOTS] + lane * N;
    }
#pragma unroll
    for (int j = 0; j < PAIR; ++j)
      if (j < n) wait_at(&s.brought[warp][(seq + j) % SLOTS], (seq + j) / SLOTS % 2);
#pragma unroll
    for (int j = 0; j < PAIR; ++j)
#pragma unroll
      for (int past = 0; past < HELD; ++past) {
        if (j >= n) break;
        const float* entry = s.h[warp][(seq + j) % SLOTS] + 32 * N + past * ENTRY;
        float x = one(reinterpret_cast<const bf16*>(entry + 32) + lane);
        past_size[j][past] = entry[lane], past_driven[j][past] = entry[lane] * x;
      }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      int quarter = (k ^ turned) * 4;
#pragma unroll
      for (int j = 0; j < PAIR; ++j) {
        if (j >= n) break;
        float drive[4], readout[4];
        load_floats(own[j] + quarter, h[j][k]);
        load_floats(&s.low[seq + j][R + quarter], drive);
        load_floats(&s.low[seq + j][R + N + quarter], readout);
#pragma unroll
        for (int past = 0; past < HELD; ++past) {
          float driver[4];
          load_floats(&s.drives[past][seq + j][quarter], driver);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            h[j][k][i] = __fmaf_rn(exp2_fast(past_size[j][past] * A2[4 * k + i]), h[j][k][i],
                                   past_driven[j][past] * driver[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          h[j][k][i] = __fmaf_rn(exp2_fast(size[j] * A2[4 * k + i]), h[j][k][i], driven[j] * drive[i]);
          out[j] = __fmaf_rn(h[j][k][i], readout[i], out[j]);
        }
      }
    }
    if (KEPT) {
#pragma unroll
      for (int j = 0; j < PAIR; ++j) {
        if (j >= n) break;
        float* entry = entries(seq + j) + HELD * ENTRY;
        entry[lane] = size[j];
        reinterpret_cast<bf16*>(entry + 32)[lane] = s.u[warp][(seq + j) % 8][lane];
      }
    } else {
      // Not before: what is read after something was written has to wait for that, which might be the same.
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < PAIR; ++j)
          if (j < n) store_floats(own[j] + (k ^ turned) * 4, h[j][k]);
      written();
    }
    __syncwarp();
    if (lane == 0) {
      if (!KEPT)
#pragma unroll
        for (int j = 0; j < PAIR; ++j)
          if (j < n) give_states(seq + j);
      for (int j = 0; j < n; ++j) {
        int next = seq + j - BEHIND + SLOTS;
        if (seq + j >= BEHIND && next < n_here) {
          if (!KEPT) all_read_but<BEHIND>();
          bring_states(next);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < PAIR; ++j) {
      if (j >= n) break;
      int at = (seq + j) % 8;
      float y = __fmaf_rn(skip, x[j], out[j]) * s.gate[warp][at][lane];
      s.u[warp][at][lane].bits = (unsigned short)floats_to_bf16(y, 0.0f);
    }
  };
#pragma unroll 1
  for (int o = 0; o < OCTETS && o * 8 < n_here; ++o) {
    int base = o * 8;
    if (o) take(o);
    widen(o);
#pragma unroll 1
    for (int i = 0; i < 8; i += PAIR) {
      if (base + i + PAIR <= n_here) step(PAIR, base + i);
      else if (base + i < n_here) step(1, base + i);
    }
    __syncwarp();
    if (base + g < n_here)
      *reinterpret_cast<uint4*>(p.y + int64(first + base + g) * E + channel + t * 8) =
          *reinterpret_cast<uint4*>(&s.u[warp][g][t * 8]);
  }
  if (lane == 0) all_given();
}
