// The counter of tokens that the run itself keeps for the correction bias, against the recorded choices of the step.
#pragma once

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

/// One way to count the tokens of a step.
struct Counting {
  bool padding = false, kept = false;                  // B9: padding counts; B10: what was dropped does not
  bool evaluation = false, evaluation_before = false;  // B8: of this step; of the one before
  bool earlier = false;                                // B11
  const std::set<std::int64_t>* ranks = nullptr;       // these alone; nullptr: all
};
/// [experts] of a layer, of micro-batch `micro` alone or (-1) of all; empty where the trace lacks what it needs.
std::vector<double> counts_of(const Context& ctx, int layer, const Counting& how, std::int64_t micro = -1);

/// Proper subsets of the recorded ranks that a reduction over one axis of a device mesh leaves `rank` in, with their
/// names; more than one rank each.
std::vector<std::pair<std::string, std::set<std::int64_t>>> rank_groups(const Context& ctx, int layer,
                                                                        std::int64_t rank);

/// Fills the rows expert_counter.
void replay_counter(Context* ctx, const StepTensors& tensors);

}  // namespace moeaudit::replay
