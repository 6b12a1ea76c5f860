// TR010: the second forward under checkpointing chose other experts.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace of a run with gradient checkpointing: tokens whose experts in the recomputed forward are not those of the
first.

## Why it matters
The backward then sends their gradient to experts that did not produce their output: of a top-2 token that changes one
expert, half. Router noise without a saved random
state, a correction bias that moved in between, or kernels that are not deterministic do it.

## How to fix
Save the random state (`preserve_rng_state=True`), or keep the choices of the first forward.

## Limits
The trace must hold both selections.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "recomputed_selection");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no recomputed selection: no gradient checkpointing",
                                   "recomputation chose the same experts");
  std::int64_t tokens = 0, all = 0;
  for (const std::size_t i : rows.differ) tokens += t->differing[i], all += t->compared[i];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message =
      say::percent(static_cast<double>(tokens) / static_cast<double>(all)) + " of the tokens (" + say::count(tokens) +
      " of " + say::count(all) + ") in " + replay::layers_of(*t, rows.differ) +
      " go to other experts when the forward is recomputed: their gradient reaches experts that did not run.";
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy =
      "Keep the random state over the two forwards:\n    gradient_checkpointing_kwargs: {use_reentrant: false, "
      "preserve_rng_state: true}";
  finding.does_not_show = "How far the gradients are off.";
  finding.locations = {replay::where(*t, rows.differ[0])};
  finding.sources = {"pytorch torch/utils/checkpoint.py"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_recomputation_routes_differently;
const Rule rule_recomputation_routes_differently = {
    .id = "TR010",
    .name = "recomputation-routes-differently",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Activation recomputation chose other experts than the forward did.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
