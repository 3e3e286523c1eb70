// The scan backwards in pairs of warps, to the bit as in backward.cu: a warp for the states of its channels and one for
// what is done once for each element (loads, softplus, gates, sums over states and channels, the gradients themselves). For
// GPUs on which one can have more registers than the other.
//
// A block's two halves meet twice a tile of T steps. Until the first time the states' warps run the tile, its states and
// decays kept in registers (of a piece's last tile: after all tiles before it, for the states before these), while the
// others finish the tile after it and leave the gates of this one. Until the second the states' warps go back through the
// tile, while the others make the steps of a tile of the next piece. So there is room for the steps of one tile more than
// a piece has: of a tile that is done, a tile of the next piece takes the place.

static_assert(ELEMENTS && !WIDE && !STATIC_B && !STATIC_C && TILES == 4, "not for these");

// Where a piece's tiles lie in the ring: 4 bits a tile, and the place that is free after them.
INLINE int place_of(int places, int tile) { return places >> 4 * tile & 15; }
INLINE int places_after(int places) {
  int next = place_of(places, 4);
#pragma unroll
  for (int tile = 1; tile <= 4; ++tile) next |= place_of(places, 4 - tile) << 4 * tile;
  return next;
}

struct Walk {
  int64 number;
  Piece span;
  int end;

  INLINE Walk(const Problem& p, int64 number) : number(number), span(p, number, pieces_of(p.length, SPAN), SPAN) {
    end = span.begin + SPAN < span.length ? span.begin + SPAN : span.length;
  }
  // The last piece's first step; below span.begin if there is none. The last tile of a piece.
  INLINE int last_piece() const { return end > 0 ? (end - 1) / EVERY * EVERY : span.begin - EVERY; }
  INLINE int last_tile(int first) const { return ((end - first < EVERY ? end - first : EVERY) - 1) / T; }
  INLINE const float* saved(const Problem& p, int first) const {
    return p.saved + (span.start / EVERY + span.s + first / EVERY) * N * p.n_channels;
  }
};

