// TR024: what was counted as the load is not what was chosen.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: tokens_per_expert against the counts of selected_experts, or where these were not recorded (or are a
sample) against k choices for each of T tokens. Counts with or without padding, before or after drops are all accepted. A
factor is named: counted twice (a recomputed forward counts again), once a micro-batch, once a rank.

## Why it matters
These counts move the correction bias and are what load metrics show. Counted twice they leave the sign of the bias update
alone, and every metric reads 2 times what it is; counted once a tensor-parallel rank they look like a batch that does not exist; counts
of other tokens (evaluation, another micro-batch) push the bias where the batch did not ask.

## How to fix
Count in the forward only, once: not under recomputation, not in evaluation, reduced over ranks that hold other tokens.

## Limits
Counts of moe-audit's own format. Between steps the trace sees only what was recorded.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;

  const replay::Rows rows = replay::rows_of(*t, "loads");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no tokens_per_expert", "tokens_per_expert are the counts of the choices");
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "tokens_per_expert of " + replay::layers_of(*t, rows.differ) + ": " + say::number(t->recorded[row]) +
                    " where the choices give " + say::number(t->expected[row]) + ". " +
                    (t->name[row].empty() ? "No factor of the settings gives it in every micro-batch."
                     : t->factor[row].empty() ? "They are " + t->name[row] + "."
                                              : "Each choice was " + t->name[row] + ": " + say::number(t->factor_value[row]) + " times.");
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  const std::string& factor = t->factor[row];
  finding.remedy = factor.empty() ? "Count the choices of a micro-batch once, without padding:\n    counts = "
                                    "torch.bincount(chosen[mask].flatten(), minlength=num_experts)"
                   : factor != "2" ? "Add up over micro-batches and over ranks that hold other tokens, not over copies:\n    "
                                     "counts = torch.bincount(chosen[mask].flatten(), minlength=num_experts)"
                                   : "Count in the first forward only:\n    if self.training and torch._C._current_graph_task_id() == -1:  # not while a backward recomputes";
  finding.does_not_show = "Whether anything uses these counts.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"pytorch/torchtitan issue 4148"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_loads_miscounted;
const Rule rule_loads_miscounted = {
    .id = "TR024",
    .name = "loads-miscounted",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "tokens_per_expert are not the counts of the recorded choices.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
