#include <cstring>

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

}  // namespace pyreid
