// Two recorded runs of the same weights and data, split differently over micro-batches and ranks: one ratio a quantity.
#pragma once

#include "audit/facts/run_pair.h"
#include "audit/traces/trace.h"

namespace moeaudit {

/// Compares the first training step of each. Fills everything but paths and problems of opening.
void compare_runs(const Trace& a, const Trace& b, PairReport* out);

}  // namespace moeaudit
