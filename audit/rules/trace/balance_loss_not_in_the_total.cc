// TR030: a balance loss is reported and not in the loss that is back-propagated.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the model's loss is its cross-entropy alone, although it reports an aux_loss and the coefficient is
over 0; and nothing in the trace says that the trainer adds it (aux_loss_grad).

## Why it matters
The log shows a balance loss and the routers train without one, as if the coefficient (0.001 to 0.02 in published runs) were
0. Seen where a trainer computes its own loss from the logits
and drops the model's (chunked or fused cross-entropy, GRPO), and where the model adds it only if labels are given.

## How to fix
Add it where the loss is made.

## Limits
With aux_loss_grad in the trace the weight itself is measured: TR001 and TR003 speak of it, and this rule passes.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows weight = replay::rows_of(*t, "aux_weight");
  if (!weight.differ.empty() || !weight.agree.empty())
    return Outcome::pass("its weight in what was back-propagated is measured (TR001, TR003)");
  const replay::Rows rows = replay::rows_of(*t, "aux_in_loss");
  const bool absent = !rows.differ.empty() && t->recorded[rows.differ[0]] == 0.0 && t->factor[rows.differ[0]] == "0";
  if (!absent) {
    if (!rows.differ.empty()) return Outcome::pass("the balance loss is in the model's loss");
    return replay::nothing_differs(f, rows, "the trace reports no balance loss beside the model's loss",
                                   "the balance loss is in the model's loss");
  }
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "The balance loss is missing from the total: in " + say::count(t->differing[row]) + " of " +
                    say::count(t->compared[row]) + " micro-batches the model's loss is the cross-entropy alone, with " +
                    "coefficient " + say::number(t->aux_coefficient) + " configured.";
  finding.evidence = {replay::evidence(*t, row),
                      {"trace coefficient", say::number(t->aux_coefficient), replay::head(*t)}};
  finding.remedy =
      "Add it where the loss is made:\n    loss = loss + model.config.router_aux_loss_coef * outputs.aux_loss";
  finding.does_not_show = "Whether the trainer adds it later: record loss and aux_loss_grad with the recorder to see.";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"huggingface/transformers issue 44242", "fixtures/oracle/accumulation.json"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_not_in_the_total;
const Rule rule_balance_loss_not_in_the_total = {
    .id = "TR030",
    .name = "balance-loss-not-in-the-total",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The reported balance loss is not in the total loss.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
