// What the CUDA kernels of the selective scan share. Compiled at run time by NVRTC, with no header of CUDA's.
//
// A warp takes WC channels of a sequence. A channel's N states lie in the registers of S lanes, NL each; a lane has CL
// channels next to each other, so that what it reads of B and C serves several. Steps go by tiles of T. What is done
// for each (step, channel) once, and not for each state (softplus, gates, loads and stores), is shared out among the
// lanes in another way, of the warp or of the whole block: a lane takes V channels of some rows of the tile. The two
// meet in shared memory. In the backward a team of several warps may share the states of the same channels, each with
// NL states in S lanes.
//
// No result may depend on V, T or a forward's CL and WARPS: sums over states are over NL states in a lane and then over S
// lanes, in order. So the number of sequences may choose CL (how many channels share a warp's work) and changes no bit.
// (In which order channels are summed for dB and dC follows from the backward's CL, WARPS and TEAM, and from nothing else.)
//
// Macros, set when compiled: N, NL, S, CL, T, V, VB (elements of B and C in one load), WARPS, MIN_BLOCKS (that a
// multiprocessor is to have room for), TEAM (warps that share the states of their channels), AT_ONCE (steps whose states a
// forward computes together), EVERY (steps between saved states), CHUNK, PART (steps of a chunk that are run from 0 to find
// what enters chunks), UNIT and SPAN (steps of the backward: those of a share of dA, dD and dbias, and those that a block
// walks), ENTERING (steps of the pieces of which it is told what gradient enters them), SOFTPLUS, GATE (whether there is a
// z), STATIC_B, STATIC_C, BACKWARDS (whether it reads as backward.cu does: device.cu), FORWARD (whether it is forward.cu:
// numbers.cu), and the types U, DELTA, Z, DY, MB, MC of the tensors.
//
// Letters: N states, D channels, G groups; T tokens of all sequences laid end to end where a shape names them.

constexpr int OF_WARP = NL * S;           // states that a warp has of its channels
constexpr int NP = TEAM * OF_WARP;        // N, filled up
constexpr int GROUPS = 32 / S;            // of lanes that share a channel
constexpr int WC = GROUPS * CL;           // channels of a warp
constexpr int ROW_LANES = WC / V;         // lanes that share a row of a tile
constexpr int ROWS = 32 * TEAM / ROW_LANES;  // rows that a team takes at once
constexpr int ITS = T / ROWS;             // times that it does so in a tile
constexpr int THREADS = 32 * WARPS;
static_assert(WARPS % TEAM == 0, "teams fill a block");
static_assert(ROW_LANES >= 1 && ROW_LANES <= 32 && ITS >= 1 && T % ROWS == 0, "a tile does not fit its warp");
static_assert(EVERY % T == 0 && UNIT % EVERY == 0 && SPAN % UNIT == 0 && CHUNK % SPAN == 0, "pieces of time must nest");
static_assert(CHUNK % PART == 0 && PART % T == 0, "and parts of chunks");

// One list of arguments for all kernels, as cuda_plan.py fills it in. What is absent is null.
struct Problem {
  U* u; DELTA* delta; Z* z; DY* dy; MB* B; MC* C;
  const float *A, *D, *bias;              // A, static B and C (D, N)
  const int* cu_seqlens;
  const float* first;                     // (S, D, N): what enters the first chunk of a sequence
  float *own, *sums;                      // (part, N, D), (part, D)
  float *entering, *share_A;              // (piece, N, D): the gradient that enters it, from the right; (unit, N, D)
  U* y; float *final_state, *saved;       // saved (slot, N, D): the state before every EVERY-th step
  U* du; DELTA* ddelta; Z* dz; float* dh0;
  float *share_B, *share_C, *share_D, *share_bias;
  float* dA; MB* dB; MC* dC; float *dD, *dbias;
  int64 B_group, C_group, length, n_tokens, n_seqs, n_channels, per_group, tiles_of_group, n_tiles, n_units;
  int64 reverse, backwards;
  // From one step to the next, in bytes: negative if reversed. The outputs' have U's, DELTA's and Z's size. A product of
  // two numbers of 32 bits that is added to an address is one instruction.
  int u_stride, delta_stride, z_stride, dy_stride, B_stride, C_stride, U_stride, DELTA_stride, Z_stride, share_stride;
};

