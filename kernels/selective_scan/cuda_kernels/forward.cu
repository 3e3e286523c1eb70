// The scan forwards. In which order statements stand that do not depend on each other is measured: it decides which of a
// warp's loads share a scoreboard (benchmarks/SCAN_NOTES.md). Macros besides those of common.cu: OWN, whether a sequence
// may have several chunks that one warp walks one after another; ENDS, whether only the chunks' ends from 0 are wanted
// (own and sums), and not y.

// Those who share out rows meet other banks in the part of the next warp than in this one's, so that four channels may be
// moved at once where a lane has two. (Where it has one, this changes nothing.)
struct Sizes : Padding<(V > CL ? 4 : 0)> {
  alignas(16) float sizes[T][2 * WC];  // dt of CL channels, dt u of these, dt of the next CL ...
};
struct Parts : Padding<(V > CL ? 8 : 0)> {
  alignas(16) float y[T][PART_ROW];  // of S lanes each
};
struct Shared {
  Sizes in[WARPS];
#if !ENDS
  Parts out[WARPS];
#endif
#if !STATIC_B
  alignas(16) float B[T][NP];
#endif
#if !STATIC_C && !ENDS
  alignas(16) float C[T][NP];
#endif
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// What a lane needs of a step.
struct Step {
  float dt[CL], dtu[CL];
#if !STATIC_B
  float b[NL];
#endif
#if !STATIC_C && !ENDS
  float c[NL];
#endif

  INLINE void read(const Shared& shared, int t, const Place& a) {
    float sizes[2 * CL];
    load_floats(&shared.in[a.warp].sizes[t][a.lane / S * 2 * CL], sizes);
#pragma unroll
    for (int j = 0; j < CL; ++j) dt[j] = sizes[j], dtu[j] = sizes[CL + j];
#if !STATIC_C && !ENDS
    load_floats(&shared.C[t][a.n], c);
#endif
#if !STATIC_B
    load_floats(&shared.B[t][a.n], b);
#endif
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Problem p) {
  extern __shared__ float4 room[];
  Place a(p);
  share_rows(p, a);
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const int of = a.column / WC, column = a.column % WC;  // the warp that has the lane's channels of a row, and where

  // p.own is what enters each chunk, or (ENDS) where their ends go; without it one warp walks a whole sequence.
  int stop;
  const Piece piece = find_run(p, a.number, stop);
  if (piece.beyond()) return;
  const int length = piece.length;
  if (ENDS && piece.begin + CHUNK >= length) return;  // nothing comes after the last

  Pairs A2, h;
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(h);
  if (!ENDS && p.own) load_by_state(h, p.own + a.number * N * p.n_channels, p, a);
  if (!ENDS && !p.own && p.first) load_by_channel(h, p.first + piece.s * N * p.n_channels, a);
#if STATIC_B
  Pairs b_static;
  load_by_channel(b_static, p.B, a);
#endif
#if STATIC_C && !ENDS
  Pairs c_static;
  load_by_channel(c_static, p.C, a);
#endif
  float bias[V], skip[V];
  load_of_row(bias, p.bias, a);
  load_of_row(skip, p.D, a);

  Moving<U> u_rows(p.u, p.u_stride, p, piece, a);
  Moving<DELTA> delta_rows(p.delta, p.delta_stride, p, piece, a);
#if !ENDS
  Moving<U> y_rows(p.y, p.U_stride, p, piece, a);
#endif
#if GATE && !ENDS
  Moving<Z> z_rows(p.z, p.z_stride, p, piece, a);
#endif
#if !STATIC_B
  MovingMatrix<MB> B(p.B, p.B_stride, p.B_group, p, piece, a);
#endif
#if !STATIC_C && !ENDS
  MovingMatrix<MC> C(p.C, p.C_stride, p.C_group, p, piece, a);
#endif

  // A tile's numbers, on their way from memory while another tile is computed.
  Packed<U, V> next_u[ITS];
  Packed<DELTA, V> next_delta[ITS];
#if GATE && !ENDS
  Packed<Z, V> next_z[ITS];
#endif
  const int row = a.in_row ? a.row : 0x7fffff00;  // without a channel none is its own
  auto load = [&](int left) {
#if !STATIC_B
    B.load(left);
#endif
    delta_rows.load(next_delta, left - row);
#if !STATIC_C && !ENDS
    C.load(left);
#endif
    u_rows.load(next_u, left - row);
#if GATE && !ENDS
    z_rows.load(next_z, left - row);
#endif
  };
  clear(next_u), clear(next_delta);
#if GATE && !ENDS
  clear(next_z);
#endif
#if !STATIC_B
  B.rows.clear();
#endif
#if !STATIC_C && !ENDS
  C.rows.clear();
#endif
  load(stop - piece.begin);

  Pairs own, before;  // the state that starts each chunk from 0; the state before the chunk
  float total[CL];    // of dt over the chunk

  // A tile, or its first half, which may be all that there is of it where a sequence ends.
  auto run = [&](int step, bool whole) __attribute__((always_inline)) {
    constexpr int HALF_ITS = (ITS + 1) / 2;
    static_assert(T % (4 * AT_ONCE) == 0, "half a tile is some pairs of groups of steps");
    const int groups = (whole ? T : T / 2) / AT_ONCE;
    const int left = stop - step;
#if !ENDS
    Packed<U, V> u[ITS];
#endif
#if GATE && !ENDS
    Packed<Z, V> z[ITS];
#endif
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      if (!whole && i == HALF_ITS) break;
      leave_sizes(shared.in[of].sizes, i * ROWS + a.row, left, column, next_delta[i], next_u[i], bias);
#if !ENDS
      u[i] = next_u[i];
#endif
#if GATE && !ENDS
      z[i] = next_z[i];
#endif
    }
#if !STATIC_B
    B.put(&shared.B[0][0]);
#endif
#if !STATIC_C && !ENDS
    C.put(&shared.C[0][0]);
#endif
    __syncthreads();
    if (whole) load(left - T);
    // Its branch keeps the loads above where they are: the compiler would put them off.
    if (!ENDS && p.saved && step % EVERY == 0) {
      const int64 slot = piece.start / EVERY + piece.s + step / EVERY;
      store_by_state(p.saved + slot * N * p.n_channels, h, p, a);
    }

    // AT_ONCE steps at a time; those two groups ahead are read, and the decays of the next one computed, before the
    // states of one: a store to shared memory holds up all later loads from it, and an exp2 takes its time.
    Step in[3][AT_ONCE];
    Pairs decays[2][AT_ONCE];
    auto read = [&](int g) {
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) in[g % 3][k].read(shared, g * AT_ONCE + k, a);
    };
    auto decay = [&](int g) {
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k)
        EACH_PAIR decays[g % 2][k][j][i] = exp2_fast(__fmul_rn(in[g % 3][k].dt[j], A2[j][i]));
    };
    read(0);
    decay(0);
    if (groups > 1) read(1);
    auto run_group = [&](int g) __attribute__((always_inline)) {
      Pairs drive[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const Step& x = in[g % 3][k];
#if STATIC_B
        EACH_PAIR drive[k][j][i] = __fmul_rn(x.dtu[j], b_static[j][i]);
#else
        EACH_PAIR drive[k][j][i] = __fmul_rn(x.dtu[j], x.b[i]);
#endif
      }
      if (g + 2 < groups) read(g + 2);
      if (g + 1 < groups) decay(g + 1);
      float y[AT_ONCE][CL];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const Step& x = in[g % 3][k];
#pragma unroll
        for (int j = 0; j < CL; ++j) y[k][j] = 0.0f, total[j] += x.dt[j];
        EACH_PAIR {
          h[j][i] = __fmaf_rn(decays[g % 2][k][j][i], h[j][i], drive[k][j][i]);
          if (OWN) own[j][i] = __fmaf_rn(decays[g % 2][k][j][i], own[j][i], drive[k][j][i]);
        }
#if STATIC_C && !ENDS
        EACH_PAIR y[k][j] = __fmaf_rn(c_static[j][i], h[j][i], y[k][j]);
#elif !ENDS
        EACH_PAIR y[k][j] = __fmaf_rn(x.c[i], h[j][i], y[k][j]);
#endif
      }
#if !ENDS
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k)
        leave_parts(shared.out[a.warp].y[g * AT_ONCE + k], g * AT_ONCE + k, a.lane, y[k]);
