// What scan_backward keeps in shared memory and in registers, and how dB and dC are summed over channels.

constexpr int TILES = EVERY / T;           // of a piece: the steps between saved states
constexpr int NV = 4;                      // numbers moved at once
constexpr int OF_LANE = CL * NL / NV;      // times that this is done for all of a lane's states: by state, then channel
constexpr int KEPT = TILES > 1 ? TILES - 1 : 1;  // states of a piece: those before its tiles but the last
// Whether a tile's rows are asked for only behind the sums of the tile after it. Until they come they hold one of the six
// scoreboards by which all loads of a warp are waited for. Above 16 states it is slower.
constexpr bool ASK_LATE = N <= 16;
// Whether the sums that du and ddelta are made of are left before all others of a step: 17 to 32 states take 8 % longer
// otherwise, and 16 states 1.5 % longer so (benchmarks/SCAN_NOTES.md).
constexpr bool SUMS_FIRST = N > 16 && TEAM == 1;
// Whether a step's dC is left before the sum that du is made of: 33 to 64 states take 1.8 % less so.
constexpr bool C_FIRST = TEAM > 1;
static_assert(NL % NV == 0, "a lane holds a multiple of 4 states");
static_assert(TEAM == 1 || (TEAM % 2 == 0 && CL == 2 && V == 1), "two lanes for two channels, half of a team each");
constexpr int TEAMS = WARPS / TEAM;        // of a block
constexpr int BC = TEAMS * WC;             // channels of a block
constexpr int SUMMANDS = TEAMS * GROUPS;   // of a sum over them, for dB and dC: each lane has added up its own channels
constexpr int SUMMAND_ROW = SUMMANDS * OF_WARP + OF_WARP % 32;  // rows of different sums on different banks
constexpr int SUMS = T * 2 * NP;           // numbers that a tile's dB and dC have
constexpr int READ = SUMS >= 4 * THREADS ? 4 : SUMS >= 2 * THREADS ? 2 : 1;  // of which a thread adds these up at once
constexpr int CHAINS = 4;                  // in which it does so, side by side
static_assert(SUMMANDS >= CHAINS, "as many summands as sums of them");
constexpr int KINDS = GATE ? 3 : 2;        // sums over states: for the gradients of dt u, of dt, and y

struct WarpShared {
  alignas(16) float sums[KINDS][T][PART_ROW];
  alignas(16) float before[KEPT][OF_LANE][32][NV];  // those before its tiles but the last
};
struct Shared {
  WarpShared warp[WARPS];
  alignas(16) float steps[EVERY][BC][2];  // dt and dt u
#if SOFTPLUS
  alignas(16) float slope[EVERY][BC];
#endif
  alignas(16) float dout[T][BC];

  // Once no tile is at hand: of dD and dbias.
  INLINE float (&of_rows())[2][ROWS][BC] { return reinterpret_cast<float(&)[2][ROWS][BC]>(steps); }
#if !STATIC_B
  alignas(16) float B[EVERY][NP];
#endif
#if !STATIC_C
  alignas(16) float C[EVERY][NP];
#endif
#if !STATIC_B || !STATIC_C
  alignas(16) float summands[T][2][TEAM][SUMMAND_ROW];  // of dB and dC
#endif
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// A lane's place among those who share out rows: here they are rows of the block's channels. Where a team shares states,
// the two channels that lie side by side in a lane of it are those of two lanes here, half a row apart.
constexpr int HALF_ROW = BC / V / 2;
static_assert(TEAM == 1 || (HALF_ROW <= 16 && 32 % HALF_ROW == 0), "those two lanes are of one warp");
INLINE void place_in_block(const Problem& p, Place& a) {
  const int first = a.tile * BC, place = threadIdx.x % (BC / V);
  a.row = threadIdx.x / (BC / V), a.column = TEAM > 1 ? place % HALF_ROW * 2 + place / HALF_ROW : place * V;
  a.e = a.group * p.per_group + int64(first) + a.column;
  a.in_row = int64(first) + a.column < p.per_group;
}

// As load_by_state; two channels at once where their number is even.
INLINE void load_states(Pairs& x, const float* from, const Problem& p, const Place& a) {
  if constexpr (CL == 2 && V == 2) {
#pragma unroll
    for (int i = 0; i < NL; ++i) {
      Packed<float, 2> both;
      both.load_if(a.there > 0 && a.n + i < N, from + by_state(p, a, 0, i));
      x[0][i] = both.get(0), x[1][i] = both.get(1);
    }
  } else {
    load_by_state(x, from, p, a);
  }
}

// The v-th NV numbers of a lane's states.
INLINE void store_some(float* to, const Pairs& h, int v) {
  float x[NV];
#pragma unroll
  for (int i = 0; i < NV; ++i) x[i] = h[(v * NV + i) % CL][(v * NV + i) / CL];
  store_floats(to, x);
}
INLINE void set_some(Pairs& h, int v, const float (&x)[NV]) {
#pragma unroll
  for (int i = 0; i < NV; ++i) h[(v * NV + i) % CL][(v * NV + i) / CL] = x[i];
}

// A lane's part of the rows from `step` on, short of its own `end`: else zeros.
template <typename X>
INLINE void load_rows(Packed<X, V> (&x)[ITS], const Rows<X>& rows, const Place& a, int step, int end) {
#pragma unroll
  for (int i = 0; i < ITS; ++i) {
    const int t = step + i * ROWS + a.row;
    x[i].load_if(t < end, rows.at(t));
  }
}

// The sums over states of one kind at row t of a tile, for a lane's V channels. Of the parts that a team has left, two
// lanes with channels side by side add up a half each, for both channels, as these lie, and exchange what they got: one
// channel alone would be read number by number.
INLINE void add_states(const Shared& block, int kind, int t, const Place& a, float (&total)[V]) {
  const int team = a.column / WC * TEAM, column = a.column % WC;
  if constexpr (TEAM == 1) {
    add_parts(block.warp[team].sums[kind][t], t, column, total);
  } else {
    const bool second = column % 2;
    float sum[2];
#pragma unroll
    for (int w = 0; w < TEAM / 2; ++w) {
      float some[2];
      add_parts(block.warp[team + second * (TEAM / 2) + w].sums[kind][t], t, column - second, some);
#pragma unroll
      for (int j = 0; j < 2; ++j) sum[j] = w ? sum[j] + some[j] : some[j];
    }
    total[0] = (second ? sum[1] : sum[0]) + across(second ? sum[0] : sum[1], HALF_ROW);
  }
}

// What a lane loads of a tile for the way back.
struct Elements {
  Packed<DY, V> dy[ITS];
  Packed<U, V> u[ITS];
#if GATE
  Packed<Z, V> z[ITS];
#endif
};

// What is left to do of a tile when the way back through it is done.
struct Late {
  int first;  // its first step
  Packed<U, V> u[ITS];
  float dout[ITS][V], dt[ITS][V];
#if GATE
  float z_factor[ITS][V];  // of y in dz
#endif
#if SOFTPLUS
  float slope[ITS][V];
#endif

