// A loop over independent items, shared out to a pool of threads.
//
// On the OpenMP team that torch has brought into the process, else on threads of our own: the
// package brings no second OpenMP runtime, and a process that forks (a data loader's workers) gets
// a fresh pool instead of a hang.
#pragma once

#include <cstdint>
#include <functional>

namespace pyreid {

int num_threads();
void set_num_threads(int threads);

// Calls body(begin, end) on pieces of [0, count) of at least `grain` items, concurrently. Which
// thread gets which piece is left open, so body must not care. The first exception is rethrown
// here. Inside another parallel_for, or while another Python thread uses the pool, it runs on the
// calling thread.
void parallel_for(int64_t count, int64_t grain,
                  const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace pyreid
