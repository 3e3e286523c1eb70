// States, or their gradients, carried over a sequence's parts (a chunk each, or pieces of one) in the order of the scan,
// or backwards: own[part] becomes what enters the part. own: what a part arrives at from 0; sums: of dt over it. Backwards
// only as far as to what enters the first chunk.

constexpr int AHEAD = 16;  // parts whose numbers are loaded at once

extern "C" __constant__ int shared_bytes = 0;

extern "C" __global__ void __launch_bounds__(128) carry(const Problem p) {
  const int64 pairs = N * p.n_channels;
  const int64 at = int64(blockIdx.x) * 128 + threadIdx.x;
  const int64 s = at / pairs, pair = at % pairs, n = pair / p.n_channels, d = pair % p.n_channels;
  if (s >= p.n_seqs) return;
  int64 length = p.length, slot;
  if (p.cu_seqlens) {
    length = p.cu_seqlens[s + 1] - p.cu_seqlens[s];
    slot = p.cu_seqlens[s] / PART + s;
  } else {
    slot = s * (length > PART ? (length + PART - 1) / PART : 1);
  }
  const int parts = length > PART ? (length + PART - 1) / PART : 1, of_first = CHUNK / PART;
  const int wanted = !p.backwards ? parts : parts > of_first ? parts - of_first + 1 : 1;
  const float A2 = p.A[d * N + n] * LOG2E;
  float h = p.first ? p.first[(s * p.n_channels + d) * N + n] : 0.0f;
  for (int i = 0; i < wanted; i += AHEAD) {
    float ends[AHEAD], sums[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64 part = slot + (p.backwards ? parts - 1 - (i + k) : i + k);
      const bool there = i + k < wanted - 1;  // nothing comes after the last
      ends[k] = there ? p.own[part * pairs + pair] : 0.0f;
      sums[k] = there ? p.sums[part * p.n_channels + d] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64 part = slot + (p.backwards ? parts - 1 - (i + k) : i + k);
      if (i + k < wanted) p.own[part * pairs + pair] = h;
      h = __fmaf_rn(exp2_fast(__fmul_rn(sums[k], A2)), h, ends[k]);
    }
  }
}
