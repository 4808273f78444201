#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

namespace pyreid {
namespace {

struct Loop {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, piece;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count || failed.load(std::memory_order_relaxed)) return;
      try {
        (*body)(begin, std::min(begin + piece, count));
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
  }
};

// The OpenMP team of the process, where there is one already (torch brings it). Its threads spin
// for milliseconds after each of torch's own loops: threads of ours would wait for their cores
// meanwhile, but as part of the team they start at once. Looked up in the loaded library, never
// linked to.
using StartTeam = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

int find_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* const path = info->dlpi_name;
  if (std::strstr(path, "libgomp") == nullptr && std::strstr(path, "libiomp5") == nullptr) return 0;
  void* const library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return 0;
  void* const start = dlsym(library, "GOMP_parallel");
  *static_cast<StartTeam*>(found) = reinterpret_cast<StartTeam>(start);
  return start != nullptr;
}

StartTeam openmp_team() {
  StartTeam start = nullptr;
  dl_iterate_phdr(find_openmp, &start);
  return start;
}

class Pool {
 public:
  explicit Pool(int workers) : workers_(workers) {
    for (int i = 0; i < workers; ++i) std::thread([this] { serve(); }).detach();
  }

  int workers() const { return workers_; }
  bool try_acquire() { return user_.try_lock(); }
  void release() { user_.unlock(); }

  void run(Loop& loop) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    loop.work();
    // Whoever has not come by now is not waited for: another library's threads may be spinning on
    // its core, and the scheduler lets them for milliseconds.
    std::unique_lock<std::mutex> lock(mutex_);
    loop_ = nullptr;
    done_.wait(lock, [this] { return running_ == 0; });
  }

  void retire() {
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }

 private:
  // Some microseconds of waiting awake: a training step calls several ops in a row.
  static constexpr int kSpins = 2000;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen;
           ++spin)
        pause();
      Loop* loop;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (stopping_) return;
        loop = loop_;
        if (loop == nullptr) continue;
        ++running_;
      }
      loop->work();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  const int workers_;
  std::mutex user_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  int running_ = 0;  // workers inside loop_
  std::atomic<bool> stopping_{false};
  Loop* loop_ = nullptr;
};

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const int threads = std::atoi(text);
    if (threads > 0) return threads;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (pthread_getaffinity_np(pthread_self(), sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

std::atomic<int> wanted_threads{0};
std::mutex pool_mutex;
Pool* pool = nullptr;  // never destroyed: its threads may outlive static destructors
std::atomic<bool> forked{false};
thread_local bool inside = false;

// A forked child has none of the parent's threads; whatever it inherits of the pool is left alone.
void forget_pool() {
  pool = nullptr;
  forked = true;
  new (&pool_mutex) std::mutex;
}

Pool* acquire_pool(int workers) {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool == nullptr || pool->workers() != workers) {
    if (pool != nullptr) {
      if (!pool->try_acquire()) return nullptr;
      pool->retire();
    }
    pool = new Pool(workers);
  }
  return pool->try_acquire() ? pool : nullptr;
}

}  // namespace

int num_threads() {
  int threads = wanted_threads.load();
  if (threads == 0) wanted_threads = threads = default_threads();
  return threads;
}

void set_num_threads(int threads) { wanted_threads = std::max(1, threads); }

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  const int threads = num_threads();
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  static const StartTeam start_team = openmp_team();
  const bool alone = threads == 1 || count <= grain || inside;
  // A team does not survive a fork; a forked child would wait for it for ever.
  const bool team = start_team != nullptr && !forked;
  Pool* const crew = alone || team ? nullptr : acquire_pool(threads - 1);
  if (alone || (crew == nullptr && !team)) return body(0, count);
  Loop loop;
  loop.body = &body;
  loop.count = count;
  // Four pieces a thread even out uneven items.
  loop.piece = std::max(grain, (count + 4 * threads - 1) / (4 * threads));
  if (team) {
    start_team(
        [](void* data) {
          inside = true;
          static_cast<Loop*>(data)->work();
          inside = false;
        },
        &loop, unsigned(threads), 0);
  } else {
    inside = true;
    crew->run(loop);
    inside = false;
    crew->release();
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace pyreid
