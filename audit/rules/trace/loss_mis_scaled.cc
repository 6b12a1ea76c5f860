// TR006: tokens weigh in the gradient what they should not.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the derivative of what was back-propagated with respect to the sum of token losses of each
micro-batch, averaged over ranks, is not one over the labels of the whole step. The normalisation is named: times the
accumulation steps, the mean of means, another count of tokens.

## Why it matters
A factor of the accumulation steps moves where max_grad_norm clips and what the balance loss weighs beside it (GA001 has the
measured releases). The mean of means weighs a token of a short micro-batch more: with 1 and 3 labels, 3 times
(huggingface/transformers issue 34242). A count that holds labels which no loss has scales everything down.

## How to fix
Use a release that counts the labels of the step; with a loop of your own, divide the sum of token losses by them.

## Limits
Needs loss_grad, token losses and the records of all ranks. The mean of means and a wrong count are warnings (the factor is
near 1), a factor of M or W is an error.
)md";

std::string remedy(const ReplayTable& t, std::size_t row) {
  constexpr std::string_view kRight = "4.57.6";
  if (t.formula[row] == "G0")
    return "transformers 5.10.1 counts the labels that have a loss; before it, mask the first label of every "
           "sequence:\n    pip install \"transformers>=5.10.1\"";
  if (t.trainer.empty())  // a loop of one's own
    return "In the training loop, weigh each micro-batch by its labels:\n    (outputs.loss * labels_of_micro_batch / "
           "labels_of_step).backward()";
  const std::string without = "do without accumulation:\n    gradient_accumulation_steps: 1";
  if (replay::version_of(t, "transformers") == kRight)
    return "This release is right by itself: look for a division or a factor in compute_loss; or " + without;
  return "Use a release that was measured right (GA001):\n    pip install \"transformers==" + std::string(kRight) +
         "\"\nor " + without;
}

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "loss_weight");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no losses of micro-batches",
                                   "every token weighs one over the labels of its step");
  const std::size_t row = rows.differ[0];
  const bool factor = !t->name[row].empty() && !t->factor[row].empty();
  Finding finding;
  finding.severity = factor ? Severity::kError : Severity::kWarning;
  finding.message = "A token's loss is back-propagated with " + say::number(t->recorded[row]) + " times its weight where it is farthest off (" + say::count(t->differing[row]) + " of " + say::count(t->compared[row]) +
                    " micro-batches; accumulation " + say::count(t->accumulation) + ", ranks " + say::count(t->ranks) +
                    "). " + replay::named(*t, row);
  finding.evidence = {replay::evidence(*t, row), {"trace packages", t->packages, replay::head(*t)}};
  finding.remedy = remedy(*t, row);
  finding.does_not_show =
      "That the weights are spoilt: Adam's step hardly depends on the scale; clipping, weight decay and the balance "
      "loss do.";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"huggingface/transformers issues 34242, 35663, 45305", "fixtures/oracle/accumulation.json"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_loss_mis_scaled;
const Rule rule_loss_mis_scaled = {
    .id = "TR006",
    .name = "loss-mis-scaled",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The cross-entropy of a token is back-propagated with the wrong weight.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
