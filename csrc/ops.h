// The native API on one page. Each function here has one definition per floor (cpu/, cuda/), and one
// check of its arguments (bind/), so that the floors may trust what they are given.
//
// Everything is borrowed: outputs and scratch come from the caller. Nothing synchronises the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace pyreid {

// --- memory_update ----------------------------------------------------------------------------------

// What happens to a row that several events of one call name.
enum class Repeats : uint8_t {
  sequential,  // one event after another, in batch order, normalising after each
  last,        // every event starts from the old row; the last one in the batch wins
  hardest,     // the event with the smallest dot product to the old row, once; first on ties
  mean,        // the mean of what each event alone would make of the old row, normalised once
};

// Columns are normalised in consecutive parts: `count` parts of `size` columns each, or, where `size`
// is 0, parts that end at ends[0], ends[1], ..., ends[count - 1] = number of columns.
struct Parts {
  static constexpr int kMaxUnequal = 64;
  int count;
  int size;
  int ends[kMaxUnequal];
};

struct MemoryUpdate {
  Matrix bank;           // (N, D), changed in place
  ConstMatrix features;  // (E, D); element types: equal, or one of the two float32
  Ids rows;              // (E,) bank row of each event
  const float* momenta;  // (E,) weight of the old row per event, or null:
  float keep, take;      // weights of the old row and of the feature, for all events
  Repeats repeats;
  Parts parts;
  bool normalize;
};

// Event e moves bank[rows[e]] to keep * old + take * features[e], then divides each part by its L2 norm
// (at least 1e-12). Arithmetic is float32; a half-precision row is rounded once, when it is written.
// A row out of range: on the CPU std::invalid_argument before anything is written; on CUDA the event is
// left out. `workspace` holds memory_update_workspace(update) bytes, aligned to 256.
size_t memory_update_workspace(const MemoryUpdate& update);
void memory_update(const MemoryUpdate& update, void* workspace, Stream stream);

// --- the floor itself -------------------------------------------------------------------------------

// Whether arrays of this floor live in CUDA memory.
bool floor_is_cuda();

// Named integers of a floor ("threads" on the CPU, "schedule" on the emulator); null where there is none.
struct Setting {
  int64_t (*get)();
  void (*set)(int64_t value);
};
const Setting* floor_setting(const char* name);

}  // namespace pyreid
