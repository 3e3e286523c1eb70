// After the kernel's source: `launch` runs KERNEL on all blocks, one after another.

static const Problem* argument;
static std::vector<char> done;

static void body() {
  KERNEL(*argument);
  done[running] = 1;
  swapcontext(&fibers[running], &scheduler);
}

extern "C" void launch(const Problem* p, int64_t blocks, int threads) {
  static std::vector<char> stacks(size_t(1 << 16) * 512);
  argument = p;
  fibers.resize(threads), exchange.resize(threads);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    for (auto& x : room) x = {NAN, NAN, NAN, NAN};
    done.assign(threads, 0);
    for (int i = 0; i < threads; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = &stacks[size_t(1 << 16) * i];
      fibers[i].uc_stack.ss_size = 1 << 16;
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], body, 0);
    }
    for (int left = threads; left;) {
      left = 0;
      for (int i = 0; i < threads; ++i)
        if (!done[i]) {
          running = threadIdx.x = i;
          swapcontext(&scheduler, &fibers[i]);
          left += !done[i];
        }
    }
  }
}
