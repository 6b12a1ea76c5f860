// Two recorded runs of the same weights and data, split differently over micro-batches and ranks: one ratio a quantity.
#pragma once

#include <map>
#include <string>

#include "audit/facts/fact_sheet.h"
#include "audit/facts/run_pair.h"
#include "audit/traces/trace.h"

namespace moeaudit {

/// Compares the first training step of each. Fills everything but paths and problems of opening.
void compare_runs(const Trace& a, const Trace& b, PairReport* out);

/// How a run splits its batch, and what else multiplies losses: M, W, S, TP, CP, EP, L, k, E, and
/// recompute: 2 where activations are computed twice.
using RunSettings = std::map<std::string, double>;
RunSettings settings_of(const FactSheet& facts);

/// Compares the logs among two runs' facts at the first step that both have. Where no setting differs, the settings
/// that both share name the ratio: one run is known to be right.
void compare_logs(const FactSheet& a, const FactSheet& b, const RunSettings& of_a, const RunSettings& of_b,
                  PairReport* out);

}  // namespace moeaudit
