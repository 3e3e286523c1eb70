// The scan forwards. Macros besides those of common.cu: OWN, whether a sequence may have several chunks that one warp
// walks one after another; ENDS, whether only the chunks' ends from 0 are wanted (own and sums), and not y.

struct WarpShared {
#if !STATIC_B
  alignas(16) float B[T][NP];
#endif
#if !STATIC_C && !ENDS
  alignas(16) float C[T][NP];
#endif
  alignas(16) float sizes[T][2 * WC];  // dt of CL channels, dt u of these, dt of the next CL ...
#if !ENDS
  alignas(16) float y[T][PART_ROW];  // of S lanes each
#endif
};
struct Shared { WarpShared warp[WARPS]; };
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// A tile's numbers, on their way from memory while another tile is computed.
struct Tile {
  Packed<U, V> u[ITS];
  Packed<DELTA, V> delta[ITS];
#if GATE && !ENDS
  Packed<Z, V> z[ITS];
#endif
#if !STATIC_B
  MatrixRows<MB, T, 32> B;
#endif
#if !STATIC_C && !ENDS
  MatrixRows<MC, T, 32> C;
#endif
};

constexpr int GROUPS_OF_STEPS = T / AT_ONCE;

// What a lane needs of a step.
struct Step {
  float dt[CL], dtu[CL];
#if !STATIC_B
  float b[NL];
#endif
#if !STATIC_C && !ENDS
  float c[NL];
#endif

