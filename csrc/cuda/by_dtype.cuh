#pragma once

#include "cuda/portable.cuh"
#include "tensor.h"

namespace pyreid {

// Calls launch_with(features as a pointer to its elements).
template <class Launch>
void by_dtype(const ConstMatrix& features, Launch launch_with) {
  switch (features.dtype) {
    case Dtype::float32:
      return launch_with(static_cast<const float*>(features.data));
    case Dtype::float16:
      return launch_with(static_cast<const Half*>(features.data));
    default:
      return launch_with(static_cast<const BFloat16*>(features.data));
  }
}

}  // namespace pyreid
