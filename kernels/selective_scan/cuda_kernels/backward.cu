// The scan backwards. No atomics: a block writes its own shares of the gradients that channels or chunks have in common,
// and they are added up in order afterwards.
//
// A block walks a span of steps: a chunk, or a unit where blocks are few. What enters it is the same to the bit either way
// (chunk_gradients.cu), and so are the shares, which are of units.
//
// A warp takes its channels of a span in pieces of EVERY steps, from the last to the first, each from the state that the
// forward saved. It runs the piece once to find the state before each tile of T steps; then it takes the tiles
// from the last to the first: it runs one again, its states and decays now kept in registers, and goes back through it.
//
// What is done once for each element (softplus, gates, the gradients themselves) all lanes of the block share out, so
// that a row is one piece of memory. The end of a tile stands in one stretch with the second pass through the next one:
// this waits for exp2, that for memory, and the compiler mixes them.
//
// Sums over states (for du and ddelta) and over channels (for dB and dC) go by way of shared memory: every lane leaves
// its part, and another reads all parts of one sum. A shuffle takes as much of the way there as a store and a load.

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Problem p) {
  extern __shared__ float4 room[];
  Shared& block = *reinterpret_cast<Shared*>(room);
  Place a(p);
  place_in_block(p, a);
  WarpShared& shared = block.warp[a.warp];
  const Piece span(p, a.number, pieces_of(p.length, SPAN), SPAN);
  const int length = span.length;
  const int end = span.begin + SPAN < length ? span.begin + SPAN : length;
  const int mine_end = a.in_row && span.begin < end ? end : 0;  // for the lane's channels in a row

  Pairs A2, grad, sum_dA;  // grad: dL/dh after the step at hand
  load_by_channel(A2, p.A, a);
  zero(grad);
  zero(sum_dA);
  if (p.entering)
    load_by_state(grad, p.entering + span.number_of(p, end > 0 ? end - 1 : 0, ENTERING) * N * p.n_channels, p, a);
#if STATIC_B
  Pairs b_static, sum_dB;
  load_by_channel(b_static, p.B, a);
  zero(sum_dB);
#endif
#if STATIC_C
  Pairs c_static, sum_dC;
  load_by_channel(c_static, p.C, a);
  zero(sum_dC);
#endif
  float bias[V], skip[V], sum_dD[V], sum_dbias[V];
  load_of_row(bias, p.bias, a);
  load_of_row(skip, p.D, a);
#pragma unroll
  for (int v = 0; v < V; ++v) sum_dD[v] = sum_dbias[v] = 0.0f;

  const Rows<U> u_rows(p.u, p.u_stride, p, span, a), du_rows(p.du, p.U_stride, p, span, a);
  const Rows<DELTA> delta_rows(p.delta, p.delta_stride, p, span, a), ddelta_rows(p.ddelta, p.DELTA_stride, p, span, a);
  const Rows<DY> dy_rows(p.dy, p.dy_stride, p, span, a);
#if GATE
  const Rows<Z> z_rows(p.z, p.z_stride, p, span, a), dz_rows(p.dz, p.Z_stride, p, span, a);
#endif
#if !STATIC_B
  MB* B = first_row(p.B, p.B_stride, p, span) + a.group * p.B_group;
#endif
#if !STATIC_C
  MC* C = first_row(p.C, p.C_stride, p, span) + a.group * p.C_group;
#endif
#if !STATIC_B || !STATIC_C
  // Shares of dB and dC: (tile of the group, T, G, N).
  const int64 of_tile = int64(a.tile) * p.n_tokens * (p.n_channels / p.per_group) * N + a.group * N;
  float* share_B = first_row(p.share_B + of_tile, p.share_stride, p, span);
  float* share_C = first_row(p.share_C + of_tile, p.share_stride, p, span);
  // The lane's place among those who add up the same states over channels.
  const int summand = (TEAM == 1 ? threadIdx.x / S : a.warp / TEAM * GROUPS + a.lane / S) * OF_WARP + a.n % OF_WARP;
#endif

  Elements next;
  auto load = [&](int step, int end) {
    load_rows(next.u, u_rows, a, step, end);
#if GATE
    load_rows(next.z, z_rows, a, step, end);
#endif
    load_rows(next.dy, dy_rows, a, step, end);
  };
  load(end > 0 ? (end - 1) / T * T : 0, mine_end);

  EACH_PAIR A2[j][i] *= LOG2E;  // which waits, so what the first tile needs is asked for first

  Late late;
  late.clear(end);
  // What is left to do of the tile before: for each element, whose sums over states are there, and dB and dC.
  auto finish = [&]() {
#pragma unroll
    for (int i = 0; i < ITS; ++i) {
      const int t = i * ROWS + a.row, step = late.first + t;
      float total[KINDS][V], gradient[V];
#pragma unroll
      for (int kind = 0; kind < KINDS; ++kind)
        add_states(block, kind, t, a, total[kind]);
      const bool there = step < mine_end;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = late.u[i].get(v);
        sum_dD[v] = __fmaf_rn(late.dout[i][v], x, sum_dD[v]);
        gradient[v] = __fmaf_rn(total[1][v], LN2, total[0][v] * x);
#if SOFTPLUS
        gradient[v] *= late.slope[i][v];
#endif
        if (there) sum_dbias[v] += gradient[v];
      }
      Packed<DELTA, V> ddelta;
      ddelta.set(gradient);
      ddelta.store_if(there, ddelta_rows.at(step));
#pragma unroll
      for (int v = 0; v < V; ++v)
        gradient[v] = __fmaf_rn(total[0][v], late.dt[i][v], late.dout[i][v] * skip[v]);
      Packed<U, V> du;
      du.set(gradient);
      du.store_if(there, du_rows.at(step));
#if GATE
#pragma unroll
      for (int v = 0; v < V; ++v)
        gradient[v] = __fmaf_rn(skip[v], late.u[i].get(v), total[2][v]) * late.z_factor[i][v];
      Packed<Z, V> dz;
      dz.set(gradient);
      dz.store_if(there, dz_rows.at(step));
#endif
    }
#if !STATIC_B || !STATIC_C
    add_over_block(block.summands, share_B, share_C, p.share_stride, late.first, end);
#endif
  };

  // One step of the state, of which x is known: its decays, too.
  auto advance = [&](Pairs& h, Pairs& decay, const Step& x) {
    EACH_PAIR {
      decay[j][i] = exp2_fast(__fmul_rn(x.dt[j], A2[j][i]));
      h[j][i] = __fmaf_rn(decay[j][i], h[j][i], __fmul_rn(x.dtu[j], B_AT(j, i)));
    }
  };

  for (int first = (end - 1) / EVERY * EVERY; first >= span.begin && end > 0; first -= EVERY) {
    Pairs h;
    load_states(h, p.saved + (span.start / EVERY + span.s + first / EVERY) * N * p.n_channels, p, a);
    const int last = ((end - first < EVERY ? end - first : EVERY) - 1) / T;  // tile of the piece

    // All that the piece loads is asked for before anything waits.
    Packed<U, V> u[TILES][ITS];
    Packed<DELTA, V> delta[TILES][ITS];
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
      load_rows(delta[k], delta_rows, a, first + k * T, mine_end);
      load_rows(u[k], u_rows, a, first + k * T, mine_end);
    }
