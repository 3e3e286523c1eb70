// The scan forwards. A pair of warps takes WC channels: one runs their states, and the other, which shares out rows, does
// what there is to do once for a (step, channel): two tiles ahead it makes step sizes of delta, and a tile behind it
// makes y of the parts that the first has left. So exp2, of which the first warp's time is made, and all other
// instructions go on side by side. The pairs of a block meet once a tile.
//
// For sequences of several chunks that are walked, and for few rows; forward.cu has more warps where those are many.
// Both take the same numbers together in the same order: not a bit differs.
//
// A macro besides those of common.cu: OWN, whether a sequence may have several chunks that one pair walks one after
// another.

// What a tile's states need.
struct Inputs {
#if !STATIC_B
  alignas(16) float B[T][NP];
#endif
#if !STATIC_C
  alignas(16) float C[T][NP];
#endif
  alignas(16) float sizes[WARPS][T][2 * WC];  // dt of CL channels, dt u of these, dt of the next CL ...
};
constexpr int AHEAD = 3;  // tiles of which there are inputs: the one that runs, the next one, the one that is made
struct Shared {
  Inputs in[AHEAD];
  alignas(16) float y[2][WARPS][T][PART_ROW];  // of S lanes each
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

constexpr int GROUPS_OF_STEPS = T / AT_ONCE;
static_assert(GROUPS_OF_STEPS % 4 == 0, "a tile does not fit the registers that go round");

// What a lane needs of a step.
struct Step {
  float dt[CL], dtu[CL];
#if !STATIC_B
  float b[NL];
#endif
#if !STATIC_C
  float c[NL];
#endif

  INLINE void read(const Inputs& in, int t, const Place& a) {
    float sizes[2 * CL];
    load_floats(&in.sizes[a.warp][t][a.lane / S * 2 * CL], sizes);
#pragma unroll
    for (int j = 0; j < CL; ++j) dt[j] = sizes[j], dtu[j] = sizes[CL + j];
#if !STATIC_B
    load_floats(&in.B[t][a.n], b);
#endif
#if !STATIC_C
    load_floats(&in.C[t][a.n], c);
#endif
  }
};

// The states of all steps up to `stop`.
INLINE void run_states(const Problem& p, const Place& a, const Piece& piece, int stop, Shared& shared) {
  Pairs A2, h;
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(h);
  if (p.own) load_by_state(h, p.own + a.number * N * p.n_channels, p, a);
  if (!p.own && p.first) load_by_channel(h, p.first + piece.s * N * p.n_channels, a);
#if STATIC_B
  Pairs b_static;
  load_by_channel(b_static, p.B, a);
#endif
#if STATIC_C
  Pairs c_static;
  load_by_channel(c_static, p.C, a);
#endif

  // AT_ONCE steps at a time; those two groups ahead are read, and the decays of the next one computed, before the
  // states of one: a store to shared memory holds up all later loads from it, and an exp2 takes its time.
  Step in[4][AT_ONCE];
  Pairs decays[2][AT_ONCE];
  auto read = [&](const Inputs& from, int g) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) in[g % 4][k].read(from, g % GROUPS_OF_STEPS * AT_ONCE + k, a);
  };
  auto decay = [&](int g) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
      EACH_PAIR decays[g % 2][k][j][i] = exp2_fast(__fmul_rn(in[g % 4][k].dt[j], A2[j][i]));
  };

  Pairs own, before;  // the state that starts each chunk from 0; the state before the chunk
  float total[CL];    // of dt over the chunk
#pragma unroll
  for (int j = 0; j < CL; ++j) total[j] = 0.0f;
  meet();
  read(shared.in[0], 0);
  decay(0);
  read(shared.in[0], 1);
  float* saved = p.saved ? p.saved + (piece.start / EVERY + piece.s + piece.begin / EVERY) * N * p.n_channels : nullptr;
  int slot = 0, half = 0;
  for (int step = piece.begin; step < stop; step += T) {
    // Branches stand where a tile begins: elsewhere they would keep the compiler from mixing what is around them.
    if (OWN && step % CHUNK == 0) {
      // What enters a chunk, by the arithmetic of chunks that are run all at once (carry.cu).
      if (step > piece.begin)
        EACH_PAIR h[j][i] = __fmaf_rn(exp2_fast(__fmul_rn(total[j], A2[j][i])), before[j][i], own[j][i]);
      EACH_PAIR before[j][i] = h[j][i], own[j][i] = 0.0f;
#pragma unroll
      for (int j = 0; j < CL; ++j) total[j] = 0.0f;
    }
    const bool saves = saved && (T == EVERY || step % EVERY == 0);
    EACH_PAIR store_if(saves && j < a.there && a.n + i < N, saved + by_state(p, a, j, i), __float_as_uint(h[j][i]));
    if (saves) saved += N * p.n_channels;
    const Inputs& now = shared.in[slot];
    slot = slot == AHEAD - 1 ? 0 : slot + 1;
    const Inputs& then = shared.in[slot];
#pragma unroll
    for (int g = 0; g < GROUPS_OF_STEPS; ++g) {
      decay(g + 1);
      read(g + 2 < GROUPS_OF_STEPS ? now : then, g + 2);
      float y[AT_ONCE][CL];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const Step& x = in[g % 4][k];
#pragma unroll
        for (int j = 0; j < CL; ++j) y[k][j] = 0.0f, total[j] += x.dt[j];
        EACH_PAIR {
#if STATIC_B
          const float drive = __fmul_rn(x.dtu[j], b_static[j][i]);
#else
          const float drive = __fmul_rn(x.dtu[j], x.b[i]);
#endif
          h[j][i] = __fmaf_rn(decays[g % 2][k][j][i], h[j][i], drive);
          if (OWN) own[j][i] = __fmaf_rn(decays[g % 2][k][j][i], own[j][i], drive);
#if STATIC_C
          y[k][j] = __fmaf_rn(c_static[j][i], h[j][i], y[k][j]);
#else
          y[k][j] = __fmaf_rn(x.c[i], h[j][i], y[k][j]);
#endif
        }
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k)
        leave_parts(shared.y[half][a.warp][g * AT_ONCE + k], g * AT_ONCE + k, a.lane, y[k]);
    }
    half ^= 1;
    meet();
  }

  if (stop == piece.length) store_by_channel(p.final_state + piece.s * N * p.n_channels, h, a);
}

