// A checkpoint's routers on given hidden states, as a trace: what its experts would get.
#pragma once

#include <memory>
#include <vector>

#include "audit/facts/fact_sheet.h"
#include "audit/facts/finding.h"
#include "audit/measures/replay_backend.h"
#include "audit/tensors/tensor_store.h"
#include "audit/traces/trace.h"

namespace moeaudit {

/// Routes the hidden states (one tensor for all layers, or one a layer: router_inputs.h) in float64 with the family's
/// conventions, 1024 tokens a micro-batch, when they are asked for. nullptr with a fatal problem that says what is
/// missing. `facts` gets the routers that the headers show; the stores must outlive the trace. `backend`: where the
/// routers run, and, once the trace has been read, what took part.
std::unique_ptr<Trace> route_hidden_states(FactSheet* facts, const TensorStore& model, const TensorStore& hidden_states,
                                           Device device, std::shared_ptr<ReplayBackend>* backend,
                                           std::vector<InputProblem>* problems);

}  // namespace moeaudit