#if !STATIC_B
    MatrixRows<MB, EVERY, THREADS> rows_B;
    rows_B.load(B, p.B_stride, threadIdx.x, first, end);
#endif
#if !STATIC_C
    MatrixRows<MC, EVERY, THREADS> rows_C;
    rows_C.load(C, p.C_stride, threadIdx.x, first, end);
#endif
    __syncthreads();  // all are done with the last piece's rows of B and C
#if !STATIC_B
    rows_B.put(&block.B[0][0], threadIdx.x);
#endif
#if !STATIC_C
    rows_C.put(&block.C[0][0], threadIdx.x);
#endif
    auto leave_steps = [&](int k) {  // the step sizes of a tile. (Written in place, 32 states take 1 % longer.)
#pragma unroll
      for (int i = 0; i < ITS; ++i) {
        const int t = k * T + i * ROWS + a.row;
        float steps[2 * V], slope[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float& dt = steps[2 * v];
          dt = step_size(delta[k][i].get(v) + bias[v], slope[v]);
          if (first + t >= end) dt = 0.0f;  // leaves the state, and its gradient, as they are
          steps[2 * v + 1] = dt * u[k][i].get(v);
        }
        store_floats(&block.steps[t][a.column][0], steps);
#if SOFTPLUS
        store_floats(&block.slope[t][a.column], slope);
#endif
      }
    };
