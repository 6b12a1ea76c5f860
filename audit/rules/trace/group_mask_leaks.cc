// TR027: tokens go to experts outside the groups that they are limited to.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace of a router that is limited to groups of experts, under a release that masks the other groups with 0.0
(transformers before 5.6): tokens that went to an expert outside their groups, because 0.0 is above the negative scores of the
experts inside.

## Why it matters
The limit to groups keeps a token on few nodes; the leak sends it anywhere, and which experts it takes is decided by index
among equal zeros, not by score. It begins when the correction bias has pushed scores below 0.

## How to fix
transformers 5.6 masks with -inf (pull request 45441).

## Limits
Scores that are positive do not leak, whatever the mask.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "group_limit");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "no router of the trace masks other groups by 0",
                                   "every token stayed within its groups of experts");
  std::int64_t tokens = 0, all = 0;
  for (const std::size_t i : rows.differ) tokens += t->differing[i], all += t->compared[i];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = say::percent(static_cast<double>(tokens) / static_cast<double>(all)) + " of the tokens (" +
                    say::count(tokens) + " of " + say::count(all) + ") in " + replay::layers_of(*t, rows.differ) +
                    " went to experts outside the groups that they are limited to. " + replay::named(*t, rows.differ[0]);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = "Take a release that masks with -inf:\n    pip install \"transformers>=5.6\"";
  finding.does_not_show = "How much worse the chosen experts are.";
  finding.locations = {replay::where(*t, rows.differ[0])};
  finding.sources = {"huggingface/transformers pull request 45441"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_group_mask_leaks;
const Rule rule_group_mask_leaks = {
    .id = "TR027",
    .name = "group-mask-leaks",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Tokens went to experts outside the groups that they are limited to.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