// Step sizes before, and results after.
INLINE void run_elements(const Problem& p, const Place& a, const Piece& piece, int stop, Shared& shared) {
  float bias[V], skip[V];
  load_of_row(bias, p.bias, a);
  load_of_row(skip, p.D, a);
  Moving<U> u_rows(p.u, p.u_stride, p, piece, a);
  Moving<DELTA> delta_rows(p.delta, p.delta_stride, p, piece, a);
  Moving<U> u_again_rows = u_rows;
  Moving<U> y_rows(p.y, p.U_stride, p, piece, a);
#if GATE
  Moving<Z> z_rows(p.z, p.z_stride, p, piece, a);
#endif
  // Numbers on their way from memory, while another tile is computed: of a tile to come, and of one that is over.
  Packed<U, V> u[ITS];
  Packed<DELTA, V> delta[ITS];
#if !STATIC_B
  MovingMatrix<MB> B(p.B, p.B_stride, p.B_group, p, piece, a);
#endif
#if !STATIC_C
  MovingMatrix<MC> C(p.C, p.C_stride, p.C_group, p, piece, a);
#endif
  const int row = a.in_row ? a.row : 0x7fffff00;  // without a channel none is its own
  auto load = [&](int left) {
    u_rows.load(u, left - row);
    delta_rows.load(delta, left - row);
#if !STATIC_B
    B.load(left);
#endif
#if !STATIC_C
    C.load(left);
#endif
  };
  const int of = a.column / WC, column = a.column % WC;  // the warp that a lane's channels are of, and its place there
  int slot = 0;
  auto make = [&](int left) {
    Inputs& in = shared.in[slot];
    slot = slot == AHEAD - 1 ? 0 : slot + 1;
#if !STATIC_B
    B.put(&in.B[0][0]);
#endif
#if !STATIC_C
    C.put(&in.C[0][0]);
#endif
#pragma unroll
    for (int i = 0; i < ITS; ++i) leave_sizes(in.sizes[of], i * ROWS + a.row, left, column, delta[i], u[i], bias);
  };

  clear(u), clear(delta);
#if !STATIC_B
  B.rows.clear();
#endif
#if !STATIC_C
  C.rows.clear();
#endif
  int left = stop - piece.begin;  // steps
  load(left);
  make(left);
  load(left - T);
  make(left - T);
  load(left - 2 * T);
  Packed<U, V> u_again[ITS];
#if GATE
  Packed<Z, V> z[ITS];
#endif
  clear(u_again);
#if GATE
  clear(z);
#endif
  int half = 0;
  meet();
  for (; left > 0; left -= T) {
    u_again_rows.load(u_again, left - row);
#if GATE
    z_rows.load(z, left - row);
#endif
    make(left - 2 * T);
    load(left - 3 * T);
    meet();
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      const int t = i * ROWS + a.row;
      float y[V];
      add_parts(shared.y[half][of][t], t, column, y);
      finish(y, u_again[i], skip);
#if GATE
      gate(y, z[i]);
#endif
      Packed<U, V> out;
      out.set(y);
      out.store_if(i * ROWS < left - row, y_rows.at(i * ROWS));
    }
    y_rows.go_on();
    half ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(2 * THREADS, MIN_BLOCKS) scan_forward(const Problem p) {
  extern __shared__ float4 room[];
  Place a(p);
  share_rows(p, a);
  Shared& shared = *reinterpret_cast<Shared*>(room);

  // p.own is what enters each chunk; without it one pair walks a whole sequence.
  int stop;
  const Piece piece = find_run(p, a.number, stop);
  if (piece.beyond()) return;
  bool first = threadIdx.x < THREADS;
#if WARPS % 4
  // A warp's place among those of the multiprocessor chooses one of its four schedulers. By turns the first warps of
  // blocks take states, so that all schedulers have some.
  volatile int* slot = reinterpret_cast<volatile int*>(room);
  if (threadIdx.x == 0) *slot = warp_slot();
  __syncthreads();
  first ^= *slot >> 2 & 1;
  __syncthreads();
#endif
  if (first) run_states(p, a, piece, stop, shared);
  else run_elements(p, a, piece, stop, shared);
}