#pragma unroll
    for (int k = 0; k < TILES; ++k) leave_steps(k);
    __syncthreads();
    for (int k = 0; k < last; ++k) {  // through a tile, for the state after it
#pragma unroll
      for (int v = 0; v < OF_LANE; ++v) store_some(shared.before[k][v][a.lane], h, v);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        Step x;
        Pairs decay;
        x.read(block, k * T + t, a);
        advance(h, decay, x);
      }
    }

    for (int k = last; k >= 0; --k) {
      // Loaded while the tile before was computed; now the next tile's are.
      const Elements now = next;
      const int before = k > 0 ? first + (k - 1) * T : first - T;
      auto ask = [&]() { load(before, before < span.begin ? before : mine_end); };
      if (!ASK_LATE) ask();
      finish();
      Pairs states[T + 1], decays[T];
      EACH_PAIR states[0][j][i] = h[j][i];
      Step in[2];
#pragma unroll
      for (int t = 0; t < T; ++t) {
        Step& x = in[t % 2];
        x.read(block, k * T + t, a);
        EACH_PAIR states[t + 1][j][i] = states[t][j][i];
        advance(states[t + 1], decays[t], x);
      }

      if (ASK_LATE) ask();
#pragma unroll
      for (int i = 0; i < ITS; ++i) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          late.dout[i][v] = now.dy[i].get(v);
#if GATE
          const float gate = now.z[i].get(v), sig = sigmoid(gate);
          late.z_factor[i][v] = late.dout[i][v] * sig * __fmaf_rn(gate, 1.0f - sig, 1.0f);
          late.dout[i][v] *= gate * sig;
#endif
        }
        store_floats(&block.dout[i * ROWS + a.row][a.column], late.dout[i]);
      }
      __syncthreads();

      // A store to shared memory holds up all later loads from it: so a step is read before the last one's sums are left.
      in[(T - 1) % 2].read_more(block, k * T, T - 1, a);
