// What `moe-audit replay` reports.
#pragma once

#include <string>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/facts/replay.h"

namespace moeaudit {

struct ReplayReport {
  ReplayTable table;
  std::vector<InputProblem> problems;          // of trace.json and records
  std::vector<WeightProblem> weight_problems;  // of tensors
  std::string backend, warning;                // "host avx2"; a device that failed, and what was done instead
};

}  // namespace moeaudit
