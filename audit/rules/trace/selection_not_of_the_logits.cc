// TR007: the experts that ran are not those that the recorded logits choose.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: tokens whose experts are not the k best of their recorded logits by the family's order (score, bias,
groups), ties and one rounding of every score apart. A form that makes exactly the recorded choices is named.

## Why it matters
Then the router that is trained is not the router that runs: a bias on the logits instead of the scores, groups masked by
zero so that others leak in (transformers before 5.6), a choice by other logits than those that the loss sees.

## How to fix
Compare the routing code with the family's; the named form says where to look.

## Limits
Families whose order moe-audit replays; with a correction bias the trace must hold it. PhiMoE in training: experts are drawn from
those within twice router_jitter_noise of the best, so that only one from outside is wrong.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "selection");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no choices beside logits",
                                   "the recorded choices are those of the recorded logits");
  std::int64_t tokens = 0, all = 0;
  for (const std::size_t i : rows.differ) tokens += t->differing[i], all += t->compared[i];
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = say::percent(static_cast<double>(tokens) / static_cast<double>(all)) + " of the tokens (" +
                    say::count(tokens) + " of " + say::count(all) + ") in " + replay::layers_of(*t, rows.differ) +
                    " went to experts that their logits do not choose. " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = "Compare the routing code with that of " + t->model_type +
                   ", then record again and look at the layers:\n    moe-audit replay -v " + t->path;
  finding.does_not_show = "Which of the two is meant: the choice or the logits.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"audit/families/" + t->model_type + ".yaml"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_selection_not_of_the_logits;
const Rule rule_selection_not_of_the_logits = {
    .id = "TR007",
    .name = "selection-not-of-the-logits",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The chosen experts are not those that the recorded logits choose.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
