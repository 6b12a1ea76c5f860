// Replays a trace: recomputes what the routers and the losses of the recorded steps should have been, and names what
// was computed instead. docs/replay.md says what each quantity is.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "audit/facts/replay.h"
#include "audit/tensors/tensor_store.h"
#include "audit/traces/trace.h"

namespace moeaudit {

struct ReplayOptions {
  std::function<void(std::string_view stage, double done)> progress;
};

/// Reads the trace a layer of a micro-batch at a time; what could not be read goes to `problems` and is left out.
ReplayTable replay_trace(const Trace& trace, const ReplayOptions& options, std::vector<WeightProblem>* problems);

}  // namespace moeaudit
