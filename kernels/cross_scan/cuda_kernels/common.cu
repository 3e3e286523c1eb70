// The 2-D scan of one state, forwards and backwards. Compiled at run time by NVRTC, with no header of CUDA's.
//
// A block takes CB channels of an image, one direction after another. A direction is a map from positions in its order
// to tokens: nothing is copied. A lane has V channels of T positions in a row (a segment); LANES lanes share a segment.
// The SEGMENTS of a block lie one after another: each is run from 0, tells where it ended and how much of a state
// passes through it, one warp adds that up in order, and each is run again from the state that enters it. Decays are
// computed once. The step sizes come from their low rank here, and are never in memory.
//
// What is summed in which order follows from T alone, and not from WARPS or from how many images there are.
//
// Macros, set when compiled: U, the type of x; M, that of dt, B and C; P, that of what is one for all images; LOG, whether
// A is given as log(-A), and its gradient is that of it; R, the rank of dt; VR, elements of dt in one load; WIDE, whether
// rows of channels divide by V; FAST, whether approximate logarithms do (16-bit inputs); T, WARPS, MIN_BLOCKS.

constexpr int V = 4, LANES = 8, CB = LANES * V;
constexpr int THREADS = 32 * WARPS, SEGMENTS = THREADS / LANES, STEPS = SEGMENTS * T;
constexpr int RP = (R + 3) / 4 * 4;  // R, filled up
constexpr int ROW = RP + 4;          // floats of a position: dt, B, C
static_assert(R % VR == 0, "dt is read in whole loads");

// As cuda.py fills it in: 8 bytes each. (image, y, x) are tokens.
struct Problem {
  const U* x;                          // (token, E)
  const M *dt, *B, *C;
  const P *dt_weight, *bias, *A, *D;   // (4, E, R), (4, E)
  float *y, *saved;                    // (token, E), of each direction if split; (image, 4, slot, E)
  const float* dy;                     // (token, E)
  float* sum;                          // (token, E): of the directions' gradients of x
  U *dx, *ddelta;                      // (token, E), (token, 4, E)
  float *share_BC, *shares;            // (E / CB, 2, 4, token); (image, 3, 4, E): of A, the bias and D
  int64 n_images, height, width, n_channels, inverse_height, split, every;
  int64 dt_token, dt_direction, B_token, B_direction, C_token, C_direction;  // in elements
};

struct Shared {
  float weight[R][CB + 4];
  float rows[2][STEPS][ROW];
  float told[3][SEGMENTS][CB];  // the state at the end from 0, the decay, the gradient at the beginning from 0
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// A thread's place.
struct Place {
  int64 first_token;  // of the image
  int block, image, direction;  // direction: the first one to run
  int e, there;       // its first channel, and how many of its V channels there are
  int column;         // its first channel within the block's
  int segment, length;

  INLINE Place(const Problem& p) {
    const int blocks = (int(p.n_channels) + CB - 1) / CB;
    int number = blockIdx.x;
    block = number % blocks, number /= blocks;
    direction = p.split ? number % 4 : 0;
    image = p.split ? number / 4 : number;
    length = p.height * p.width;
    first_token = int64(image) * length;
    column = threadIdx.x % LANES * V, segment = threadIdx.x / LANES;
    e = block * CB + column;
    const int left = int(p.n_channels) - e;
    there = left < 0 ? 0 : left > V ? V : left;
  }
};

// A direction's map from positions to tokens of the image: `at` is the position in the order of directions 0 or 1. By
// columns, at = x height + y is the token y width + x = at width - x (height width - 1); inverse is 2^32 / height,
// rounded up.
struct Order {
  int first, step, width, less;
  unsigned inverse;

