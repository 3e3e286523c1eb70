// What scan_backward keeps in shared memory and in registers, and how dB and dC are summed over channels.

// Steps of a piece: above 32 states half of those between saved states, so that two blocks fit a multiprocessor.
constexpr int STRETCH = N > 32 ? EVERY / 2 : EVERY;
constexpr int TILES = STRETCH / T;         // of a piece
constexpr int NV = 4;                      // numbers moved at once
static_assert(NL % NV == 0, "a lane holds a multiple of 4 states");
static_assert(STRETCH % T == 0 && EVERY % STRETCH == 0, "pieces of time must nest");
// Sums over channels: lanes with the same states halve what they have to sum, each pair of them by shuffles, until ORDERS
// lanes have KEPT states each; GROUPS / ORDERS such sums are left in a warp, SUMMANDS in a block.
constexpr int ORDERS = NL < GROUPS ? NL : GROUPS;
constexpr int KEPT = NL / ORDERS;
constexpr int SUMMANDS = WARPS * GROUPS / ORDERS;
constexpr int SUMMAND_ROW = SUMMANDS * NP + NP % 32;  // rows of different sums on different banks
constexpr int SUMS = T * 2 * NP;           // numbers that a tile's dB and dC have
constexpr int READ = SUMS >= 4 * THREADS ? 4 : SUMS >= 2 * THREADS ? 2 : 1;  // of which a thread adds these up at once
constexpr int KINDS = GATE ? 3 : 2;        // sums over states: for the gradients of dt u, of dt, and y

struct WarpShared {
  alignas(16) float steps[STRETCH][WC][2];  // dt and dt u
#if SOFTPLUS
  alignas(16) float slope[STRETCH][WC];
#endif
  alignas(16) float dout[T][WC];
  alignas(16) float sums[KINDS][T][PART_ROW];
  alignas(16) float before[TILES > 1 ? TILES - 1 : 1][CL][NL / NV][32][NV];
};
struct Shared {
  WarpShared warp[WARPS];
#if !STATIC_B
  alignas(16) float B[STRETCH][ORDERS][NP];
#endif
#if !STATIC_C
  alignas(16) float C[STRETCH][ORDERS][NP];
#endif
#if !STATIC_B || !STATIC_C
  alignas(16) float summands[2][T][2][SUMMAND_ROW];  // of dB and dC
#endif
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// The order of states (Place::turn) of a group of lanes: so that of two lanes that share a sum, each keeps the lower half of
// what it holds and sends the upper one, whoever it is.
INLINE constexpr int turn_of(int group) {
  int turn = 0;
  for (int width = NL / 2, mask = 1; mask < ORDERS; width /= 2, mask *= 2)
    if (group & mask) turn |= width;
  return turn;
}

// Rows of B or C to shared memory, in all orders of states.
template <typename Rows> INLINE void put_in_orders(const Rows& rows, float (*to)[ORDERS][NP]) {
#pragma unroll
  for (int i = 0; i < Rows::ITS; ++i) {
    const int k = i * THREADS + threadIdx.x, n = k % Rows::A_ROW * VB;
#pragma unroll
    for (int order = 0; order < ORDERS; ++order) {
      const int turn = turn_of(order);
      float values[VB];
#pragma unroll
      for (int j = 0; j < VB; ++j) values[j] = rows.x[i].get(j ^ (turn & (VB - 1)));
      if (k < Rows::TOTAL) store_floats(&to[k / Rows::A_ROW][order][n ^ (turn & ~(VB - 1))], values);
    }
  }
}

// A lane's part of the rows from `step` on, short of its own `end`: else zeros.
template <typename X> INLINE void load_rows(Packed<X, V> (&x)[ITS], const Rows<X>& rows, const Place& a, int step, int end) {
#pragma unroll
  for (int i = 0; i < ITS; ++i) {
    const int t = step + i * ROWS + a.row;
    x[i].load_if(t < end, rows.at(t));
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
  INLINE void read(const Shared& block, const WarpShared& shared, int t, const Place& a) {
    float steps[2 * CL];
    load_floats(&shared.steps[t][a.lane / S * CL][0], steps);
#pragma unroll
    for (int j = 0; j < CL; ++j) dt[j] = steps[2 * j], dtu[j] = steps[2 * j + 1];
#if !STATIC_B
    load_floats(&block.B[t][a.lane / S % ORDERS][a.n], b);
#endif
  }
  // Step t of the tile that begins at `first`: what the way back needs besides.
  INLINE void read_more(const Shared& block, const WarpShared& shared, int first, int t, const Place& a) {
    load_floats(&shared.dout[t][a.lane / S * CL], dout);
#if !STATIC_C
    load_floats(&block.C[first + t][a.lane / S % ORDERS][a.n], c);
#endif
  }
};

#if !STATIC_B || !STATIC_C
// A lane's part of a step's dB or dC, summed over ORDERS lanes, to the block's.
INLINE void leave_summands(float (&x)[NL], float* row, const Place& a) {
#pragma unroll
  for (int width = NL / 2, mask = S; width >= KEPT; width /= 2, mask *= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] += across(x[i + width], mask);
  float mine[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) mine[i] = x[i];
  store_floats(row + (a.warp * (GROUPS / ORDERS) + a.lane / S / ORDERS) * NP + a.n + a.turn, mine);
}

// The sums of these over the block, to its share: that of the tile's steps from `first` on, short of `end`.
INLINE void add_over_block(const float (&summands)[T][2][SUMMAND_ROW], float* share_B, float* share_C, int stride,
                           int first, int end) {
#pragma unroll
  for (int i = 0; i < (SUMS + THREADS * READ - 1) / (THREADS * READ); ++i) {
    const int o = (i * THREADS + threadIdx.x) * READ;
    if (SUMS % (THREADS * READ) && o >= SUMS) break;
    const int n = o % NP, of_C = o / NP % 2, t = o / NP / 2;
    const float* row = &summands[t][of_C][n];
    float sum[READ], x[READ];
    load_floats(row, sum);
#pragma unroll
    for (int w = 1; w < SUMMANDS; ++w) {
      load_floats(row + w * NP, x);
#pragma unroll
      for (int i = 0; i < READ; ++i) sum[i] += x[i];
    }
    float* share = step_at((of_C ? share_C : share_B) + n, stride, first + t);
    if constexpr (N % READ == 0) {
      Packed<float, READ> out;
      out.set(sum);
      out.store_if(first + t < end && (of_C ? !STATIC_C : !STATIC_B) && n < N, share);
    } else if (first + t < end && (of_C ? !STATIC_C : !STATIC_B)) {
      {
        for (int i = 0; i < READ; ++i)
          if (n + i < N) share[i] = sum[i];
      }
    }
  }
}
#endif
