// The gradients of all that blocks of scan_backward have in common: sums of their shares, in order, one after another.

constexpr int SUM_THREADS = 128, TERMS = 8;

// A block's part of the n sums of shares (n_terms, rows, columns), if it is one of theirs: total (columns, rows). The
// block's number is counted from the end of this sum.
template <typename X>
INLINE bool add_up(const float* shares, X* total, int64& block, int64 n_terms, int64 n, int64 rows) {
  if (!total) return false;
  const int64 blocks = (n + SUM_THREADS - 1) / SUM_THREADS, at = block * SUM_THREADS + threadIdx.x;
  block -= blocks;
  if (block >= 0) return false;
  if (at >= n) return true;
  float sum[1] = {0.0f};
  for (int64 term = 0; term < n_terms; term += TERMS) {
    float x[TERMS];
#pragma unroll
    for (int i = 0; i < TERMS; ++i) x[i] = term + i < n_terms ? shares[(term + i) * n + at] : 0.0f;
#pragma unroll
    for (int i = 0; i < TERMS; ++i) sum[0] += x[i];
  }
  const int64 columns = n / rows;
  Packed<X, 1> out;
  out.set(sum);
  out.store(total + at % columns * rows + at / columns);
  return true;
}

extern "C" __constant__ int shared_bytes = 0;

extern "C" __global__ void __launch_bounds__(SUM_THREADS) sum_shares(const Problem p) {
  int64 block = blockIdx.x;
  const int64 pairs = N * p.n_channels, of_tokens = p.n_tokens * (p.n_channels / p.per_group) * N;
  if (add_up(p.share_A, p.dA, block, p.n_units, pairs, N)) return;
  if (add_up(p.share_D, p.dD, block, p.n_units, p.n_channels, 1)) return;
  if (add_up(p.share_bias, p.dbias, block, p.n_units, p.n_channels, 1)) return;
  if (STATIC_B ? add_up(p.share_B, p.dB, block, p.n_units, pairs, N)
               : add_up(p.share_B, p.dB, block, p.tiles_of_group, of_tokens, 1)) return;
  if (STATIC_C) add_up(p.share_C, p.dC, block, p.n_units, pairs, N);
  else add_up(p.share_C, p.dC, block, p.tiles_of_group, of_tokens, 1);
}