// Sums and step sizes ------------------------------------------------------------------------------------------------

// Sums over the S lanes of a channel, by way of shared memory: at a step t each lane leaves its parts for its CL
// channels in a row of 32 CL numbers, and whoever wants the sums for K channels reads all S parts of each. The parts of
// a channel lie side by side; pieces of four change places so that lanes that store, or read, meet different banks.
constexpr int PART_ROW = 32 * CL;

INLINE int part_at(int t, int i) { return ((i >> 2) ^ (((i >> 5) ^ t) & 1)) << 2 | (i & 3); }

INLINE void leave_parts(float* row, int t, int lane, const float (&x)[CL]) {
  store_floats(row + part_at(t, lane * CL), x);
}

// The sums for K channels from `column` on, over the lanes in order.
template <int K> INLINE void add_parts(const float* row, int t, int column, float (&sum)[K]) {
  constexpr int READ = K >= CL ? K * S : K, PIECE = READ % 4 == 0 ? 4 : READ, TIMES = K >= CL ? 1 : S;
  float x[TIMES][READ];
#pragma unroll
  for (int q = 0; q < TIMES; ++q) {
    const int first = (column / CL * S + q) * CL + column % CL;
#pragma unroll
    for (int i = 0; i < READ; i += PIECE) {
      float piece[PIECE];
      load_floats(row + part_at(t, first + i), piece);
#pragma unroll
      for (int k = 0; k < PIECE; ++k) x[q][i + k] = piece[k];
    }
  }
#pragma unroll
  for (int v = 0; v < K; ++v) {
#pragma unroll
    for (int q = 0; q < S; ++q) {
      const float part = K >= CL ? x[0][(v / CL * S + q) * CL + v % CL] : x[q % TIMES][v % READ];
      sum[v] = q ? sum[v] + part : part;
    }
  }
}

// dt = log(1 + exp(x)) of x = delta + bias, and its derivative, 1 / (1 + exp(-x)); both keep their digits where they are
// small. Where delta has 16 bits, and so an error of up to 2^-12 of itself or more, 7 instructions fewer do: the argument
// of exp2 is rounded as it is, which costs 8e-8 |x|, and log1p(e) / e is a polynomial of degree 6 (relative error 1.3e-6).
// From 1e-5 to 20 dt is good to 2e-6 of itself.
constexpr bool IN_SHORT = sizeof(DELTA) == 2;
INLINE float exp_of_minus_abs(float x) {
  return IN_SHORT ? exp2_fast(fabsf(x) * -LOG2E) : exp_negative(-fabsf(x));
}
INLINE float step_size_of(float x, float e) {
  if (!IN_SHORT) return softplus_of(x, e);
  constexpr float LOG1P[] = {0.014141053892672062f, -0.06640192866325378f, 0.14922408759593964f, -0.23503875732421875f,
                             0.33109453320503235f,  -0.4998696744441986f,  0.9999987483024597f};
  return __fmaf_rn(e, polynomial(LOG1P, e), positive(x));
}

INLINE float step_size(float x) { return SOFTPLUS ? step_size_of(x, exp_of_minus_abs(x)) : x; }

INLINE float step_size(float x, float& slope) {
  if (!SOFTPLUS) return slope = 1.0f, x;
  float e = exp_of_minus_abs(x), root = reciprocal(1.0f + e);
  slope = x < 0.0f ? e * root : root;  // a NaN is in dt, and so in all that the slope is multiplied with
  return step_size_of(x, e);
}

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(x * -LOG2E)); }

// Who does what ------------------------------------------------------------------------------------------------------

INLINE int64 pieces_of(int64 length, int steps) { return length > steps ? (length + steps - 1) / steps : 1; }

// A piece of time, by its number: as sequences.checkpoint_slots and Triton's piece_of count them. A sequence has one
// piece at least, though it may be empty. Packed, piece p of sequence s has the number start / steps + s + p, which
// leaves gaps: numbers whose piece begins beyond the end of its sequence, and not at 0.
struct Piece {
  int64 s; int start, length, begin;