INLINE void run_states(const Problem& p, Shared& block, const Place& a, const Walk& walk) {
  WarpShared& shared = block.warp[a.warp];
  Pairs A2, grad, sum_dA;  // grad: dL/dh after the step at hand
  load_by_channel(A2, p.A, a);
  EACH_PAIR A2[j][i] *= LOG2E;
  zero(grad);
  zero(sum_dA);
  if (p.entering) {
    const int last = walk.end > 0 ? walk.end - 1 : 0;
    load_by_state(grad, p.entering + walk.span.number_of(p, last, ENTERING) * N * p.n_channels, p, a);
  }
  auto advance = [&](Pairs& h, Pairs& decay, const Step& x) {
    EACH_PAIR {
      decay[j][i] = exp2_fast(__fmul_rn(x.dt[j], A2[j][i]));
      h[j][i] = __fmaf_rn(decay[j][i], h[j][i], __fmul_rn(x.dtu[j], B_AT(j, i)));
    }
  };
  auto read_before = [&](Pairs& h, int k) {
#pragma unroll
    for (int v = 0; v < OF_LANE; ++v) {
      float x[NV];
      load_floats(shared.before[k][v][a.lane], x);
      set_some(h, v, x);
    }
  };

  int places = 0x43210;
  __syncthreads();
  for (int first = walk.last_piece(); first >= walk.span.begin; first -= EVERY) {
    const int last = walk.last_tile(first);
    Pairs h;
    read_before(h, 0);
    for (int k = 0; k < last; ++k) {
      if (k > 0) {
#pragma unroll
        for (int v = 0; v < OF_LANE; ++v) store_some(shared.before[k][v][a.lane], h, v);
      }
      const int at = place_of(places, k) * T;
#pragma unroll
      for (int t = 0; t < T; ++t) {
        Step x;
        Pairs decay;
        x.read(block, at + t, a);
        advance(h, decay, x);
      }
    }
    for (int k = last; k >= 0; --k) {
      const int at = place_of(places, k) * T;
      Pairs states[T + 1], decays[T];
      EACH_PAIR states[0][j][i] = h[j][i];
      Step in[2];
#pragma unroll
      for (int t = 0; t < T; ++t) {
        Step& x = in[t % 2];
        x.read(block, at + t, a);
        EACH_PAIR states[t + 1][j][i] = states[t][j][i];
        advance(states[t + 1], decays[t], x);
      }
      __syncthreads();

      // A store to shared memory holds up all later loads from it: so a step is read before the last one's sums are left.
      in[(T - 1) % 2].read_more(block, at, T - 1, a);
#pragma unroll
      for (int t = T - 1; t >= 0; --t) {
        const Step& x = in[t % 2];
        if (t > 0) {
          in[(t - 1) % 2].read(block, at + t - 1, a);
          in[(t - 1) % 2].read_more(block, at, t - 1, a);
        }
        float d_dtu[CL], d_dt[CL], y[CL], dB[NL], dC[NL];
#pragma unroll
        for (int j = 0; j < CL; ++j) {
          d_dtu[j] = d_dt[j] = y[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < NL; ++i) {
            // y = (C h + D u) silu(z)
            y[j] = __fmaf_rn(C_AT(j, i), states[t + 1][j][i], y[j]);
            dC[i] = j ? __fmaf_rn(x.dout[j], states[t + 1][j][i], dC[i]) : __fmul_rn(x.dout[j], states[t + 1][j][i]);
            grad[j][i] = __fmaf_rn(x.dout[j], C_AT(j, i), grad[j][i]);
            // h = exp(dt A) h + dt u B
            dB[i] = j ? __fmaf_rn(x.dtu[j], grad[j][i], dB[i]) : __fmul_rn(x.dtu[j], grad[j][i]);
            d_dtu[j] = __fmaf_rn(B_AT(j, i), grad[j][i], d_dtu[j]);
            grad[j][i] = __fmul_rn(grad[j][i], decays[t][j][i]);
            const float d_exponent = __fmul_rn(grad[j][i], states[t][j][i]);
            sum_dA[j][i] = __fmaf_rn(d_exponent, x.dt[j], sum_dA[j][i]);
            d_dt[j] = __fmaf_rn(d_exponent, A2[j][i], d_dt[j]);
          }
        }
        leave_parts(shared.sums[0][t], t, a.lane, d_dtu);
        leave_parts(shared.sums[1][t], t, a.lane, d_dt);
#if GATE
        leave_parts(shared.sums[2][t], t, a.lane, y);
#endif
        store_floats(&block.summands[t][0][threadIdx.x / S * NP + a.n], dB);
        store_floats(&block.summands[t][1][threadIdx.x / S * NP + a.n], dC);
      }
      if (k > 0) read_before(h, k - 1);
      __syncthreads();
    }
    if (first % UNIT == 0) {
      store_by_state(p.share_A + walk.span.number_of(p, first, UNIT) * N * p.n_channels, sum_dA, p, a);
      zero(sum_dA);
    }
    places = places_after(places);
  }
  if (p.dh0 && walk.span.begin == 0) store_by_channel(p.dh0 + walk.span.s * N * p.n_channels, grad, a);
  __syncthreads();
}

// What the steps of a tile are made of.
struct Raw {
  Packed<U, V> u[ITS];
  Packed<DELTA, V> delta[ITS];
  MatrixRows<MB, T, THREADS> B;
  MatrixRows<MC, T, THREADS> C;
};

INLINE void run_elements(const Problem& p, Shared& block, const Place& a, const Walk& walk) {
  const int thread = threadIdx.x % THREADS, end = walk.end, mine_end = a.in_row ? end : 0;
  const Piece& span = walk.span;
  float bias[V], skip[V], sum_dD[V], sum_dbias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    bias[v] = p.bias && a.in_row ? p.bias[a.e + v] : 0.0f;
    skip[v] = p.D && a.in_row ? p.D[a.e + v] : 0.0f;
    sum_dD[v] = sum_dbias[v] = 0.0f;
  }
  const Rows<U> u_rows(p.u, p.u_stride, p, span, a), du_rows(p.du, p.U_stride, p, span, a);
  const Rows<DELTA> delta_rows(p.delta, p.delta_stride, p, span, a), ddelta_rows(p.ddelta, p.DELTA_stride, p, span, a);
  const Rows<DY> dy_rows(p.dy, p.dy_stride, p, span, a);
