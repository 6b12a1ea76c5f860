// What `moe-audit replay` reports.
#pragma once

#include <vector>

#include "audit/facts/finding.h"
#include "audit/facts/replay.h"

namespace moeaudit {

struct ReplayReport {
  ReplayTable table;
  std::vector<InputProblem> problems;          // of trace.json and records
  std::vector<WeightProblem> weight_problems;  // of tensors
};

}  // namespace moeaudit