  // Nothing: as of a tile at the end.
  INLINE void clear(int end) {
    first = end;
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      u[i].clear();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        dout[i][v] = dt[i][v] = 0.0f;
#if GATE
        z_factor[i][v] = 0.0f;
#endif
#if SOFTPLUS
        slope[i][v] = 0.0f;
#endif
      }
    }
  }
};

// What a lane needs of a step on the way back.
struct Step {
  float dt[CL], dtu[CL], dout[CL];
#if STATIC_B
#define B_AT(j, i) b_static[j][i]
#else
#define B_AT(j, i) x.b[i]
  float b[NL];
#endif
#if STATIC_C
#define C_AT(j, i) c_static[j][i]
#else
#define C_AT(j, i) x.c[i]
  float c[NL];
#endif

  // Step t of the piece: what the state needs.
  INLINE void read(const Shared& block, int t, const Place& a) {
    float steps[2 * CL];
    load_floats(&block.steps[t][a.warp / TEAM * WC + a.lane / S * CL][0], steps);
#pragma unroll
    for (int j = 0; j < CL; ++j) dt[j] = steps[2 * j], dtu[j] = steps[2 * j + 1];
#if !STATIC_B
    load_floats(&block.B[t][a.n], b);
#endif
  }
  // Step t of the tile that begins at `first`: what the way back needs besides.
  INLINE void read_more(const Shared& block, int first, int t, const Place& a) {
    load_floats(&block.dout[t][a.warp / TEAM * WC + a.lane / S * CL], dout);
#if !STATIC_C
    load_floats(&block.C[first + t][a.n], c);
#endif
  }
};

#if !STATIC_B || !STATIC_C
// A tile's dB and dC over the lanes of the block, to its share: that of the steps from `first` on, short of `end`.
INLINE void add_over_block(const float (&summands)[T][2][TEAM][SUMMAND_ROW], float* share_B, float* share_C, int stride,
                           int first, int end) {
#pragma unroll
  for (int i = 0; i < (SUMS + THREADS * READ - 1) / (THREADS * READ); ++i) {
    const int o = (i * THREADS + threadIdx.x) * READ;
    if (SUMS % (THREADS * READ) && o >= SUMS) break;
    const int n = o % NP, of_C = o / NP % 2, t = o / NP / 2;
    const float* row = &summands[t][of_C][n / OF_WARP][n % OF_WARP];
    float sum[READ], part[CHAINS][READ], x[READ];  // every CHAINS-th summand in a sum of its own: they wait less
#pragma unroll
    for (int w = 0; w < SUMMANDS; ++w) {
      load_floats(row + w * OF_WARP, x);
#pragma unroll
      for (int k = 0; k < READ; ++k) part[w % CHAINS][k] = w < CHAINS ? x[k] : part[w % CHAINS][k] + x[k];
    }
#pragma unroll
    for (int k = 0; k < READ; ++k) sum[k] = (part[0][k] + part[1][k]) + (part[2][k] + part[3][k]);
    float* share = step_at((of_C ? share_C : share_B) + n, stride, first + t);
    if constexpr (N % READ == 0) {
      Packed<float, READ> out;
      out.set(sum);
      out.store_if(first + t < end && (of_C ? !STATIC_C : !STATIC_B) && n < N, share);
    } else if (first + t < end && (of_C ? !STATIC_C : !STATIC_B)) {
      for (int k = 0; k < READ; ++k)
        if (n + k < N) share[k] = sum[k];
    }
  }
}
#endif