  INLINE void read(const WarpShared& shared, int t, const Place& a) {
    float sizes[2 * CL];
    load_floats(&shared.sizes[t][a.lane / S * 2 * CL], sizes);
#pragma unroll
    for (int j = 0; j < CL; ++j) dt[j] = sizes[j], dtu[j] = sizes[CL + j];
#if !STATIC_B
    load_floats(&shared.B[t][a.n], b);
#endif
#if !STATIC_C && !ENDS
    load_floats(&shared.C[t][a.n], c);
#endif
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Problem p) {
  extern __shared__ float4 room[];
  const int64 n_tiles = p.n_channels / p.per_group * p.tiles_of_group;
  const Place a(p, blockIdx.x % n_tiles);
  if (a.e - a.column >= (a.group + 1) * p.per_group) return;  // a warp without channels
  WarpShared& shared = reinterpret_cast<Shared*>(room)->warp[a.warp];

  // p.own is what enters each chunk, or (ENDS) where their ends go; without it one warp walks a whole sequence.
  const int64 number = blockIdx.x / n_tiles;
  Piece piece(p, number, p.own ? pieces_of(p.length, CHUNK) : 1);
  int stop;
  if (!find_run(p, number, piece, stop)) return;
  const int length = piece.length;
  if (ENDS && piece.begin + CHUNK >= length) return;  // nothing comes after the last

  Pairs A2, h;
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(h);
  if (!ENDS && p.own) load_by_state(h, p.own + number * N * p.n_channels, p, a);
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
#pragma unroll
  for (int v = 0; v < V; ++v) {
    bias[v] = p.bias && a.in_row ? p.bias[a.e + v] : 0.0f;
    skip[v] = p.D && a.in_row ? p.D[a.e + v] : 0.0f;
  }

  const Rows<U> u_rows(p.u, p.u_stride, p, piece, a);
  const Rows<DELTA> delta_rows(p.delta, p.delta_stride, p, piece, a);
#if !ENDS
  const Rows<U> y_rows(p.y, p.U_stride, p, piece, a);
#endif
#if GATE && !ENDS
  const Rows<Z> z_rows(p.z, p.z_stride, p, piece, a);
#endif
#if !STATIC_B
  MB* B = first_row(p.B, p.B_stride, p, piece) + a.group * p.B_group;
#endif
#if !STATIC_C && !ENDS
  MC* C = first_row(p.C, p.C_stride, p, piece) + a.group * p.C_group;
#endif

  Tile next;
  auto load = [&](int step) {
    u_rows.load(next.u, a, step, stop);
    delta_rows.load(next.delta, a, step, stop);
#if GATE && !ENDS
    z_rows.load(next.z, a, step, stop);
#endif
#if !STATIC_B
    next.B.load(B, p.B_stride, a.lane, step, stop);
#endif
#if !STATIC_C && !ENDS
    next.C.load(C, p.C_stride, a.lane, step, stop);
#endif
  };
  load(piece.begin);

  Pairs own, before;  // the state that starts each chunk from 0; the state before the chunk
  float total[CL];    // of dt over the chunk
  for (int chunk = piece.begin; chunk < stop; chunk += CHUNK) {
    const int end = chunk + CHUNK < stop ? chunk + CHUNK : stop;
    if (OWN) EACH_PAIR before[j][i] = h[j][i], own[j][i] = 0.0f;
#pragma unroll
    for (int j = 0; j < CL; ++j) total[j] = 0.0f;

    for (int step = chunk; step < end; step += T) {
#if !STATIC_B
      next.B.put(&shared.B[0][0], a.lane);
#endif
#if !STATIC_C && !ENDS
      next.C.put(&shared.C[0][0], a.lane);
#endif
#if !ENDS
      Packed<U, V> u[ITS];
#endif
#if GATE && !ENDS
      Packed<Z, V> z[ITS];
#endif
#pragma unroll
      for (int i = 0; i < ITS; ++i) {
        const int t = i * ROWS + a.row;
        constexpr int R = V < CL ? V : CL;  // channels whose numbers lie side by side
        float sizes[2 * V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          // 0 beyond the last step, which so leaves the state as it is; chosen afterwards: a branch for each would have
          // one step size wait for the other
          const float size = step_size(next.delta[i].get(v) + bias[v]);
          const float dt = step + t < end ? size : 0.0f;
          sizes[v / R * 2 * R + v % R] = dt;
          sizes[v / R * 2 * R + R + v % R] = dt * next.u[i].get(v);
        }
        float* to = &shared.sizes[t][a.column / CL * 2 * CL + a.column % CL];
        if constexpr (V >= CL) {
          store_floats(to, sizes);
        } else {
          const auto& [dt, dtu] = reinterpret_cast<const float (&)[2][V]>(sizes);
          store_floats(to, dt);
          store_floats(to + CL, dtu);
        }
#if !ENDS
        u[i] = next.u[i];
#endif
#if GATE && !ENDS
        z[i] = next.z[i];
#endif
      }
      __syncwarp();
      load(step + T);
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
      if (GROUPS_OF_STEPS > 1) read(1);
#pragma unroll
      for (int g = 0; g < GROUPS_OF_STEPS; ++g) {
        if (g + 1 < GROUPS_OF_STEPS) decay(g + 1);
        if (g + 2 < GROUPS_OF_STEPS) read(g + 2);
        float y[AT_ONCE][CL];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
          const Step& x = in[g % 3][k];
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
#if STATIC_C && !ENDS
            y[k][j] = __fmaf_rn(c_static[j][i], h[j][i], y[k][j]);
#elif !ENDS
            y[k][j] = __fmaf_rn(x.c[i], h[j][i], y[k][j]);
#endif
          }
        }
#if !ENDS
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          leave_parts(shared.y[g * AT_ONCE + k], g * AT_ONCE + k, a.lane, y[k]);
#endif
      }
      __syncwarp();

#if !ENDS
#pragma unroll
      for (int i = 0; i < ITS; ++i) {
        const int t = i * ROWS + a.row;
        float y[V];
        add_parts(shared.y[t], t, a.column, y);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          y[v] = __fmaf_rn(skip[v], u[i].get(v), y[v]);
#if GATE
          const float gate = z[i].get(v);
          y[v] *= gate * sigmoid(gate);
#endif
        }
        Packed<U, V> out;
        out.set(y);
        out.store_if(a.in_row && step + t < end, y_rows.at(step + t));
      }
#endif
    }
    // What enters the next chunk, by the arithmetic of chunks that are run all at once (carry.cu).
    if (OWN && end < length) EACH_PAIR h[j][i] = __fmaf_rn(exp2_fast(__fmul_rn(total[j], A2[j][i])), before[j][i], own[j][i]);
  }

#if ENDS
  store_by_state(p.own + number * N * p.n_channels, h, p, a);
  if (a.lane % S == 0)
    for (int j = 0; j < a.there; ++j) p.sums[number * p.n_channels + a.d + j] = total[j];
#else
  if (stop == length) store_by_channel(p.final_state + piece.s * N * p.n_channels, h, a);
#endif
}
