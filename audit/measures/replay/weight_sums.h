// Whether routing weights that are divided by their sum add up to the scaling factor.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// Fills the row weight_sum of the layer.
void replay_weight_sums(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l);

}  // namespace moeaudit::replay
