// The machine that runs a launch: one block after another, one fiber per CUDA thread of the block,
// all on the OS thread that called launch(). A fiber runs until it waits at a barrier or a warp
// operation, or returns; then the schedule picks the next that can run.
//
// Time is a counter that ticks whenever threads synchronise. It never goes back, not even between
// launches, so that "written in this block" and "ordered by a barrier" are comparisons of times
// and nothing is cleared between blocks.
//
// A fault is an exception thrown in the fiber that meets it. It is kept while every other fiber
// unwinds its stack in turn, and is then thrown again on the stack of the caller of launch().
#pragma once

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulated/fiber.h"

// Indices of the running thread; .y and .z are there because CUDA has them.
struct uint3 {
  unsigned x, y, z;
};
inline uint3 threadIdx{0, 0, 0};
inline uint3 blockIdx{0, 0, 0};
inline uint3 blockDim{1, 1, 1};
inline uint3 gridDim{1, 1, 1};

namespace pyreid::emulated {

// What a kernel did that CUDA leaves undefined, or that would hang.
class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a call stands in the source: as a default argument it is the place of the caller.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

inline bool operator==(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::ostream& operator<<(std::ostream& out, Site site) {
  return out << site.file << ":" << site.line;
}

enum class Schedule { in_order, reversed, shuffled };

struct Statistics {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t switches = 0;
};

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

// A warp operation that waits for the rest of the lanes it names.
struct Rendezvous {
  const char* name;
  Site site;
  uint32_t mask;     // as the callers gave it
  uint32_t needed;   // the lanes of the mask that exist
  uint32_t arrived;  // those that have called
  int first;         // the thread that called first
  uint64_t value[kWarpSize];
  uint64_t argument[kWarpSize];
  uint64_t* result;  // [kWarpSize], of the warp
};

struct Warp {
  uint32_t exists;      // lanes; the last warp of a block may be partial
  uint32_t returned;    // lanes
  uint32_t at_barrier;  // lanes
  uint32_t synced;      // time of the last operation of all lanes
  int pending;          // how many of `waiting` are in use
  Rendezvous waiting[kWarpSize];
  uint64_t result[kWarpSize];
  // known[t][u]: what lane u did before this time is ordered before what lane t does now, by
  // operations of some of the lanes.
  uint32_t known[kWarpSize][kWarpSize];
};

class Machine {
 public:
  void set_schedule(Schedule schedule, uint64_t seed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    schedule_ = schedule;
    seed_ = random_ = seed;
  }

  Schedule schedule() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return schedule_;
  }

  uint64_t seed() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return seed_;
  }

