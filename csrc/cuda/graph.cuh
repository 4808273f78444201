// Rows of a graph on the device: what lies outside the graph is left out.
#pragma once

#include "cuda/ids.cuh"
#include "ops.h"

namespace pyreid {

struct Row {
  int64_t begin, end;
};

__device__ __forceinline__ Row row_at(const Distances& graph, int64_t row) {
  const int64_t entries = graph.indices.size;
  const int64_t begin = id_at(graph.indptr, row), end = id_at(graph.indptr, row + 1);
  return {begin < 0 ? 0 : begin, end > entries ? entries : end};
}

}  // namespace pyreid
