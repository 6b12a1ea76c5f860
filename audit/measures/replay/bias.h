// The step of the correction bias against the loads of the step.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// Biases before the step, into the context: routing needs them.
void read_biases(Context* ctx, const StepTensors& tensors);
/// Fills the rows bias_step; the loads of the step are counted.
void replay_bias(Context* ctx, const StepTensors& tensors);

}  // namespace moeaudit::replay
