// Selection and weights of one layer, and a second forward's selection, against the family's order of routing.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// The family's routing with what the recorded config says; `why` where the order is not known.
std::optional<Routing> routing_of(const Trace& trace, std::string* why);

/// What the recorded config says of a key, or its text_config; null if neither has it.
const Node* config_value(const TraceFacts& facts, std::string_view key);

/// What the behaviour tables say of this topic ("router_logits_dtype") in the release that was recorded, kUnknown standing for the
/// dtype of what it is computed from; nullopt: they do not know that release, or the trace does not say which it was.
std::optional<DType> dtype_of_release(const TraceFacts& facts, const Family& family, std::string_view topic);

/// Whether a table of token ids gives the experts of this layer (deepseek_v4's hash_moe), as the recorded config says.
bool chosen_by_table(const TraceFacts& facts, int layer);

/// Fills the rows selection, weights and recomputed_selection of the layer.
void replay_selection(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l);

}  // namespace moeaudit::replay
