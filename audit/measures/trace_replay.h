// Replays a trace: recomputes what the routers and the losses of the recorded steps should have been, and names what
// was computed instead. docs/replay.md says what each quantity is.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "audit/facts/replay.h"
#include "audit/tensors/tensor_store.h"
#include "audit/traces/trace.h"
#include "kernels/backend.h"

namespace moeaudit {

struct ReplayOptions {
  int threads = 1;                                 // results do not depend on it
  kernels::Backend* backend = &kernels::on_host();  // of the routing and of the losses from logits; nor on this
  std::function<void(std::string_view stage, double done)> progress;
};

/// What a ReplayBackend does of a replay.
inline constexpr std::string_view kReplayedOnBackend = "routing, balance loss and z-loss";
/// About how long one core of the host works at that.
double host_seconds(const Trace& trace);

/// Reads the trace a micro-batch at a time, and of it as many layers as there are threads; what could not be read goes to `problems` and is left out.
ReplayTable replay_trace(const Trace& trace, const ReplayOptions& options, std::vector<WeightProblem>* problems);

}  // namespace moeaudit
