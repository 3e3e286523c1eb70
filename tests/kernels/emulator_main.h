// After the kernel's source: `launch` runs KERNEL on all blocks, one after another, or one cluster of CLUSTER blocks.

static const Problem* argument;
static std::vector<char> done;

static void body() {
  KERNEL(*argument);
  done[running] = 1;
  of_warps[running / 32].leave(), of_blocks[running / threads_of_block].leave(), of_cluster.leave();
  swapcontext(&fibers[running], &scheduler);
}

extern "C" void launch(const Problem* p, int64_t blocks, int threads) {
#ifdef CLUSTER
  blocks_of_cluster = CLUSTER;
#endif
  const int at_once = threads * blocks_of_cluster;
  static std::vector<char> stacks;
  stacks.resize(size_t(1 << 16) * at_once);
  argument = p, threads_of_block = threads;
  fibers.resize(at_once), exchange.resize(at_once), begun.resize(at_once), operands.resize(at_once);
  for (int64_t block = 0; block < blocks; block += blocks_of_cluster) {
    for (auto& x : room) x = {NAN, NAN, NAN, NAN};
    rooms.resize(blocks_of_cluster);
    for (auto& one : rooms)
      for (auto& x : one.shared) x = {NAN, NAN, NAN, NAN};
    done.assign(at_once, 0);
    of_warps.assign((at_once + 31) / 32, {32}), of_blocks.assign(blocks_of_cluster, {unsigned(threads)});
    of_cluster = {unsigned(at_once)};
    for (int i = 0; i < at_once; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = &stacks[size_t(1 << 16) * i];
      fibers[i].uc_stack.ss_size = 1 << 16;
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], body, 0);
    }
    for (int left = at_once; left;) {
      int before = left;
      left = 0, steps_without_waiting = 0;
      for (int i = 0; i < at_once; ++i)
        if (!done[i]) {
          running = i, threadIdx.x = i % threads, blockIdx.x = block + i / threads;
          swapcontext(&scheduler, &fibers[i]);
          left += !done[i];
        }
      if (left == before && !steps_without_waiting) std::fprintf(stderr, "all threads wait\n"), std::abort();
    }
  }
}
