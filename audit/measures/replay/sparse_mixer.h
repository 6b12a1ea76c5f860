// Selection and weights of a layer whose router is a SparseMixer (PhiMoE).
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// Fills the rows of the layer. At an evaluation both picks and weights are those of the logits; in training a pick
/// must be one that can be drawn, and its weight one that the midpoint of the third-order method leaves possible: the
/// draws are in no trace.
void replay_sparse_mixer(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l,
                         Row* selection, Row* weights);

}  // namespace moeaudit::replay
