// One function per op: puts its bindings into the module.
#pragma once

#include <pybind11/pybind11.h>

namespace pyreid {

void bind_bank_cross_entropy(pybind11::module_& module);
void bind_class_means(pybind11::module_& module);
void bind_dbscan(pybind11::module_& module);
void bind_jaccard(pybind11::module_& module);
void bind_joint_distance(pybind11::module_& module);
void bind_memory_update(pybind11::module_& module);
void bind_negative_mining(pybind11::module_& module);
void bind_products(pybind11::module_& module);
void bind_set_contrast(pybind11::module_& module);
void bind_row_sampling(pybind11::module_& module);
void bind_ranking(pybind11::module_& module);

}  // namespace pyreid
