// The emulator's schedule, seed and counters as the named integers of a floor.
#pragma once

#include <cstring>
#include <stdexcept>

#include "emulated/scheduler.h"
#include "ops.h"

namespace pyreid::emulated {

// Setting a counter to any value sets all of them to 0.
inline const Setting* setting(const char* name) {
  static const struct {
    const char* name;
    Setting setting;
  } settings[] = {
      {"schedule",
       {[] { return int64_t(machine.schedule()); },
        [](int64_t value) {
          if (value < 0 || value > 2) throw std::invalid_argument("schedule must be 0, 1 or 2");
          set_schedule(Schedule(value), machine.seed());
        }}},
      {"seed",
       {[] { return int64_t(machine.seed()); },
        [](int64_t value) { set_schedule(machine.schedule(), uint64_t(value)); }}},
      {"launches",
       {[] { return int64_t(statistics().launches); }, [](int64_t) { reset_statistics(); }}},
      {"blocks",
       {[] { return int64_t(statistics().blocks); }, [](int64_t) { reset_statistics(); }}},
      {"switches",
       {[] { return int64_t(statistics().switches); }, [](int64_t) { reset_statistics(); }}},
  };
  for (const auto& entry : settings) {
    if (std::strcmp(entry.name, name) == 0) return &entry.setting;
  }
  return nullptr;
}

}  // namespace pyreid::emulated
