// TR032: the run's own counter of tokens is not that of the recorded choices.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the counter of tokens that the run itself keeps for the correction bias (expert_counter: torchtitan's
tokens_per_expert, Megatron-LM's local_tokens_per_expert), read before the optimizer step, against the choices of the step.
What was counted instead is named: every token twice, padding, tokens of evaluations, earlier steps, what was left after
drops, some of the ranks.

## Why it matters
Counted 2 times by activation recomputation the log is wrong and the bias's sign is not; with evaluations, padding or earlier
steps in it the bias balances other text than the one that trains (pytorch/torchtitan 4148, 4154).

## How to fix
Count once a forward, in training, without padding, and set the counter back after each step.

## Limits
Counts are integers: they must agree exactly. A counter that was set back before it was recorded cannot be judged. Counts of
a micro-batch are TR024's.
)md";

std::string remedy(const std::string& formula) {
  if (formula == "B4")
    return "Sum over every rank that holds tokens of the step:\n    torch.distributed.all_reduce(tokens_per_expert)";
  if (formula == "B9")
    return "Leave padding out:\n    counts = torch.bincount(chosen[mask].flatten(), minlength=num_experts)";
  if (formula == "B11") return "Set the counter back after each step:\n    self.tokens_per_expert.zero_()";
  return "Count once a forward that trains, and not again where it is recomputed:\n    if self.training and "
         "torch._C._current_graph_task_id() == -1: self.tokens_per_expert += counts";
}

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "expert_counter");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no counter of the run's own",
                                   "the counter holds the recorded choices");
  const std::size_t row = rows.differ[0];
  const std::string& formula = t->formula[row];
  Finding finding;
  finding.severity = formula.empty() || formula == "B7" ? Severity::kWarning : Severity::kError;
  finding.message = "The run's own counter of " + replay::layers_of(*t, rows.differ) + " holds " +
                    say::number(t->recorded[row]) + ", and the recorded choices are " + say::number(t->expected[row]) +
                    " (" + t->held_to[row] + "). " +
                    (formula.empty() ? "No known way to count gives it." : replay::named(*t, row));
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = remedy(formula);
  finding.does_not_show = "That the bias moved by these counts (TR011 does).";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"pytorch/torchtitan issues 4148, 4154"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_counter_miscounted;
const Rule rule_counter_miscounted = {
    .id = "TR032",
    .name = "counter-miscounted",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The run's own counter of tokens is not that of the recorded choices.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
