// What `moe-audit compare` reports: two recorded runs of the same data that differ in how the batch was split.
#pragma once

#include <string>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit {

/// One quantity of a step in both runs. The split must not change it, so the ratio must be 1.
struct PairRow {
  std::string quantity;  // "aux_weight"; docs/replay.md
  double a = 0, b = 0;   // in the first recorded step
  double ratio = 0;      // b / a
  std::string factor;    // nearest product of settings that differ, "M"; "" is 1
  double factor_value = 1;
  double off = 0;      // |ln(ratio / factor_value)|
  bool named = true;   // false: the nearest is too far off to be a name
  std::string rule;  // id of the rule that speaks of it; "" where the ratio is 1
};

struct PairReport {
  std::string a, b;                  // paths
  std::vector<std::string> differs;  // settings: "M 1 -> 8"
  std::string not_comparable;        // why the two are no pair; empty: they are
  std::string note;                  // what else to know of the ratios; may be empty
  std::vector<PairRow> rows;
  std::vector<InputProblem> problems;
  std::vector<WeightProblem> weight_problems;
};

}  // namespace moeaudit
