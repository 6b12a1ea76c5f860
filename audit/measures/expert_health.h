// Expert health: how a trace's tokens spread over the experts, and how sure the router was. docs/health.md defines every
// number.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "audit/facts/health.h"
#include "audit/measures/placement.h"
#include "audit/traces/trace.h"
#include "kernels/backend.h"

namespace moeaudit {

struct HealthOptions {
  int threads = 1;                    // results do not depend on it
  kernels::Backend* backend = &kernels::on_host();  // of the routing of logits and of the counts; nor on this
  std::optional<Scoring> score;       // what makes probabilities of logits; else the family's, else softmax, and it says so
  bool co_activation = false;         // keep the whole [E, E]
  PlacementOptions placement;
  const Trace* against = nullptr;     // the same tokens, routed by another checkpoint
  std::function<void(std::string_view stage, double done)> progress;
};

/// What a ReplayBackend does of it, and about how long one core of the host works at that.
inline constexpr std::string_view kMeasuredOnBackend = "routing and counts";
double health_seconds(const Trace& trace);

/// Reads the trace once, a micro-batch at a time. What could not be read is in weight_problems, and left out.
HealthReport measure_health(const Trace& trace, const HealthOptions& options);

}  // namespace moeaudit
