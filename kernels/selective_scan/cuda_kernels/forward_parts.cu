// What scan_forward of forward.cu and that of forward_pairs.cu have in common. The warps of a block share out rows
// together, so that each is a long piece of memory, and B and C lie in shared memory once.

// So many numbers beside others in shared memory, to move the next ones to other banks.
template <int COUNT> struct Padding { float unused[COUNT]; };
template <> struct Padding<0> {};

// A lane's place among those who share out rows: they are those of the block's channels.
INLINE void share_rows(const Problem& p, Place& a) {
  constexpr int LANES = WARPS * WC / V;  // that share a row
  const int thread = threadIdx.x % THREADS;
  const int64 first = int64(a.tile) * WARPS * WC;
  a.row = thread / LANES, a.column = thread % LANES * V;
  a.e = a.group * p.per_group + first + a.column;
  a.in_row = first + a.column < p.per_group;
}

// A lane's part of the rows of a tensor (tokens, channels), tile by tile: an address that moves takes fewer
// instructions than one made of a step's number.
template <typename X> struct Moving {
  X* next;
  int stride;

  INLINE Moving(X* x, int stride, const Problem& p, const Piece& piece, const Place& a) : stride(stride) {
    next = step_at(first_row(x, stride, p, piece) + a.e, stride, piece.begin + a.row);
  }
  INLINE X* at(int row) const { return step_at(next, stride, row); }
  INLINE void go_on() { next = at(T); }
  // left: steps from the lane's first row on that there are. For others x keeps the numbers of an earlier tile, so that
  // it is cleared once, and not in each tile. No y is stored there, and dt is 0, so that they do nothing to the state;
  // only if one is infinite, and so the state, that may become NaN.
  INLINE void load(Packed<X, V> (&x)[ITS], int left) {
#pragma unroll
    for (int i = 0; i < ITS; ++i) x[i].load_over(i * ROWS < left, at(i * ROWS));
    go_on();
  }
};

template <typename X> INLINE void clear(Packed<X, V> (&x)[ITS]) {
#pragma unroll
  for (int i = 0; i < ITS; ++i) x[i].clear();
}

// Rows of B or C, tile by tile; beyond the last step those of an earlier tile, too.
template <typename X> struct MovingMatrix {
  X* next;
  int stride;
  MatrixRows<X, T, THREADS> rows;

  INLINE MovingMatrix(X* x, int stride, int64 of_group, const Problem& p, const Piece& piece, const Place& a)
      : stride(stride) {
    next = step_at(first_row(x, stride, p, piece) + a.group * of_group, stride, piece.begin);
  }
  INLINE void load(int left) {
    rows.load_over(next, stride, threadIdx.x % THREADS, 0, left);
    next = step_at(next, stride, T);
  }
  INLINE void put(float* to) const { rows.put(to, threadIdx.x % THREADS); }
};

// The bits of minus infinity, of as many numbers as there are in 32 bits.
INLINE unsigned minus_infinity(float) { return 0xff800000u; }
INLINE unsigned minus_infinity(bf16) { return 0xff80ff80u; }
INLINE unsigned minus_infinity(f16) { return 0xfc00fc00u; }

// Step sizes and these times u of V channels of step t, as those who hold states read them. left: steps that there are.
INLINE void leave_sizes(float (&of_warp)[T][2 * WC], int t, int left, int column, const Packed<DELTA, V>& delta,
                        const Packed<U, V>& u, const float (&bias)[V]) {
  // Beyond the last step dt is 0, which leaves the state as it is: softplus of minus infinity, by the bits of as many
  // channels as share 32. Chosen without a branch, which would have one step size wait for the other.
  Packed<DELTA, V> there = delta;
  if (SOFTPLUS)
#pragma unroll
    for (int w = 0; w < there.WORDS; ++w) there.word[w] = t < left ? there.word[w] : minus_infinity(DELTA());
  constexpr int R = V < CL ? V : CL;  // channels whose numbers lie side by side
  float sizes[2 * V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float size = step_size(there.get(v) + bias[v]);
    const float dt = SOFTPLUS || t < left ? size : 0.0f;
    sizes[v / R * 2 * R + v % R] = dt;
    sizes[v / R * 2 * R + R + v % R] = dt * u.get(v);
  }
  float* to = &of_warp[t][column / CL * 2 * CL + column % CL];
  if constexpr (V >= CL) {
    store_floats(to, sizes);
  } else {
    const auto& [dt, dtu] = reinterpret_cast<const float (&)[2][V]>(sizes);
    store_floats(to, dt);
    store_floats(to + CL, dtu);
  }
}

// What is left to do for y of V channels when the sums over states are there; and what a z adds to that.
INLINE void finish(float (&y)[V], const Packed<U, V>& u, const float (&skip)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) y[v] = __fmaf_rn(skip[v], u.get(v), y[v]);
}
template <typename X> INLINE void gate(float (&y)[V], const Packed<X, V>& z) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float gate = z.get(v);
    y[v] *= gate * sigmoid(gate);
  }
}