  INLINE Order(const Problem& p, int k, int length) {
    const bool by_columns = k % 2 && p.height > 1;
    first = k < 2 ? 0 : length - 1, step = k < 2 ? 1 : -1;
    width = by_columns ? p.width : 1, less = by_columns ? length - 1 : 0, inverse = p.inverse_height;
  }
  INLINE int token(int position) const {
    const unsigned at = first + step * position, x = (unsigned long long)at * inverse >> 32;
    return at * width - x * less;
  }
};

// A product of two numbers of 32 bits that is added to an address is one instruction.
template <typename X> INLINE X* row_at(X* first, int token, int stride) {
  return reinterpret_cast<X*>((char*)first + int64(token) * int(stride * sizeof(X)));
}

// A lane's V channels of a row. Where the lane has none, other channels' are read: a branch would take longer.
template <typename X> INLINE void load_row(Packed<X, V>& x, const X* from, int there) {
  if (WIDE) {
    x.load(from);
  } else {
    float values[V];
    for (int v = 0; v < V; ++v) values[v] = v < there ? one(from + v) : 0.0f;
    x.set(values);
  }
}
template <typename X> INLINE void store_row(const float (&values)[V], X* to, bool wanted, int there) {
  if (WIDE) {
    Packed<X, V> x;
    x.set(values);
    x.store_if(wanted && there, to);
  } else {
    for (int v = 0; v < V; ++v) {
      const float value[1] = {values[v]};
      Packed<X, 1> x;
      x.set(value);
      x.store_if(wanted && v < there, to + v);
    }
  }
}

// What a direction's lanes share of the STEPS positions from `begin` on (zeros where it has none): dt, B and C as floats.
// By `count` threads, this one the `first`.
INLINE void stage_rows(
    const Problem& p, float (&rows)[STEPS][ROW], const Place& a, int k, const Order& order, int begin, int first, int count) {
  constexpr int LOADS = R / VR;
  const M* dt = p.dt + a.first_token * p.dt_token + k * p.dt_direction;
#pragma unroll 4
  for (int i = first; i < STEPS * LOADS; i += count) {
    const int step = i / LOADS, r = i % LOADS * VR;
    Packed<M, VR> x;
    x.clear();
    if (unsigned(begin + step) < unsigned(a.length)) x.load(row_at(dt, order.token(begin + step), p.dt_token) + r);
#pragma unroll
    for (int j = 0; j < VR; ++j) rows[step][r + j] = x.get(j);
  }
  const M* B = p.B + a.first_token * p.B_token + k * p.B_direction;
  const M* C = p.C + a.first_token * p.C_token + k * p.C_direction;
#pragma unroll 2
  for (int step = first; step < STEPS; step += count) {
    const int token = order.token(begin + step);
    const bool inside = unsigned(begin + step) < unsigned(a.length);
    rows[step][RP] = inside ? one(row_at(B, token, p.B_token)) : 0.0f;
    rows[step][RP + 1] = inside ? one(row_at(C, token, p.C_token)) : 0.0f;
  }
}

constexpr float SCALE = FAST ? LOG2E : 1.0f;  // of what goes into step_size

INLINE void stage_weight(const Problem& p, Shared& shared, const Place& a, int k) {
  const P* from = p.dt_weight + (k * p.n_channels + a.block * CB) * R;
  const int left = int(p.n_channels) - a.block * CB;
  for (int i = threadIdx.x; i < CB * R; i += THREADS) {
    const int c = i / R, r = i % R;
    shared.weight[r][c] = c < left ? one(from + i) * SCALE : 0.0f;
  }
}

// A lane's channels of a parameter (4, E).
INLINE void load_parameter(float (&x)[V], const P* from, const Problem& p, const Place& a, int k) {
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = v < a.there ? one(from + k * p.n_channels + a.e + v) : 0.0f;
}
INLINE void load_A(float (&A)[V], const Problem& p, const Place& a, int k) {
  load_parameter(A, p.A, p, a, k);
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (LOG) {
      const float e = exp_negative(-fabsf(A[v]));
      A[v] = A[v] < 0.0f ? -e : A[v] == A[v] ? -reciprocal(e) : A[v];
    }
}
// D of all directions, which the first one adds.
INLINE void load_skip(float (&skip)[V], const Problem& p, const Place& a, int k) {
#pragma unroll
  for (int v = 0; v < V; ++v) skip[v] = 0.0f;
  if (k == 0)
    for (int i = 0; i < 4; ++i) {
      float of_one[V];
      load_parameter(of_one, p.D, p, a, i);
#pragma unroll
      for (int v = 0; v < V; ++v) skip[v] += of_one[v];
    }
}

// dt_weight dt + bias, times SCALE, of a lane's T positions.
template <int COUNT> INLINE void add_ranks(float (&wide)[T][V], const Shared& shared, int buffer, const Place& a, int r) {
  float weight[COUNT][V];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) load_floats(&shared.weight[r + i][a.column], weight[i]);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    float low[COUNT];
    load_floats(&shared.rows[buffer][a.segment * T + t][r], low);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) wide[t][v] = __fmaf_rn(low[i], weight[i][v], wide[t][v]);
  }
}
INLINE void widen(float (&wide)[T][V], const Shared& shared, int buffer, const Place& a, const float (&bias)[V]) {
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int v = 0; v < V; ++v) wide[t][v] = bias[v];
#pragma unroll 1
  for (int r = 0; r < R / 4 * 4; r += 4) add_ranks<4>(wide, shared, buffer, a, r);
  if constexpr (R % 4) add_ranks<R % 4>(wide, shared, buffer, a, R / 4 * 4);
}

// softplus of x / SCALE, and its derivative. The fast one is off by up to 2e-7: little beside a rounding to 16 bits.
INLINE float step_size(float x) {
  if (FAST) return LN2 * (x > 64.0f ? x : log2_fast(1.0f + exp2_fast(x)));
  return softplus_of(x, exp_negative(-fabsf(x)));
}
INLINE float slope_of(float x, float dt) {
  if (FAST) return 1.0f - exp2_fast(dt * -LOG2E);
  float e = exp_negative(-fabsf(x)), root = reciprocal(1.0f + e);
  return x < 0.0f ? e * root : x == x ? root : x;
}
