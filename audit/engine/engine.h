// Selects rules, runs the measures they ask for, runs the rules, orders the results.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/inputs/inputs.h"
#include "audit/measures/measure.h"

namespace moeaudit {

enum class FailOn { kError, kWarning, kNote, kNever };

struct EngineOptions {
  std::vector<std::string> select;   // ids or id prefixes; empty: all
  std::vector<std::string> ignore;
  FailOn fail_on = FailOn::kError;
  bool strict = false;               // cannot_tell gives exit code 2
  bool replays = true;               // false: --static
  bool full = false;                 // --full: read every weight, whatever the size
  Baseline baseline;                 // accepted findings; empty: none
  bool comments = true;              // false: "# moe-audit: ignore" in files suppresses nothing
  bool measure_everything = false;   // `moe-audit facts`: run every measure, whether or not a rule asks
  int threads = 1;
  Device device = Device::kAuto;     // where kernels run; the verdict does not depend on it
  std::function<void(std::string_view stage, double done)> progress;
};

/// Judges one run. Moves the facts and inputs of `run` into the result.
RunResult audit_run(LoadedRun run, const EngineOptions& options);

/// Verdict and exit code over all runs (docs/architecture.md).
AuditResult conclude(std::vector<RunResult> runs, const EngineOptions& options);

/// True if `pattern` is the id of this rule, a prefix of it, or its name.
bool selects(std::string_view pattern, std::string_view id, std::string_view name);
/// True if `pattern` (id, id prefix or name) selects no rule at all: wrong usage.
bool selects_nothing(std::string_view pattern);

}  // namespace moeaudit
