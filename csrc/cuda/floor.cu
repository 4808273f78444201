#include <stdexcept>

#include "cuda/portable.cuh"
#include "ops.h"

namespace pyreid {

#ifdef PYREID_EMULATED
bool floor_is_cuda() { return false; }

const Setting* floor_setting(const char* name) { return emulated::setting(name); }
#else
bool floor_is_cuda() { return true; }

const Setting* floor_setting(const char*) { return nullptr; }
#endif

bool has_product() { return false; }

void product(const ConstMatrix&, const ConstMatrix&, float*, Stream) {
  throw std::logic_error("product: this floor leaves products to the array library");
}

}  // namespace pyreid