#if GATE
  const Rows<Z> z_rows(p.z, p.z_stride, p, span, a), dz_rows(p.dz, p.Z_stride, p, span, a);
#endif
  MB* B = first_row(p.B, p.B_stride, p, span) + a.group * p.B_group;
  MC* C = first_row(p.C, p.C_stride, p, span) + a.group * p.C_group;
  // Shares of dB and dC: (tile of the group, T, G, N).
  const int64 of_tile = int64(a.tile) * p.n_tokens * (p.n_channels / p.per_group) * N + a.group * N;
  float* share_B = first_row(p.share_B + of_tile, p.share_stride, p, span);
  float* share_C = first_row(p.share_C + of_tile, p.share_stride, p, span);

  Elements next;
  auto load = [&](int step, int end) {
    load_rows(next.dy, dy_rows, a, step, end);
    load_rows(next.u, u_rows, a, step, end);
#if GATE
    load_rows(next.z, z_rows, a, step, end);
#endif
  };
  auto load_raw = [&](Raw& raw, int step) {
    load_rows(raw.u, u_rows, a, step, mine_end);
    load_rows(raw.delta, delta_rows, a, step, mine_end);
    raw.B.load(B, p.B_stride, thread, step, end);
    raw.C.load(C, p.C_stride, thread, step, end);
  };
  auto leave_steps = [&](const Raw& raw, int step, int at) {
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      const int t = i * ROWS + a.row;
      float steps[2 * V], slope[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float& dt = steps[2 * v];
        dt = step_size(raw.delta[i].get(v) + bias[v], slope[v]);
        if (step + t >= end) dt = 0.0f;  // leaves the state, and its gradient, as they are
        steps[2 * v + 1] = dt * raw.u[i].get(v);
      }
      store_floats(&block.steps[at + t][a.column][0], steps);
#if SOFTPLUS
      store_floats(&block.slope[at + t][a.column], slope);
#endif
    }
    raw.B.put(&block.B[at][0], thread);
    raw.C.put(&block.C[at][0], thread);
  };

  Packed<U, V> u[ITS];  // of the tile that is to be finished, as all these
  float dout[ITS][V], z_factor[ITS][V];
  int late = end, late_at = 0;  // its first step (none: the end), and where its steps lie
#pragma unroll
  for (int i = 0; i < ITS; ++i) {
    u[i].clear();
#pragma unroll
    for (int v = 0; v < V; ++v) dout[i][v] = z_factor[i][v] = 0.0f;
  }
  auto finish = [&]() {
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      const int t = i * ROWS + a.row, step = late + t;
      float total[KINDS][V], gradient[V], steps[2 * V];
      load_floats(&block.steps[late_at + t][a.column][0], steps);
#if SOFTPLUS
      float slope[V];
      load_floats(&block.slope[late_at + t][a.column], slope);
#endif
#pragma unroll
      for (int kind = 0; kind < KINDS; ++kind)
        add_parts(block.warp[a.column / WC].sums[kind][t], t, a.column % WC, total[kind]);
      const bool there = step < mine_end;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = u[i].get(v);
        sum_dD[v] = __fmaf_rn(dout[i][v], x, sum_dD[v]);
        gradient[v] = __fmaf_rn(total[1][v], LN2, total[0][v] * x);
#if SOFTPLUS
        gradient[v] *= slope[v];
#endif
        if (there) sum_dbias[v] += gradient[v];
      }
      Packed<DELTA, V> ddelta;
      ddelta.set(gradient);
      ddelta.store_if(there, ddelta_rows.at(step));
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] = __fmaf_rn(total[0][v], steps[2 * v], dout[i][v] * skip[v]);
      Packed<U, V> du;
      du.set(gradient);
      du.store_if(there, du_rows.at(step));
#if GATE
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] = __fmaf_rn(skip[v], u[i].get(v), total[2][v]) * z_factor[i][v];
      Packed<Z, V> dz;
      dz.set(gradient);
      dz.store_if(there, dz_rows.at(step));
