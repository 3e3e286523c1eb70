// Of a token of many sequences: dt_proj, a step of the states, gate. A block has 128 channels of 8 sequences, a warp 16 of
// these channels, two lanes a channel: one its first and third four states, the other the second and fourth, so that they
// read and write whole sectors.
//
// Letters: B sequences, E inner width, R rank of dt, N states (16); macros, but B and N.

constexpr int N = 16, OUT = R + 2 * N, WARPS = 8, THREADS = 32 * WARPS, DEEP = (R + 31) / 32;
static_assert(E % (16 * WARPS) == 0 && R % 16 == 0, "sizes not served");

struct Problem {
  const bf16 *dt_proj, *dt_bias, *A_log, *D;
  float* ssm_state;  // (B, E, N)
  const bf16* u;     // (B, E)
  const bf16* uz;    // (B, 2 E), of which the second half is the gate
  const bf16* low;   // (B, OUT): dt before its widening, B, C
  bf16* y;           // (B, E)
  int64 n_rows;      // B
};
struct Shared {
  float matrices[8][2 * N], dt[WARPS][16][9];  // B and C; dt of a warp's channels
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
INLINE float softplus(float x) { return softplus_of(x, exp_negative(-fabsf(x))); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) scan(const GRID_CONSTANT Problem p) {
  Shared& s = *reinterpret_cast<Shared*>(own_room());
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4, quarter = lane % 2 * 4;
  constexpr int ACROSS = E / (16 * WARPS);
  int first = int(blockIdx.x) / ACROSS * 8, n_here = int(p.n_rows) - first;
  int channel = (int(blockIdx.x) % ACROSS * WARPS + warp) * 16, e = channel + lane / 2;
  float h[8][8];
  float* state = p.ssm_state + (int64(first) * E + e) * N + quarter;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < n_here) {
      float4 a = *reinterpret_cast<const float4*>(state + int64(j) * E * N);
      float4 b = *reinterpret_cast<const float4*>(state + int64(j) * E * N + 8);
      h[j][0] = a.x, h[j][1] = a.y, h[j][2] = a.z, h[j][3] = a.w;
      h[j][4] = b.x, h[j][5] = b.y, h[j][6] = b.z, h[j][7] = b.w;
    }
  Packed<bf16, 4> logs[2];
  logs[0].load(p.A_log + int64(e) * N + quarter), logs[1].load(p.A_log + int64(e) * N + 8 + quarter);
  float bias = one(p.dt_bias + e), skip = one(p.D + e);
  wait_for_kernel_before();
  int sequence = tid / 32;
  s.matrices[sequence][lane] = sequence < n_here ? one(p.low + int64(first + sequence) * OUT + R + lane) : 0.0f;
  unsigned u_of[8], gate_of[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    u_of[j] = j < n_here ? fresh2(p.u + int64(first + j) * E + e) : 0;
    gate_of[j] = j < n_here ? fresh2(p.uz + int64(first + j) * 2 * E + E + e) : 0;
  }
  float dt[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < DEEP; ++i) {
    uint4 v = make_uint4(0, 0, 0, 0), w = v, x = v;
    if (i * 32 + t * 8 < R) {
      v = once16(p.dt_proj + int64(channel + g) * R + i * 32 + t * 8);
      w = once16(p.dt_proj + int64(channel + g + 8) * R + i * 32 + t * 8);
      if (g < n_here) x = fresh16(p.low + int64(first + g) * OUT + i * 32 + t * 8);
    }
    multiply_add(dt, v.x, w.x, v.y, w.y, x.x, x.y);
    multiply_add(dt, v.z, w.z, v.w, w.w, x.z, x.w);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) s.dt[warp][g + k / 2 * 8][2 * t + k % 2] = dt[k];
  float A2[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) A2[k] = -exp2_fast(logs[k / 4].get(k % 4) * LOG2E) * LOG2E;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float out = 0.0f, u = __uint_as_float(u_of[j] << 16), gate = __uint_as_float(gate_of[j] << 16);
    if (j < n_here) {
      float drive[2][4], readout[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        load_floats(&s.matrices[j][quarter + 8 * k], drive[k]);
        load_floats(&s.matrices[j][N + quarter + 8 * k], readout[k]);
      }
      float size = softplus(s.dt[warp][lane / 2][j] + bias), driven = size * u;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        h[j][k] = __fmaf_rn(exp2_fast(size * A2[k]), h[j][k], driven * drive[k / 4][k % 4]);
        out = __fmaf_rn(h[j][k], readout[k / 4][k % 4], out);
      }
      *reinterpret_cast<float4*>(state + int64(j) * E * N) = float4{h[j][0], h[j][1], h[j][2], h[j][3]};
      *reinterpret_cast<float4*>(state + int64(j) * E * N + 8) = float4{h[j][4], h[j][5], h[j][6], h[j][7]};
    }
    out = add_across(out, 1);
    if (j < n_here && quarter == 0) {
      Packed<bf16, 1> y;
      y.set({__fmaf_rn(skip, u, out) * gate * sigmoid(gate)});
      y.store(p.y + int64(first + j) * E + e);
    }
  }
}
