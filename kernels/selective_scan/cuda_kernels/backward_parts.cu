// What scan_backward keeps in shared memory and in registers, and how dB and dC are summed over channels.

// Steps of a piece: above 32 states half of those between saved states, so that two blocks fit a multiprocessor.
constexpr int STRETCH = N > 32 ? EVERY / 2 : EVERY;
constexpr int TILES = STRETCH / T;         // of a piece
constexpr int NV = 4;                      // numbers moved at once
static_assert(NL % NV == 0, "a lane holds a multiple of 4 states");
static_assert(STRETCH % T == 0 && EVERY % STRETCH == 0, "pieces of time must nest");
constexpr int PARTS = 2 * NL / NV;         // vectors of a lane: what it adds to dB and to dC at a step
constexpr int LANES_ROW = 32 + S % 8;      // rows of different sums on different banks
constexpr int SUMS = T * PARTS * S;        // vectors that a tile's dB and dC have
constexpr int KINDS = GATE ? 3 : 2;        // sums over states: for the gradients of dt u, of dt, and y

struct WarpShared {
  alignas(16) float dt[STRETCH][WC], dtu[STRETCH][WC];
#if SOFTPLUS
  alignas(16) float slope[STRETCH][WC];
#endif
  alignas(16) float dout[T][WC];
  alignas(16) float sums[KINDS][T][PART_ROW];
#if !STATIC_B || !STATIC_C
  alignas(16) float part[T * PARTS][LANES_ROW][NV];
#endif
  alignas(16) float before[TILES > 1 ? TILES - 1 : 1][CL][NL / NV][32][NV];
};
struct Shared {
  WarpShared warp[WARPS];
#if !STATIC_B
  alignas(16) float B[STRETCH][NP];
#endif
#if !STATIC_C
  alignas(16) float C[STRETCH][NP];
#endif
#if !STATIC_B || !STATIC_C
  alignas(16) float of_warp[2][WARPS][SUMS][NV];
#endif
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// What a lane loads of a tile for the way back.
struct Elements {
  Packed<DY, V> dy[ITS];
  Packed<U, V> u[ITS];
#if GATE
  Packed<Z, V> z[ITS];
#endif
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

  INLINE void read(const Shared& block, const WarpShared& shared, int first, int t, const Place& a) {
    load_floats(&shared.dt[first + t][a.lane / S * CL], dt);
    load_floats(&shared.dtu[first + t][a.lane / S * CL], dtu);
    load_floats(&shared.dout[t][a.lane / S * CL], dout);
#if !STATIC_B
    load_floats(&block.B[first + t][a.n], b);
#endif
#if !STATIC_C
    load_floats(&block.C[first + t][a.n], c);
#endif
  }
};

// One step of the state: its decays, too.
INLINE void advance(Pairs& h, Pairs& decay, const float (&dt)[CL], const Pairs& drive, const Pairs& A2) {
  EACH_PAIR {
    decay[j][i] = exp2_fast(__fmul_rn(dt[j], A2[j][i]));
    h[j][i] = __fmaf_rn(decay[j][i], h[j][i], drive[j][i]);
  }
}

#if !STATIC_B || !STATIC_C
// A tile's dB and dC over the lanes of a warp.
INLINE void add_over_warp(const WarpShared& shared, float (&sums)[SUMS][NV], int lane) {
#pragma unroll
  for (int o = lane; o < SUMS; o += 32) {
    const int q = o % S, row = o / S;
    float sum[NV], x[NV];
    load_floats(shared.part[row][q], sum);
#pragma unroll
    for (int g = 1; g < GROUPS; ++g) {
      load_floats(shared.part[row][g * S + q], x);
#pragma unroll
      for (int i = 0; i < NV; ++i) sum[i] += x[i];
    }
    store_floats(sums[o], sum);
  }
}

// The same over the warps of the block, to the block's share: that of the tile's steps from `first` on, short of `end`.
INLINE void add_over_block(const float (&sums)[WARPS][SUMS][NV], float* share_B, float* share_C, int stride, int first,
                           int end) {
  for (int o = threadIdx.x; o < SUMS; o += THREADS) {
    const int q = o % S, v = o / S % PARTS, step = first + o / S / PARTS;
    const bool of_B = v < PARTS / 2;
    const int n = q * NL + v % (PARTS / 2) * NV;
    float sum[NV], x[NV];
    load_floats(sums[0][o], sum);
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
      load_floats(sums[w][o], x);
#pragma unroll
      for (int i = 0; i < NV; ++i) sum[i] += x[i];
    }
    float* share = step_at((of_B ? share_B : share_C) + n, stride, step);
    if (step < end && (of_B ? !STATIC_B : !STATIC_C)) {
      if constexpr (N % NV == 0) {
        if (n < N) store_floats(share, sum);
      } else {
        for (int i = 0; i < NV; ++i)
          if (n + i < N) share[i] = sum[i];
      }
    }
  }
}
#endif
