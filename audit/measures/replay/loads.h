// What the framework counted as the load of each expert against the recorded choices.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// Fills the row loads of the layer; its choices are counted in the context.
void replay_loads(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t);

}  // namespace moeaudit::replay
