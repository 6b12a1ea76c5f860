// Where config.json and the tensors of a model contradict each other. RT003 reports it; CK003, which expands the config
// into the tensors it expects, does not compare what rests on contradicted numbers.
#pragma once

#include <string>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit::routing {

struct Disagreement {
  std::string what;   // "router.num_experts is 16, the router of layer 0 has 8 rows"
  std::string key;    // config key that would have to change; "" for the MoE layers
  std::string value;  // what the tensors say
  Evidence config, tensor;
};

/// Requires weights.routers; wants the numbers of the config. Numbers that were themselves read from tensors are not
/// compared. Tensors that are only missing are no contradiction.
std::vector<Disagreement> disagreements(Facts& f);

}  // namespace moeaudit::routing
