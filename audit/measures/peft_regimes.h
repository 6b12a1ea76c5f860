// The stacks a run may have used, as far as targets care: every distinct pair of memory layout (transformers) and matching
// rules (PEFT) that its version sets allow.
#pragma once

#include <string>
#include <vector>

#include "audit/facts/version.h"
#include "audit/measures/peft_targets.h"

namespace moeaudit {

struct PeftRegime {
  MemoryLayout layout;
  PeftRules rules;
  std::string text;   // "transformers before 5.0.0, peft 0.18.1"
  std::string cite;   // of the table rows used
};

/// The version sets are cut where a row of audit/behaviours begins or ends; stretches that behave alike are one regime.
/// Null sets mean any version. Empty with `why` if the tables do not know the family or a release.
std::vector<PeftRegime> peft_regimes(const std::string& family, const VersionSet* transformers, const VersionSet* peft,
                                     std::string* why);

}  // namespace moeaudit
