// The gradients of all that blocks of scan_backward have in common: sums of their shares. Where there are many terms the
// warps of a block take a slice of them each, one term after another, and then the slices are added up, in order, too.
//
// Macros besides common.cu's: SLICES of the terms of dB and dC that follow tokens, UNIT_SLICES of those of units.

constexpr int SUM_THREADS = 256, TERMS = 8;  // terms that are loaded at once
constexpr int WIDTH = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;  // numbers of dB and dC that a thread adds up side by side

// A block's part of the n sums of shares (n_terms, n), if it is one of theirs: total (n), or, of (rows, n / rows), its
// transpose. The block's number is counted from the end of this sum.
template <int K, int PARTS, bool TURNED, typename X>
INLINE bool add_up(const float* shares, X* total, int64& block, int64 n_terms, int64 n, unsigned rows, float* slices) {
  if (!total) return false;
  constexpr int LANES = SUM_THREADS / PARTS;
  const int64 blocks = (n + LANES * K - 1) / (LANES * K);
  const int slice = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int64 at = (block * LANES + lane) * K;
  block -= blocks;
  if (block >= 0) return false;
  const int64 each = (n_terms + PARTS - 1) / PARTS, first = slice * each;
  const int64 end = first + each < n_terms ? first + each : n_terms;
  float sum[K];
#pragma unroll
  for (int k = 0; k < K; ++k) sum[k] = 0.0f;
  for (int64 term = first; term < end; term += TERMS) {
    Packed<float, K> x[TERMS];
#pragma unroll
    for (int i = 0; i < TERMS; ++i) x[i].load_if(term + i < end && at < n, shares + (term + i) * n + at);
#pragma unroll
    for (int i = 0; i < TERMS; ++i)
#pragma unroll
      for (int k = 0; k < K; ++k) sum[k] += x[i].get(k);
  }
  if (PARTS > 1) {
    store_floats(slices + threadIdx.x * K, sum);
    __syncthreads();
    if (slice > 0) return true;
#pragma unroll
    for (int part = 1; part < PARTS; ++part) {
      float x[K];
      load_floats(slices + (part * LANES + lane) * K, x);
#pragma unroll
      for (int k = 0; k < K; ++k) sum[k] += x[k];
    }
  }
  if (at >= n) return true;
  const unsigned columns = unsigned(n) / rows;
  Packed<X, K> out;
  out.set(sum);
  out.store(TURNED ? total + unsigned(at) % columns * rows + unsigned(at) / columns : total + at);
  return true;
}

extern "C" __constant__ int shared_bytes = SUM_THREADS * WIDTH * sizeof(float);

extern "C" __global__ void __launch_bounds__(SUM_THREADS) sum_shares(const Problem p) {
  extern __shared__ float4 room[];
  float* slices = reinterpret_cast<float*>(room);
  int64 block = blockIdx.x;
  const int64 pairs = N * p.n_channels, of_tokens = p.n_tokens * (p.n_channels / p.per_group) * N;
  if (add_up<1, UNIT_SLICES, true>(p.share_A, p.dA, block, p.n_units, pairs, N, slices)) return;
  if (add_up<1, UNIT_SLICES, false>(p.share_D, p.dD, block, p.n_units, p.n_channels, 1, slices)) return;
  if (add_up<1, UNIT_SLICES, false>(p.share_bias, p.dbias, block, p.n_units, p.n_channels, 1, slices)) return;
#if STATIC_B
  if (add_up<1, UNIT_SLICES, true>(p.share_B, p.dB, block, p.n_units, pairs, N, slices)) return;
#else
  if (add_up<WIDTH, SLICES, false>(p.share_B, p.dB, block, p.tiles_of_group, of_tokens, 1, slices)) return;
#endif
#if STATIC_C
  add_up<1, UNIT_SLICES, true>(p.share_C, p.dC, block, p.n_units, pairs, N, slices);
#else
  add_up<WIDTH, SLICES, false>(p.share_C, p.dC, block, p.tiles_of_group, of_tokens, 1, slices);
#endif
}
