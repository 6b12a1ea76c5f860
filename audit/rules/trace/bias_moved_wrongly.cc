// TR011: the correction bias moved otherwise than its rule says.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with the correction bias before and after a step and the loads of the step: the bias did not move by
the rate times the sign of mean load - load (with or without centring, or as coefficients.bias_update_centred says). What
it did is named: the wrong way, once a micro-batch, from the loads of one rank or of some, with padding, with evaluations,
with earlier steps' counts, in bfloat16, not at all, in some layers alone, although the rate is 0 or the router frozen.

## Why it matters
Moved the wrong way the bias feeds the busiest expert, and the load collapses; per micro-batch it moves up to M times as far;
in bfloat16 it sticks at 0.5 for a rate of 0.001; from local loads the ranks drift apart (arXiv 2408.15664 algorithm 1).

## How to fix
Update once a step, from the loads of all ranks and micro-batches without padding, in float32.

## Limits
Needs coefficients.bias_update_rate in trace.json, which the recorder cannot see: write it there. A warning where the
experts that are chosen stay the same (centring) and where a frozen router's bias moves.
)md";

std::string remedy(const ReplayTable& t, std::size_t row) {
  const std::string& formula = t.formula[row];
  if (formula == "B15")
    return "Move it only where there is something to balance:\n    if rate > 0 and gate.weight.requires_grad: "
           "bias += rate * torch.sign(load.float().mean() - load.float())";
  if (formula == "B8") return "Count what trains alone:\n    if self.training: self.tokens_per_expert += counts";
  if (formula == "B11") return "Set the counter back after each step:\n    self.tokens_per_expert.zero_()";
  if (formula == "B3" || formula == "B4")
    return "Sum the loads over every rank that holds tokens of the step:\n    torch.distributed.all_reduce(load)";
  return "Once a step, after the loads of all micro-batches and ranks are summed:\n    bias += rate * "
         "torch.sign(load.float().mean() - load.float())";
}

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
  const bool frozen = t->held_to[row] == "the bias of a frozen router stays";
  finding.severity = frozen || t->formula[row] == "B18" ? Severity::kWarning : Severity::kError;
  finding.message = "The correction bias of " + replay::layers_of(*t, rows.differ) + " moved by " +
                    say::number(t->recorded[row]) +
                    (frozen                     ? ", although the router is frozen"
                     : t->formula[row] == "B15" ? ", although its rate is 0"
                                                : " where the loads ask for " + say::number(t->expected[row])) +
                    " (" + replay::bands(t->distance[row]) + "). " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = remedy(*t, row);
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
