// Borrowed views of arrays that somebody else owns, and the stream that work is queued on.
#pragma once

#include <cstdint>

namespace pyreid {

enum class Dtype : uint8_t { float32, float16, bfloat16, int32, int64, uint8 };

constexpr int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::int64:
      return 8;
    case Dtype::float32:
    case Dtype::int32:
      return 4;
    case Dtype::float16:
    case Dtype::bfloat16:
      return 2;
    case Dtype::uint8:
      return 1;
  }
  return 0;
}

// C-contiguous (rows, cols) of float32, float16 or bfloat16.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, cols;
};

struct ConstMatrix {
  const void* data;
  Dtype dtype;
  int64_t rows, cols;
};

// Contiguous int32 or int64.
struct Ids {
  const void* data;
  Dtype dtype;
  int64_t size;
};

// Where to queue work: a device ordinal and its native stream handle. The CPU floors ignore it.
struct Stream {
  int device;
  void* handle;
};

}  // namespace pyreid