#endif
    }
    add_over_block(block.summands, share_B, share_C, p.share_stride, late, end, thread);
  };
  // The sums of dD and dbias over the rows that the block takes at once, in order: left, and added up past a barrier.
  auto leave_unit = [&]() {
    store_floats(&block.of_rows()[0][a.row][a.column], sum_dD);
    store_floats(&block.of_rows()[1][a.row][a.column], sum_dbias);
  };
  auto end_unit = [&](int64 unit) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int row = 1; row < ROWS; ++row) {
        sum_dD[v] += block.of_rows()[0][row][a.column + v];
        sum_dbias[v] += block.of_rows()[1][row][a.column + v];
      }
      if (a.row == 0 && a.in_row) {
        if (p.share_D) p.share_D[unit * p.n_channels + a.e + v] = sum_dD[v];
        if (p.share_bias) p.share_bias[unit * p.n_channels + a.e + v] = sum_dbias[v];
      }
      sum_dD[v] = sum_dbias[v] = 0.0f;
    }
  };
  // A saved state goes where the states' warp that wants it finds it: one lane for another.
  auto leave_state = [&](const Pairs& h) {
#pragma unroll
    for (int v = 0; v < OF_LANE; ++v) store_some(block.warp[a.warp].before[0][v][a.lane], h, v);
  };

  int first = walk.last_piece(), places = 0x43210, ended = -1;  // ended: first step of a unit that has
  if (first >= span.begin) {
    Pairs h;
    load_states(h, walk.saved(p, first), p, a);
    load(first + walk.last_tile(first) * T, mine_end);
#pragma unroll 1
    for (int k = 0; k < TILES; ++k) {
      Raw raw;
      load_raw(raw, first + k * T);
      leave_steps(raw, first + k * T, k * T);
    }
    leave_state(h);
  }
  __syncthreads();
  for (; first >= span.begin; first -= EVERY) {
    const int last = walk.last_tile(first), other = first - EVERY, places_there = places_after(places);
    const bool more = other >= span.begin;
#pragma unroll 1
    for (int k = last; k >= 0; --k) {
      const int tile = TILES - 1 - k;  // of the next piece
      Raw raw;
      Pairs h;
      if (more) {
        load_raw(raw, other + tile * T);
        if (k == 0) load_states(h, walk.saved(p, other), p, a);
      }
      finish();
      if (ended >= 0) leave_unit();
#pragma unroll
      for (int i = 0; i < ITS; ++i) {
        u[i] = next.u[i];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dout[i][v] = next.dy[i].get(v);
#if GATE
          const float gate = next.z[i].get(v), sig = sigmoid(gate);
          z_factor[i][v] = dout[i][v] * sig * __fmaf_rn(gate, 1.0f - sig, 1.0f);
          dout[i][v] *= gate * sig;
#endif
        }
        store_floats(&block.dout[i * ROWS + a.row][a.column], dout[i]);
      }
      late = first + k * T, late_at = place_of(places, k) * T;
      __syncthreads();

      const int step = late - T;
      load(step, step < span.begin ? step : mine_end);
      if (ended >= 0) end_unit(span.number_of(p, ended, UNIT));
      ended = -1;
      if (more) {
        if (k == last)  // tiles that the last piece lacks
#pragma unroll 1
          for (int i = 0; i < tile; ++i) {
            Raw other_raw;
            load_raw(other_raw, other + i * T);
            leave_steps(other_raw, other + i * T, place_of(places_there, i) * T);
          }
        leave_steps(raw, other + tile * T, place_of(places_there, tile) * T);
        if (k == 0) leave_state(h);
      }
      __syncthreads();
    }
    if (first % UNIT == 0) ended = first;
    places = places_there;
  }
  finish();
  if (ended >= 0) leave_unit();
  __syncthreads();
  if (ended >= 0) end_unit(span.number_of(p, ended, UNIT));
}

extern "C" __global__ void __launch_bounds__(2 * THREADS, 2) scan_backward(const Problem p) {
  extern __shared__ float4 room[];
  Shared& block = *reinterpret_cast<Shared*>(room);
  const int64 n_tiles = p.n_channels / p.per_group * p.tiles_of_group;
  Place a(p, blockIdx.x % n_tiles);
  place_in_block(p, a);
  const Walk walk(p, blockIdx.x / n_tiles);
  let_next_begin();
  wait_for_end_before();
  if (threadIdx.x < THREADS) {
    take_registers<184>();
    run_states(p, block, a, walk);
  } else {
    give_registers<72>();
    run_elements(p, block, a, walk);
  }
}