  // All of a sequence.
  INLINE Piece(const Problem& p, int64 s) : s(s), start(s * p.length), length(p.length), begin(0) {
    if (p.cu_seqlens) start = p.cu_seqlens[s], length = p.cu_seqlens[s + 1] - start;
  }
  INLINE Piece(const Problem& p, int64 number, int64 pieces_of_one, int steps) {
    if (!p.cu_seqlens) {
      s = number / pieces_of_one;
      start = s * p.length, length = p.length;
      begin = (number - s * pieces_of_one) * steps;
    } else {
      int64 beyond = p.n_seqs;  // bisection for the last sequence whose first piece has no higher number
      s = 0;
      while (beyond - s > 1) {
        int64 middle = (s + beyond) / 2;
        if (p.cu_seqlens[middle] / steps + middle <= number) s = middle; else beyond = middle;
      }
      start = p.cu_seqlens[s], length = p.cu_seqlens[s + 1] - p.cu_seqlens[s];
      begin = (number - s - start / steps) * steps;
    }
  }

  // Whether there is nothing in it, not even the end of a sequence of no steps.
  INLINE bool beyond() const { return begin > 0 && begin >= length; }

  // The number of a piece of this sequence.
  INLINE int64 number_of(const Problem& p, int step, int steps) const {
    const int64 first = p.cu_seqlens ? start / steps + s : s * pieces_of(p.length, steps);
    return first + step / steps;
  }
};

// What a block of the forward runs, up to a step: a chunk, or all of a sequence if nobody says what enters the chunks
// (p.own).
INLINE Piece find_run(const Problem& p, int64 number, int& stop) {
  const Piece piece = p.own ? Piece(p, number, pieces_of(p.length, CHUNK), CHUNK) : Piece(p, number);
  stop = p.own && piece.begin + CHUNK < piece.length ? piece.begin + CHUNK : piece.length;
  return piece;
}

// A block's place; and a lane's among the channels, as holder of states, and as one of those who share out rows.
struct Place {
  int64 number;    // of the block's piece of time, or sequence
  int lane, warp, group, tile;
  int64 d;         // its first channel as holder of states
  int there;       // how many of its CL channels there are
  int n;           // its first state
  int row, column; // its first row in a tile, its first channel in a row of the warp's
  int64 e;         // its first channel there
  bool in_row;     // whether it is one

  INLINE Place(const Problem& p) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS;
    const unsigned n_tiles = p.n_tiles, of_group = p.tiles_of_group;  // a division of 64 bits takes much longer
    number = blockIdx.x / n_tiles, tile = blockIdx.x % n_tiles, group = 0;
    if (of_group < n_tiles) group = tile / of_group, tile %= of_group;
    int64 first = (int64(tile) * (WARPS / TEAM) + warp / TEAM) * WC;  // of the group's channels
    int mine = lane / S * CL;
    d = group * p.per_group + first + mine;
    int64 left = p.per_group - first - mine;
    there = left < 0 ? 0 : left > CL ? CL : left;
    n = warp % TEAM * OF_WARP + lane % S * NL;
    row = lane / ROW_LANES, column = lane % ROW_LANES * V;
    e = group * p.per_group + first + column;
    in_row = first + column < p.per_group;
  }
};

// The address of a step's row of a tensor whose rows are tokens, and that of a sequence's first step.
template <typename X> INLINE X* step_at(X* first, int stride, int step) {
#if BACKWARDS
  return reinterpret_cast<X*>(product_added(first, step, stride));
#else
  return reinterpret_cast<X*>((char*)first + int64(step) * stride);
#endif
}
template <typename X> INLINE X* first_row(X* x, int stride, const Problem& p, const Piece& piece) {
  const int token = piece.start + (p.reverse ? piece.length - 1 : 0);
  return reinterpret_cast<X*>((char*)x + int64(token) * (p.reverse ? -stride : stride));
}

// Rows of a tensor (tokens, channels), by the step of the sequence: a lane's part.
template <typename X> struct Rows {
  X* first;
  int stride;

  INLINE Rows(X* x, int stride, const Problem& p, const Piece& piece, const Place& a) : stride(stride) {
    first = first_row(x, stride, p, piece) + a.e;
  }
  INLINE X* at(int step) const { return step_at(first, stride, step); }
  // Those from `step` on; zeros at steps from `end` on.
  INLINE void load(Packed<X, V> (&x)[ITS], const Place& a, int step, int end) const {
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      int t = step + i * ROWS + a.row;
      x[i].load_if(a.in_row && t < end, at(t));
    }
  }
};

