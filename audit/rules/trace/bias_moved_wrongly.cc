// TR011: the correction bias moved otherwise than its rule says.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with the correction bias before and after a step and the loads of the step: the bias did not move by
the rate times the sign of mean load - load (with or without centring). What it did is named: the wrong way, once a
micro-batch, from one rank's loads, with padding, in bfloat16, not at all.

## Why it matters
Moved the wrong way the bias feeds the busiest expert, and the load collapses; per micro-batch it moves up to M times as far;
in bfloat16 it sticks at 0.5 for a rate of 0.001; from local loads the ranks drift apart (arXiv 2408.15664 algorithm 1).

## How to fix
Update once a step, from the loads of all ranks and micro-batches without padding, in float32.

## Limits
Needs coefficients.bias_update_rate in trace.json, which the recorder cannot see: write it there.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "bias_step");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no correction bias",
                                   "the correction bias moved as its rule says");
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "The correction bias of " + replay::layers_of(*t, rows.differ) + " moved by " +
                    say::number(t->recorded[row]) + " where the loads ask for " + say::number(t->expected[row]) + " (" +
                    replay::bands(t->distance[row]) + "). " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy =
      "Once a step, after the loads of all micro-batches and ranks are summed:\n    bias += rate * "
      "torch.sign(load.float().mean() - load.float())";
  finding.does_not_show = "That the load is uneven yet.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"arXiv 2408.15664 algorithm 1"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_bias_moved_wrongly;
const Rule rule_bias_moved_wrongly = {
    .id = "TR011",
    .name = "bias-moved-wrongly",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The correction bias moved otherwise than loss-free balancing does.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
