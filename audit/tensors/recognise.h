// Finds routed experts in a model nobody described: by shapes, with names only as a hint.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "audit/facts/values.h"
#include "audit/tensors/tensor_store.h"

namespace moeaudit {

/// A layer counts as MoE if it holds experts and a router that fits them:
///  - E >= 2 tensor groups "...experts.<e>...." (e from 0 to E-1), or one stack [E, ., .];
///  - a matrix [E, d] where d is a dimension of the experts' tensors.
/// A stack needs "expert" in its name, or a router called so beside it (GraniteMoE's input_linear).
struct Recognised {
  int layers = 0;                          // MoE layers found; 0: no experts
  std::int64_t experts = 0;                // E of the first of them
  std::int64_t hidden = 0;                 // d of the first of them
  std::vector<std::int64_t> moe_layers;    // indices, ascending
  std::string router_tensor;               // of the first of them
  RouterTable table;                       // one row a layer
};
Recognised recognise_moe(const TensorStore& model);

}  // namespace moeaudit
