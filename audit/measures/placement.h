// A forecast for expert parallelism from measured loads: which rank is waited for, and what crosses between ranks.
#pragma once

#include <optional>
#include <vector>

#include "audit/facts/health.h"
#include "audit/traces/expert_map.h"

namespace moeaudit {

struct PlacementOptions {
  std::int64_t ranks = 0;        // 0: no forecast, unless there is a map
  std::optional<ExpertMap> map;  // else contiguous runs of E / ranks experts
  std::vector<double> speeds;    // of the ranks, relative; empty: all alike
  std::int64_t hidden_size = 0;  // 0: not known, and no bytes
  int bytes_per_value = 2;

  std::int64_t size() const { return map ? map->ranks : ranks; }
};

/// What cannot be placed (experts that do not divide into equal runs, a map of other experts or layers, speeds of
/// another number of ranks) is a problem, and the forecast is without numbers.
PlacementForecast forecast_placement(const std::vector<LayerHealth>& layers, const PlacementOptions& options,
                                     std::vector<InputProblem>* problems);

}  // namespace moeaudit