#pragma unroll
      for (int t = T - 1; t >= 0; --t) {
        const Step& x = in[t % 2];
        if (t > 0) {
          in[(t - 1) % 2].read(block, k * T + t - 1, a);
          in[(t - 1) % 2].read_more(block, k * T, t - 1, a);
        }
        float d_dtu[CL], d_dt[CL];
#if GATE
        float y[CL];
#endif
        float dB[NL], dC[NL];
#pragma unroll
        for (int j = 0; j < CL; ++j) {
          d_dtu[j] = d_dt[j] = 0.0f;
#if GATE
          y[j] = 0.0f;
#endif
#pragma unroll
          for (int i = 0; i < NL; ++i) {
            // y = (C h + D u) silu(z)
#if GATE
            y[j] = __fmaf_rn(C_AT(j, i), states[t + 1][j][i], y[j]);
#endif
#if STATIC_C
            sum_dC[j][i] = __fmaf_rn(x.dout[j], states[t + 1][j][i], sum_dC[j][i]);
#else
            dC[i] = j ? __fmaf_rn(x.dout[j], states[t + 1][j][i], dC[i]) : __fmul_rn(x.dout[j], states[t + 1][j][i]);
#endif
            grad[j][i] = __fmaf_rn(x.dout[j], C_AT(j, i), grad[j][i]);
            // h = exp(dt A) h + dt u B
#if STATIC_B
            sum_dB[j][i] = __fmaf_rn(x.dtu[j], grad[j][i], sum_dB[j][i]);
#else
            dB[i] = j ? __fmaf_rn(x.dtu[j], grad[j][i], dB[i]) : __fmul_rn(x.dtu[j], grad[j][i]);
#endif
            d_dtu[j] = __fmaf_rn(B_AT(j, i), grad[j][i], d_dtu[j]);
            grad[j][i] = __fmul_rn(grad[j][i], decays[t][j][i]);
            const float d_exponent = __fmul_rn(grad[j][i], states[t][j][i]);
            sum_dA[j][i] = __fmaf_rn(d_exponent, x.dt[j], sum_dA[j][i]);
            d_dt[j] = __fmaf_rn(d_exponent, A2[j][i], d_dt[j]);
          }
        }
        if (SUMS_FIRST) {
          leave_parts(shared.sums[0][t], t, a.lane, d_dtu);
          leave_parts(shared.sums[1][t], t, a.lane, d_dt);
        }
#if GATE
        leave_parts(shared.sums[2][t], t, a.lane, y);
#endif
        if (!SUMS_FIRST && !C_FIRST) leave_parts(shared.sums[0][t], t, a.lane, d_dtu);
#if !STATIC_B
        if (SUMS_FIRST) store_floats(&block.summands[t][0][a.warp % TEAM][summand], dB);
#endif
#if !STATIC_C
        store_floats(&block.summands[t][1][a.warp % TEAM][summand], dC);
#endif
        if (C_FIRST) leave_parts(shared.sums[0][t], t, a.lane, d_dtu);
        if (!SUMS_FIRST) leave_parts(shared.sums[1][t], t, a.lane, d_dt);
#if !STATIC_B
        if (!SUMS_FIRST) store_floats(&block.summands[t][0][a.warp % TEAM][summand], dB);
#endif
      }
      if (k > 0) {
#pragma unroll
        for (int v = 0; v < OF_LANE; ++v) {
          float x[NV];
          load_floats(shared.before[k - 1][v][a.lane], x);
          set_some(h, v, x);
        }
      }
#pragma unroll
      for (int i = 0; i < ITS; ++i) {
        late.u[i] = now.u[i];
        const int t = k * T + i * ROWS + a.row;
        float steps[2 * V];
        load_floats(&block.steps[t][a.column][0], steps);
#pragma unroll
        for (int v = 0; v < V; ++v) late.dt[i][v] = steps[2 * v];
#if SOFTPLUS
        load_floats(&block.slope[t][a.column], late.slope[i]);
#endif
      }
      late.first = first + k * T;
      __syncthreads();
    }

    if (first % UNIT == 0) {  // what the steps of a unit have in common
      finish();
      late.clear(end);
      const int64 unit = span.number_of(p, first, UNIT), of_unit = unit * N * p.n_channels;
      store_by_state(p.share_A + of_unit, sum_dA, p, a);
      zero(sum_dA);
#if STATIC_B
      store_by_state(p.share_B + of_unit, sum_dB, p, a);
      zero(sum_dB);
#endif
#if STATIC_C
      store_by_state(p.share_C + of_unit, sum_dC, p, a);
      zero(sum_dC);
#endif
      // Over the rows that the block takes at once, in order.
      __syncthreads();
      float(&of_rows)[2][ROWS][BC] = block.of_rows();
      store_floats(&of_rows[0][a.row][a.column], sum_dD);
      store_floats(&of_rows[1][a.row][a.column], sum_dbias);
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        for (int row = 1; row < ROWS; ++row) {
          sum_dD[v] += of_rows[0][row][a.column + v];
          sum_dbias[v] += of_rows[1][row][a.column + v];
        }
        if (a.row == 0 && a.in_row) {
          if (p.share_D) p.share_D[unit * p.n_channels + a.e + v] = sum_dD[v];
          if (p.share_bias) p.share_bias[unit * p.n_channels + a.e + v] = sum_dbias[v];
        }
        sum_dD[v] = sum_dbias[v] = 0.0f;
      }
    }
  }

  if (p.dh0 && span.begin == 0) store_by_channel(p.dh0 + span.s * N * p.n_channels, grad, a);
}
