// The last word on what the blocks of likeliest.cu have found: the largest key of each sequence; and where it goes.
//
// A block has 32 sequences; its warps share out the keys. Macros: FOUND (keys a sequence), WARPS.

constexpr int EACH = (FOUND + WARPS - 1) / WARPS;
struct Problem {
  const int64* keys;         // (FOUND, B)
  int64* places;             // (B,)
  unsigned char* bad;        // (B,)
  int64 *own, *ring, *turn;  // see WayOut; 0 if there is none
  int64 n_rows;              // B
  int64 turns, stride;       // of the ring
};
extern "C" __constant__ int shared_bytes = WARPS * 32 * sizeof(int64);

extern "C" __global__ void __launch_bounds__(32 * WARPS) settle(const GRID_CONSTANT Problem p) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_rows = int(p.n_rows), b = int(blockIdx.x) * 32 + lane;
  int64* best = reinterpret_cast<int64*>(own_room());
  bool here = b < n_rows;
  wait_for_kernel_before();
  int64 turn = p.turn && here ? p.turn[b] : 0, key[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {  // the last one again, rather than none
    int from = warp + i * WARPS;
    key[i] = p.keys[int64(from < FOUND ? from : FOUND - 1) * n_rows + (here ? b : n_rows - 1)];
  }
  int64 top = key[0];
#pragma unroll
  for (int i = 1; i < EACH; ++i) top = key[i] > top ? key[i] : top;
  best[threadIdx.x] = top;
  __syncthreads();
  if (warp || !here) return;
#pragma unroll
  for (int i = 1; i < WARPS; ++i) top = best[32 * i + lane] > top ? best[32 * i + lane] : top;
  int number = int(top >> 32);  // of bfloat16, in order: infinity is 0x7f80, and minus infinity all of its bits turned
  bool none = number >= 0x7f80 || number <= ~0x7f80;
  int64 place = none ? 0 : int64(~unsigned(top));
  p.places[b] = place;
  p.bad[b] = none;
  if (!p.own) return;
  p.own[b] = place;
  p.ring[turn * p.stride + b] = none ? -1 : place;
  p.turn[b] = turn + 1 < p.turns ? turn + 1 : 0;
}
