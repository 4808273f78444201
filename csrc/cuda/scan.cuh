// Exclusive prefix sums in place, by one block: for counts per tile, which are few beside what they
// count.
#pragma once

#include <cstdint>

#include "cuda/portable.cuh"

namespace pyreid {

void exclusive_scan(const char* op, uint32_t* counts, int64_t size, Stream stream);

}  // namespace pyreid