  Statistics statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return statistics_;
  }

  void reset_statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    statistics_ = Statistics();
  }

  // Runs body(arguments) once in every thread of every block.
  void run(const char* op, int64_t grid, int block, size_t shared_bytes, void (*body)(void*),
           void* arguments) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const DefaultRounding rounding;
    if (warps_ == nullptr) warps_.reset(new Warp[kMaxWarps]());
    while (int(fibers_.size()) < block) {
      fibers_.push_back(std::make_unique<Fiber>(&fiber_entry, int(fibers_.size())));
    }
    op_ = op;
    body_ = body;
    arguments_ = arguments;
    threads_ = block;
    dynamic_shared_bytes_ = shared_bytes;
    ++launch_number_;
    blockDim.x = unsigned(block);
    gridDim.x = unsigned(grid);
    ++statistics_.launches;
    std::vector<uint32_t> order;
    if (schedule_ == Schedule::shuffled) order = shuffled_order(grid);
    for (int64_t i = 0; i < grid; ++i) {
      blockIdx.x = unsigned(schedule_ == Schedule::in_order   ? i
                            : schedule_ == Schedule::reversed ? grid - 1 - i
                                                              : order[size_t(i)]);
      run_block();
    }
  }

  // __syncthreads and its kin. Returns in how many threads the predicate holds.
  int barrier(const char* name, bool predicate, Site site) {
    const int thread = this_thread();
    if (waiting_ > 0 && !(site == barrier_site_ && std::strcmp(name, barrier_name_) == 0)) {
      fault(site, "divergent ", name, ": thread ", barrier_first_, " waits at ", barrier_name_,
            " at ", barrier_site_);
    }
    if (returned_ > 0) {
      fault(site, "divergent ", name, ": thread ", a_returned_thread(), " has returned");
    }
    fault_if_awaited(thread, site, "waits at a block barrier");
    if (waiting_ == 0) {
      barrier_name_ = name;
      barrier_site_ = site;
      barrier_first_ = thread;
    }
    ++waiting_;
    holds_ += predicate;
    if (waiting_ == threads_) {
      barrier_result_ = holds_;
      waiting_ = holds_ = 0;
      interval_start_ = ++now_;
      for (int w = 0; w < warp_count(); ++w) warps_[w].at_barrier = 0;
      set_all_ready();
    } else {
      warps_[thread / kWarpSize].at_barrier |= 1u << (thread % kWarpSize);
    }
    give_way();
    return barrier_result_;
  }

  // A warp operation: hands in a value and an argument, waits for the lanes of the mask, and
  // returns what `complete` put into the result of this lane.
  uint64_t collective(const char* name, uint32_t mask, uint64_t value, uint64_t argument,
                      void (*complete)(Rendezvous&), Site site) {
    const int thread = this_thread();
    const int lane = thread % kWarpSize;
    const uint32_t bit = 1u << lane;
    Warp& warp = warps_[thread / kWarpSize];
    const int base = thread - lane;
    if (!(mask & bit)) {
      fault(site, name, ": mask ", hexadecimal(mask), " does not contain the caller, lane ", lane);
    }
    const uint32_t needed = mask & warp.exists;
    if (needed & warp.returned) {
      fault(site, name, ": mask ", hexadecimal(mask), " names thread ",
            base + __builtin_ctz(needed & warp.returned), ", which has returned");
    }
    if (needed & warp.at_barrier) {
      fault(site, name, ": mask ", hexadecimal(mask), " names thread ",
            base + __builtin_ctz(needed & warp.at_barrier), ", which waits at a block barrier at ",
            barrier_site_);
    }
    Rendezvous* meeting = nullptr;
    for (int i = 0; i < warp.pending; ++i) {
      Rendezvous& other = warp.waiting[i];
      if (other.mask == mask) {
        meeting = &other;
      } else if ((other.arrived & mask) && (other.needed & bit)) {
        // Each waits for the other. Where only one does, the other may come later.
        fault(site, name, ": callers disagree about the mask: ", hexadecimal(mask),
              " here, but thread ", base + __builtin_ctz(other.arrived & mask), " waits with ",
              hexadecimal(other.mask), " at ", other.name, " at ", other.site);
      }
    }
    if (meeting == nullptr) {
      meeting = &warp.waiting[warp.pending++];
      meeting->name = name;
      meeting->site = site;
      meeting->mask = mask;
      meeting->needed = needed;
      meeting->arrived = 0;
      meeting->first = thread;
      meeting->result = warp.result;
    } else if (!(meeting->site == site && std::strcmp(meeting->name, name) == 0)) {
      fault(site, name, ": callers disagree about the call: thread ", meeting->first, " waits at ",
            meeting->name, " at ", meeting->site);
    }
    meeting->arrived |= bit;
    meeting->value[lane] = value;
    meeting->argument[lane] = argument;
    if (meeting->arrived == needed) {
      complete(*meeting);
      order_lanes(warp, needed);
      ready_[base / 64] |= uint64_t(needed) << (base % 64);
      Rendezvous& last = warp.waiting[--warp.pending];
      if (meeting != &last) *meeting = last;
    }
    give_way();
    return warp.result[lane];
  }

  // Whether what `thread` did at `time` is ordered before what the running thread does now.
  bool ordered(uint32_t time, int thread) const {
    if (time < interval_start_) return true;
    const int me = this_thread();
    if (thread == me) return true;
    if (thread / kWarpSize != me / kWarpSize) return false;
    const Warp& warp = warps_[me / kWarpSize];
    return time < warp.synced || time < warp.known[me % kWarpSize][thread % kWarpSize];
  }

  template <class... Parts>
  [[noreturn]] void fault(Site site, const Parts&... parts) const {
    std::ostringstream text;
    text << op_ << ": block " << blockIdx.x << ", thread " << threadIdx.x << " at " << site << ": ";
    (text << ... << parts);
    throw Fault(text.str());
  }

  static std::string hexadecimal(uint32_t mask) {
    std::ostringstream text;
    text << "0x" << std::hex << mask;
    return text.str();
  }

  static int this_thread() { return int(threadIdx.x); }
  uint32_t now() const { return now_; }
  uint32_t block_start() const { return block_start_; }
  uint64_t launch_number() const { return launch_number_; }
  size_t dynamic_shared_bytes() const { return dynamic_shared_bytes_; }
  // Counts how often the clock was set back, which makes every time kept elsewhere worthless.
  uint64_t era() const { return era_; }

 private:
  // Thrown in the other fibers after a fault, so that they leave their stacks.
  struct Cancelled {};

  // Kernels run in round-to-nearest with subnormals, whatever the caller has set.
  struct DefaultRounding {
    DefaultRounding() {
      std::fegetenv(&caller);
      std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultRounding() { std::fesetenv(&caller); }
    std::fenv_t caller;
  };

  int warp_count() const { return (threads_ + kWarpSize - 1) / kWarpSize; }

  uint64_t random_below(uint64_t bound) {
    random_ += 0x9e3779b97f4a7c15u;
    uint64_t x = random_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return ((x >> 32) * bound) >> 32;
  }

  std::vector<uint32_t> shuffled_order(int64_t grid) {
    std::vector<uint32_t> order(static_cast<size_t>(grid));
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = uint32_t(i);
      std::swap(order[i], order[random_below(i + 1)]);
    }
    return order;
  }

  void set_all_ready() {
    for (int i = 0; i < kMaxThreads / 64; ++i) {
      const int left = threads_ - i * 64;
      ready_[i] = left >= 64 ? ~uint64_t(0) : left > 0 ? (uint64_t(1) << left) - 1 : 0;
    }
  }

  // The first thread that can run at `start` or after, cyclically; -1 if none can.
  int ready_from(int start) const {
    const int words = (threads_ + 63) / 64;
    int word = start / 64;
    uint64_t bits = ready_[word] & (~uint64_t(0) << (start % 64));
    for (int i = 0; i <= words; ++i) {
      if (bits != 0) return word * 64 + __builtin_ctzll(bits);
      word = word + 1 == words ? 0 : word + 1;
      bits = ready_[word];
    }
    return -1;
  }

  // The last that can run at `start` or before, cyclically.
  int ready_back_from(int start) const {
    const int words = (threads_ + 63) / 64;
    int word = start / 64;
    uint64_t bits = ready_[word] & (~uint64_t(0) >> (63 - start % 64));
    for (int i = 0; i <= words; ++i) {
      if (bits != 0) return word * 64 + 63 - __builtin_clzll(bits);
      word = word == 0 ? words - 1 : word - 1;
      bits = ready_[word];
    }
    return -1;
  }

  // The thread to run after `last`; -1 if none can.
  int pick(int last) {
    if (schedule_ == Schedule::in_order) return ready_from(last + 1 == threads_ ? 0 : last + 1);
    if (schedule_ == Schedule::reversed)
      return ready_back_from(last == 0 ? threads_ - 1 : last - 1);
    return ready_from(int(random_below(uint64_t(threads_))));
  }

  // Leaves the fiber `from` for that of `thread`.
  void resume(Fiber& from, int thread) {
    ready_[thread / 64] &= ~(uint64_t(1) << (thread % 64));
    threadIdx.x = unsigned(thread);
    if (&from == fibers_[size_t(thread)].get()) return;
    ++statistics_.switches;
    Fiber::switch_to(from, *fibers_[size_t(thread)]);
  }

  // The running thread waits, or has just been made ready; somebody runs.
  void give_way() {
    const int thread = this_thread();
    const int next = pick(thread);
    if (next < 0) deadlock();
    resume(*fibers_[size_t(thread)], next);
    if (cancelling_) throw Cancelled();
  }

  // Only warp operations are left waiting: a block barrier completes, or is found divergent.
  [[noreturn]] void deadlock() const {
    std::ostringstream text;
    Site site{"", 0};
    for (int w = 0; w < warp_count(); ++w) {
      for (int i = 0; i < warps_[w].pending; ++i) {
        const Rendezvous& other = warps_[w].waiting[i];
        site = other.site;
        text << "; thread " << other.first << " waits at " << other.name << " at " << other.site
             << " with mask " << hexadecimal(other.mask);
      }
    }
    fault(site, "deadlock: no thread can run", text.str());
  }

  int a_returned_thread() const {
    int w = 0;
    while (warps_[w].returned == 0) ++w;
    return w * kWarpSize + __builtin_ctz(warps_[w].returned);
  }

  // No lane may wait for one that returns or goes to a block barrier.
  void fault_if_awaited(int thread, Site site, const char* what) const {
    const Warp& warp = warps_[thread / kWarpSize];
    for (int i = 0; i < warp.pending; ++i) {
      const Rendezvous& other = warp.waiting[i];
      if (other.needed & (1u << (thread % kWarpSize))) {
        fault(site, other.name, ": mask ", hexadecimal(other.mask), " of thread ", other.first,
              " at ", other.site, " names thread ", thread, ", which ", what);
      }
    }
  }

  void check_return() {
    const int thread = this_thread();
    if (waiting_ > 0) {
      fault(barrier_site_, "divergent ", barrier_name_, ": thread ", thread,
            " has returned while thread ", barrier_first_, " waits");
    }
    const Warp& warp = warps_[thread / kWarpSize];
    if (warp.pending > 0) fault_if_awaited(thread, warp.waiting[0].site, "has returned");
    if (returned_ + 1 < threads_ && ready_from(0) < 0) deadlock();
  }

  // Everything that the lanes did so far is ordered before what they do next.
  void order_lanes(Warp& warp, uint32_t lanes) {
    ++now_;
    if (lanes == warp.exists) {
      warp.synced = now_;
      return;
    }
    uint32_t known[kWarpSize] = {};
    for (int u = 0; u < kWarpSize; ++u) {
      if (!(lanes >> u & 1)) continue;
      for (int v = 0; v < kWarpSize; ++v) known[v] = std::max(known[v], warp.known[u][v]);
    }
    for (int u = 0; u < kWarpSize; ++u) {
      if (lanes >> u & 1) known[u] = now_;
    }
    for (int u = 0; u < kWarpSize; ++u) {
      if (lanes >> u & 1) std::copy(known, known + kWarpSize, warp.known[u]);
    }
  }

  void run_block() {
    if (now_ > UINT32_MAX / 2) {  // a block is far shorter than what is left
      now_ = 0;
      ++era_;
      for (int w = 0; w < kMaxWarps; ++w) std::memset(warps_[w].known, 0, sizeof(warps_[w].known));
    }
    block_start_ = interval_start_ = ++now_;
    ++statistics_.blocks;
    returned_ = waiting_ = holds_ = 0;
    for (int w = 0; w < warp_count(); ++w) {
      Warp& warp = warps_[w];
      const int lanes = std::min(kWarpSize, threads_ - w * kWarpSize);
      warp.exists = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
      warp.returned = warp.at_barrier = 0;
      warp.synced = now_;
      warp.pending = 0;
    }
    set_all_ready();
    const int first = pick(schedule_ == Schedule::in_order ? threads_ - 1 : 0);
    resume(caller_, first);
    if (failure_ != nullptr) {
      cancelling_ = false;
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

  // A fiber lives for ever: it runs its thread of one block, and waits for the next block.
  static void fiber_entry();

  void run_thread() {
    try {
      if (!cancelling_) {
        body_(arguments_);
        check_return();
      }
    } catch (const Cancelled&) {
    } catch (...) {
      if (failure_ == nullptr) failure_ = std::current_exception();
      cancelling_ = true;
      set_all_ready();
      for (int w = 0; w < warp_count(); ++w) {
        ready_[w / 2] &= ~(uint64_t(warps_[w].returned) << (w % 2 * kWarpSize));
      }
      ready_[threadIdx.x / 64] &= ~(uint64_t(1) << (threadIdx.x % 64));
    }
    // No exception is in flight here: the C++ runtime counts those per OS thread, not per fiber.
    const int thread = this_thread();
    warps_[thread / kWarpSize].returned |= 1u << (thread % kWarpSize);
    Fiber& fiber = *fibers_[size_t(thread)];
    if (++returned_ == threads_) {
      ++statistics_.switches;
      Fiber::switch_to(fiber, caller_);
    } else {
      resume(fiber, pick(thread));
    }
  }

  std::mutex mutex_;
  Schedule schedule_ = Schedule::in_order;
  uint64_t seed_ = 0;
  uint64_t random_ = 0;  // what the schedule draws from
  Statistics statistics_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber caller_;
  std::unique_ptr<Warp[]> warps_;

  // The launch.
  const char* op_ = "";
  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;
  int threads_ = 0;
  size_t dynamic_shared_bytes_ = 0;
  uint64_t launch_number_ = 0;
  std::exception_ptr failure_;
  bool cancelling_ = false;

  // The block.
  uint64_t ready_[kMaxThreads / 64] = {};  // a bit per thread that can run and does not
  int returned_ = 0;
  int waiting_ = 0;  // threads at the barrier
  int holds_ = 0;    // those of them whose predicate holds
  int barrier_result_ = 0;
  int barrier_first_ = 0;
  const char* barrier_name_ = "";
  Site barrier_site_{"", 0};

  // Time.
  uint32_t now_ = 0;
  uint32_t block_start_ = 0;
  uint32_t interval_start_ = 0;  // of the last block barrier
  uint64_t era_ = 0;
};

inline Machine machine;

inline void Machine::fiber_entry() {
  Fiber::started();
  for (;;) machine.run_thread();
}

// In which order threads and blocks run. The seed matters for `shuffled` only, which goes on
// drawing from it launch after launch.
inline void set_schedule(Schedule schedule, uint64_t seed = 0) {
  machine.set_schedule(schedule, seed);
}

inline Statistics statistics() { return machine.statistics(); }
inline void reset_statistics() { machine.reset_statistics(); }

}  // namespace pyreid::emulated
