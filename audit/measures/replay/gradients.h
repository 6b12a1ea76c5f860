// Gradients of the routers.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// Fills the rows router_grad and router_grad_ce.
void replay_gradients(Context* ctx, const StepTensors& tensors);

}  // namespace moeaudit::replay
