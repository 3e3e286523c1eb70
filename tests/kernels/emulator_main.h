// After the kernel's source: `launch` runs KERNEL on all blocks, one after another, or one cluster of CLUSTER blocks.

static const Problem* argument;
static std::vector<char> done;

static void body() {
  KERNEL(*argument);
  done[running] = 1;
  swapcontext(&fibers[running], &scheduler);
}

extern "C" void launch(const Problem* p, int64_t blocks, int threads) {
#ifdef CLUSTER
  blocks_of_cluster = CLUSTER;
#endif
  const int at_once = threads * blocks_of_cluster;
  static std::vector<char> stacks(size_t(1 << 16) * (at_once > 512 ? at_once : 512));
  argument = p, threads_of_block = threads;
  fibers.resize(at_once), exchange.resize(at_once);
  for (int64_t block = 0; block < blocks; block += blocks_of_cluster) {
    for (auto& x : room) x = {NAN, NAN, NAN, NAN};
    rooms.resize(blocks_of_cluster);
    for (auto& one : rooms)
      for (auto& x : one.shared) x = {NAN, NAN, NAN, NAN};
    done.assign(at_once, 0);
    for (int i = 0; i < at_once; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = &stacks[size_t(1 << 16) * i];
      fibers[i].uc_stack.ss_size = 1 << 16;
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], body, 0);
    }
    for (int left = at_once; left;) {
      left = 0;
      for (int i = 0; i < at_once; ++i)
        if (!done[i]) {
          running = i, threadIdx.x = i % threads, blockIdx.x = block + i / threads;
          swapcontext(&scheduler, &fibers[i]);
          left += !done[i];
        }
    }
  }
}
