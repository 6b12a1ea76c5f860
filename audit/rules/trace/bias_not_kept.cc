// TR033: the correction bias is not what the step before left.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with two steps next to each other: the correction bias before a step is the bias after the step
before. If not: whether it is 0 (not saved, or not loaded), what it had been before (a master copy that was lost), rounded to
bfloat16, or shifted by a constant.

## Why it matters
The bias is state that no optimizer holds: a resumed run that starts it from 0 sends tokens where they went before any
balancing, and needs thousands of steps of 0.001 to come back. Rounded to bfloat16 it sticks: between 0.25 and 0.5 its
neighbours are 0.002 apart.

## How to fix
Keep it in float32, as a persistent buffer.

## Limits
The two steps must be recorded in one trace. A shift by a constant chooses the same experts: a note.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "bias_kept");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no correction bias",
                                   "every step starts from the bias of the step before");
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = t->formula[row] == "B18"  ? Severity::kNote
                     : t->formula[row].empty() ? Severity::kWarning
                                               : Severity::kError;
  finding.message = "The correction bias of " + replay::layers_of(*t, rows.differ) + " was " +
                    say::number(t->expected[row]) + " after one step and is " + say::number(t->recorded[row]) +
                    " before the next. " +
                    (t->name[row].empty() ? "Something else writes to it." : replay::named(*t, row));
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy =
      "Keep it in float32 and in the checkpoint:\n    self.register_buffer(\"e_score_correction_bias\", "
      "torch.zeros(num_experts, dtype=torch.float32), persistent=True)";
  finding.does_not_show = "Who writes to it between the steps.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"NVIDIA-NeMo/Megatron-Bridge issue 4199", "deepspeedai/DeepSpeed issue 8358"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_bias_not_kept;
const Rule rule_bias_not_kept = {
    .id = "TR033",
    .name = "bias-not-kept",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The correction bias changes between two steps.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
