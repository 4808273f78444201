// Rows of a graph on the host.
#pragma once

#include <cstdint>

#include "cpu/group.h"
#include "ops.h"

namespace pyreid {

// Throws std::invalid_argument unless every entry lies inside the graph.
void check_graph(const char* op, const Distances& graph);

struct Row {
  int64_t begin, end;
};

inline Row row_at(const Distances& graph, int64_t row) {
  return {id_at(graph.indptr, row), id_at(graph.indptr, row + 1)};
}

}  // namespace pyreid
