// States, or their gradients, carried over a sequence's chunks in the order of the scan, or backwards: own[chunk] becomes
// what enters the chunk. own: what a chunk arrives at from 0; sums: of dt over it.

constexpr int AHEAD = 16;  // chunks whose numbers are loaded at once

extern "C" __constant__ int shared_bytes = 0;

extern "C" __global__ void __launch_bounds__(128) carry(const Problem p) {
  const int64 pairs = N * p.n_channels;
  const int64 at = int64(blockIdx.x) * 128 + threadIdx.x;
  const int64 s = at / pairs, pair = at % pairs, n = pair / p.n_channels, d = pair % p.n_channels;
  if (s >= p.n_seqs) return;
  int64 length = p.length, slot;
  if (p.cu_seqlens) {
    length = p.cu_seqlens[s + 1] - p.cu_seqlens[s];
    slot = p.cu_seqlens[s] / CHUNK + s;
  } else {
    slot = s * (length > CHUNK ? (length + CHUNK - 1) / CHUNK : 1);
  }
  const int chunks = length > CHUNK ? (length + CHUNK - 1) / CHUNK : 1;
  const float A2 = p.A[d * N + n] * LOG2E;
  float h = p.first ? p.first[(s * p.n_channels + d) * N + n] : 0.0f;
  for (int i = 0; i < chunks; i += AHEAD) {
    float ends[AHEAD], sums[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64 chunk = slot + (p.backwards ? chunks - 1 - (i + k) : i + k);
      const bool there = i + k < chunks - 1;  // nothing comes after the last
      ends[k] = there ? p.own[chunk * pairs + pair] : 0.0f;
      sums[k] = there ? p.sums[chunk * p.n_channels + d] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64 chunk = slot + (p.backwards ? chunks - 1 - (i + k) : i + k);
      if (i + k < chunks) p.own[chunk * pairs + pair] = h;
      h = __fmaf_rn(exp2_fast(__fmul_rn(sums[k], A2)), h, ends[k]);
    }
  }
}