// The numbers of a lane's V channels in a row; zeros where there are none. The backward moves one at
// a time, here and in load_by_channel: with several it was 2 % slower.
INLINE void load_of_row(float (&x)[V], const float* from, const Place& a) {
#if BACKWARDS
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = from && a.in_row ? from[a.e + v] : 0.0f;
#else
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = 0.0f;
  if (from && a.in_row) load_floats(from + a.e, x);
#endif
}

// COUNT steps of B or C as floats to shared memory, (COUNT, NP), by LANES lanes. What fills the states up is zeros; so are
// steps from `end` on, or what was there before (load_over).
template <typename X, int COUNT, int LANES> struct MatrixRows {
  static constexpr int A_ROW = NP / VB, TOTAL = COUNT * A_ROW, ITS = (TOTAL + LANES - 1) / LANES;
  Packed<X, VB> x[ITS];

  INLINE void clear() {
#pragma unroll
    for (int i = 0; i < ITS; ++i) x[i].clear();
  }
  INLINE void load_over(X* first, int stride, int lane, int step, int end) {
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      int k = i * LANES + lane, t = step + k / A_ROW, n = k % A_ROW * VB;
      x[i].load_over(k < TOTAL && t < end && n < N, step_at(first, stride, t) + n);
    }
  }
  INLINE void load(X* first, int stride, int lane, int step, int end) {
    clear();
    load_over(first, stride, lane, step, end);
  }
  INLINE void put(float* to, int lane) const {
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      int k = i * LANES + lane;
      float values[VB];
#pragma unroll
      for (int j = 0; j < VB; ++j) values[j] = x[i].get(j);
      if (k < TOTAL) store_floats(to + k * VB, values);
    }
  }
};

// A lane's (channel, state) pairs of a matrix: (D, N) or (N, D).
INLINE int64 by_channel(const Place& a, int j, int i) { return (a.d + j) * N + a.n + i; }
INLINE int64 by_state(const Problem& p, const Place& a, int j, int i) { return (a.n + i) * p.n_channels + a.d + j; }

#define EACH_PAIR                   \
  _Pragma("unroll") for (int j = 0; j < CL; ++j) _Pragma("unroll") for (int i = 0; i < NL; ++i)
#define IF_THERE if (j < a.there && a.n + i < N)

typedef float Pairs[CL][NL];

INLINE void zero(Pairs& x) { EACH_PAIR x[j][i] = 0.0f; }

// A channel's states lie together: unless some fill up a lane's, 16 bytes are moved at once.
constexpr bool IN_FOURS = !BACKWARDS && N == NP && NL % 4 == 0;

INLINE void load_by_channel(Pairs& x, const float* from, const Place& a) {
  if constexpr (IN_FOURS) {
    zero(x);
#pragma unroll
    for (int j = 0; j < CL; ++j)
      if (j < a.there) load_floats(from + by_channel(a, j, 0), x[j]);
  } else {
    EACH_PAIR {
      x[j][i] = 0.0f;
      IF_THERE x[j][i] = from[by_channel(a, j, i)];
    }
  }
}
INLINE void load_by_state(Pairs& x, const float* from, const Problem& p, const Place& a) {
  EACH_PAIR {
    x[j][i] = 0.0f;
    IF_THERE x[j][i] = from[by_state(p, a, j, i)];
  }
}
INLINE void store_by_channel(float* to, const Pairs& x, const Place& a) {
  if constexpr (IN_FOURS) {
#pragma unroll
    for (int j = 0; j < CL; ++j)
      if (j < a.there) store_floats(to + by_channel(a, j, 0), x[j]);
  } else {
    EACH_PAIR IF_THERE to[by_channel(a, j, i)] = x[j][i];
  }
}
INLINE void store_by_state(float* to, const Pairs& x, const Problem& p, const Place& a) {
  EACH_PAIR IF_THERE to[by_state(p, a, j, i)] = x[j][i];
}
