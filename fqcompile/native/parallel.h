// Loops over PyTorch's own threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

// From libtorch (torch/csrc/stable/c/shim.h).
extern "C" int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
extern "C" int32_t torch_get_num_threads(uint32_t*);

constexpr int64_t RUNS = 4;  // runs of tasks for each thread, at least

// Calls task(i) for each i, from as many threads as PyTorch uses; a thread takes the next `run` of
// them, so that one which the system holds up does not hold up the others.
template <class Task>
static void in_parallel(int64_t count, bool one_thread, const Task& task, int64_t run = 1) {
  uint32_t threads = 1;
  if (!one_thread) torch_get_num_threads(&threads);
  const int64_t workers = std::min<int64_t>(threads, count);
  if (workers <= 1) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  struct Shared {
    const Task& task;
    std::atomic<int64_t> next;
    int64_t count, run;
  } shared{task, {0}, count, std::max<int64_t>(1, std::min(run, count / (RUNS * workers)))};
  auto work = [](int64_t, int64_t, void* context) {
    auto& s = *(Shared*)context;
    for (int64_t i; (i = s.next.fetch_add(s.run, std::memory_order_relaxed)) < s.count;)
      for (const int64_t end = std::min(i + s.run, s.count); i < end; i++) s.task(i);
  };
  if (torch_parallel_for(0, workers, 1, work, &shared)) throw std::bad_alloc();  // tasks throw nothing else
}

// For Python, through which no exception may go: what act() returns, or -1 where memory is short.
template <class Act>
static int64_t without_exceptions(const Act& act) {
  try {
    return act();
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
