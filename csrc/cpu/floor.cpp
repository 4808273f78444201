#include <cstring>

#include "cpu/knn_filter.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace pyreid {
namespace {

// The x86-64 level (1 to 4) whose instructions this machine has: which build of the CPU floor to
// load.
int64_t instruction_level() {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return !v3 ? 1 : !v4 ? 3 : 4;
#else
  return 1;
#endif
}

}  // namespace

bool floor_is_cuda() { return false; }

const Setting* floor_setting(const char* name) {
  static const Setting threads = {[] { return int64_t(num_threads()); },
                                  [](int64_t value) { set_num_threads(int(value)); }};
  static const Setting level = {instruction_level, nullptr};
  static const Setting filter = {[] { return filter_state.mode.load(); },
                                 [](int64_t mode) {
                                   filter_state.mode = mode;
                                   filter_state.filtered = filter_state.repeated = 0;
                                 }};
  static const Setting filtered = {[] { return filter_state.filtered.load(); }, nullptr};
  static const Setting repeated = {[] { return filter_state.repeated.load(); }, nullptr};
  static const struct {
    const char* name;
    const Setting* setting;
  } settings[] = {{"threads", &threads},
                  {"instruction_level", &level},
                  {"knn_filter", &filter},
                  {"knn_filtered", &filtered},
                  {"knn_repeated", &repeated}};
  for (const auto& entry : settings)
    if (std::strcmp(entry.name, name) == 0) return entry.setting;
  return nullptr;
}

}  // namespace pyreid
