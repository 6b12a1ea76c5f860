// Recorded numbers that are NaN or infinite: no formula gives them, and what they are in is not compared.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// Fills finite_logits. `replayed`: every logit was found finite when the layer was read.
void replay_finite(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, bool replayed);
/// Fills finite_losses.
void replay_finite(Context* ctx, const MicroBatchRecord& m);
/// Fills finite_losses with the gradient norm, and finite_gradients.
void replay_finite(Context* ctx, const StepTensors& tensors);

}  // namespace moeaudit::replay