#endif
    };
#pragma unroll
    for (int g = 0; g < groups; g += 2) {  // two a turn: of one the compiler does not write all turns out
      if (!whole && g * AT_ONCE >= left) break;
      run_group(g);
      if (!whole && (g + 1) * AT_ONCE >= left) break;
      run_group(g + 1);
    }
    __syncthreads();

#if !ENDS
    float y[ITS][V];
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      if (!whole && i == HALF_ITS) break;
      const int t = i * ROWS + a.row;
      add_parts(shared.out[of].y[t], ROWS % 2 ? t : a.row, column, y[i]);  // t is even where the row is
    }
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      if (!whole && i == HALF_ITS) break;
      finish(y[i], u[i], skip);
#if GATE
      gate(y[i], z[i]);
#endif
      Packed<U, V> out;
      out.set(y[i]);
      out.store_if(i * ROWS < left - row, y_rows.at(i * ROWS));
    }
    if (whole) y_rows.go_on();
#endif
  };

  for (int chunk = piece.begin; chunk < stop; chunk += CHUNK) {
    const int end = chunk + CHUNK < stop ? chunk + CHUNK : stop;
    if (OWN) EACH_PAIR before[j][i] = h[j][i], own[j][i] = 0.0f;
#pragma unroll
    for (int j = 0; j < CL; ++j) total[j] = 0.0f;
    int step = chunk;
    for (; step + T / 2 < end; step += T) run(step, true);
    if (step < end) run(step, false);
    // What enters the next chunk, by the arithmetic of chunks that are run all at once (carry.cu).
    if (OWN && end < length) EACH_PAIR h[j][i] = __fmaf_rn(exp2_fast(__fmul_rn(total[j], A2[j][i])), before[j][i], own[j][i]);
  }

#if ENDS
  store_by_state(p.own + a.number * N * p.n_channels, h, p, a);
  if (a.lane % S == 0)
    for (int j = 0; j < a.there; ++j) p.sums[a.number * p.n_channels + a.d + j] = total[j];
#else
  if (stop == length) store_by_channel(p.final_state + piece.s * N * p.n_channels, h, a);
#endif
}
