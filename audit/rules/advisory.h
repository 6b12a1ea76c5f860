// An advisory: a fault that some releases of a package have and that bites under some configurations. One row of
// audit/behaviours/advisories/<package>.yaml (docs/add_an_advisory.md); each row is a rule, AV001 and on.
#pragma once

#include <span>
#include <string_view>

#include "audit/rules/rule.h"

namespace moeaudit {

/// Releases with the fault: [from, until), "" is open. `seen`: the newest release that was looked at and still has it;
/// what came after it is unknown.
struct AdvisoryWindow {
  std::string_view from, until, seen;
};

/// No windows: every release.
struct AffectedPackage {
  std::string_view name;      // "transformers"
  const FactInfo* versions;   // of the fact that holds the versions of this package
  std::span<const AdvisoryWindow> windows;
};

enum class Comparison { kEqual, kNotEqual, kLess, kAtMost, kMore, kAtLeast, kIn, kContains };

/// "training.trainer in DPOTrainer, KTOTrainer". A fact that is unknown leaves it open.
struct AdvisoryCondition {
  const FactInfo* fact;
  Comparison comparison;
  std::span<const std::string_view> values;
  std::string_view text;  // as written in the row
};

/// Lines to paste, in the words of the framework at hand (audit/rules/say.h).
enum class PasteInto { kTraining, kModelConfig, kLora };
struct AdvisorySetting {
  PasteInto where;
  std::string_view key, value;
};

struct Advisory {
  std::string_view id, name, package, summary;
  Severity severity;
  std::string_view evidence;                // "measured", "read" (in the released sources), "reported"
  std::span<const AffectedPackage> affected;
  std::span<const AdvisoryCondition> when;  // all must hold
  std::string_view text;                    // what happens, with numbers
  std::string_view release;                 // requirement that takes the run out of the window: "transformers>=5.6.0"; may be ""
  std::string_view advice;                  // sentence before what is to paste; may be ""
  std::string_view paste;                   // lines as they are; may be ""
  std::span<const AdvisorySetting> settings;
  std::string_view does_not_show;
  std::span<const std::string_view> issues;   // "huggingface/transformers#45120"
  std::span<const std::string_view> sources;  // issues and citations
};

extern const Advisory kAdvisories[];
extern const Rule kAdvisoryRules[];  // the same rows as rules; both ordered by id
extern const int kNumAdvisories;

/// finding: conditions hold and every version the run may use has the fault. pass: conditions hold and no version has it.
/// not_applicable: a condition does not hold, or no version has it. cannot_tell: the rest.
Outcome judge(const Advisory& advisory, Facts& facts);

/// "5.0.0 to before 5.6.0", "before 0.13.0", "1.7.0 to 1.16.0, not fixed there", "every release".
std::string text_of(const AffectedPackage& affected);

}  // namespace moeaudit
