// The Python module of one floor. Compiled once per floor, under the floor's name; all else in
// bind/ is shared.

#include "bind/module.h"

#include <string>

#include "ops.h"

namespace {

const pyreid::Setting& setting(const char* name) {
  const pyreid::Setting* const found = pyreid::floor_setting(name);
  if (found == nullptr) throw pybind11::key_error(name);
  return *found;
}

}  // namespace

PYBIND11_MODULE(PYREID_MODULE, module) {
  module.def("get", [](const char* name) { return setting(name).get(); });
  module.def("set", [](const char* name, int64_t value) {
    if (setting(name).set == nullptr)
      throw pybind11::key_error(std::string(name) + " is read-only");
    setting(name).set(value);
  });
  pyreid::bind_bank_cross_entropy(module);
  pyreid::bind_class_means(module);
  pyreid::bind_dbscan(module);
  pyreid::bind_jaccard(module);
  pyreid::bind_joint_distance(module);
  pyreid::bind_memory_update(module);
  pyreid::bind_negative_mining(module);
  pyreid::bind_products(module);
  pyreid::bind_set_contrast(module);
  pyreid::bind_row_sampling(module);
  pyreid::bind_ranking(module);
}
