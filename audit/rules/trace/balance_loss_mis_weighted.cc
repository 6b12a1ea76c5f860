// TR001: the balance loss was back-propagated with another weight than configured.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the gradient of what was back-propagated with respect to the model's aux_loss, summed over the
micro-batches of a step and averaged over ranks, is not the configured coefficient, relative to the weight of the
cross-entropy. The factor is named: added twice, not divided by the accumulation steps, times the ranks, and so on. With
coefficient 0 any weight is one too many (G13). Without that gradient the balance loss's part of the routers' gradient
(router_grad_aux) is held to coefficient x d aux / d logits x hidden states.

## Why it matters
The coefficient is what was tuned (0.001 to 0.02 in published runs). At accumulation 8 a loss that is not divided trains
with 8 times that: transformers 4.46 to 5.23 with num_items_in_batch divide the cross-entropy by the tokens of the step and
leave the balance loss alone (fixtures/oracle/accumulation.json). TRL 0.23.0 adds it a second time
(huggingface/trl issue 4070). In a trace the weight is measured to 7 digits, so the name needs no guess.

## How to fix
Divide the coefficient by the factor, or use a release that weighs it right.

## Limits
Ranks are taken to be averaged, as DDP does. A weight of 0 is TR003's. Without aux_loss_grad or router_grad_aux in the
trace, cannot tell.
)md";

std::string remedy(const ReplayTable& t, std::size_t row) {
  const std::string trl = replay::version_of(t, "trl");
  if (t.factor[row] == "2" && trl == "0.23.0")
    return "TRL 0.23.1 takes the second addition out:\n    pip install \"trl>=0.23.1\"";
  if (t.formula[row] == "G13")
    return "The loss is computed where the routers' logits are asked for; in the model's config:\n    "
           "output_router_logits: false";
  if (t.formula[row] == "A28")
    return "With output_router_logits: true the model's loss holds it already; in compute_loss:\n    "
           "loss = outputs.loss  # and not + router_aux_loss_coef * outputs.aux_loss\nUntil then:\n    "
           "router_aux_loss_coef: " +
           say::literal(t.aux_coefficient / t.recorded[row]);
  return "Until the trainer weighs it right, divide the coefficient by the factor, in the model's config:\n    "
         "router_aux_loss_coef: " +
         say::literal(t.aux_coefficient / t.recorded[row]);
}

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  replay::Rows rows = replay::rows_of(*t, "aux_weight");
  const replay::Rows of_router = replay::rows_of(*t, "router_grad_aux");
  if (rows.differ.empty() && rows.agree.empty() && (!of_router.differ.empty() || !of_router.agree.empty()))
    rows = of_router;
  if (!rows.differ.empty() && t->recorded[rows.differ[0]] == 0.0)
    return Outcome::not_applicable("TR003 reports that the balance loss has no gradient");
  if (rows.differ.empty() && rows.agree.empty() && t->output_router_logits == "false") {
    return Outcome::not_applicable("no balance loss was computed: output_router_logits is false");
  }
  if (rows.differ.empty()) {
    return replay::nothing_differs(f, rows, "the trace has no coefficient of a balance loss",
                                   "the balance loss is back-propagated with its coefficient");
  }
  const std::size_t row = rows.differ[0];
  const double factor = t->recorded[row];
  Finding finding;
  finding.severity = Severity::kError;
  if (t->formula[row] == "G13") {
    finding.message = "The coefficient of the balance loss is 0, and it is back-propagated with weight " +
                      say::number(factor) + " all the same (G13).";
  } else {
    finding.message = "The balance loss is back-propagated with " + say::number(factor) + " times its coefficient (" +
                      say::number(t->aux_coefficient * factor) + " instead of " + say::number(t->aux_coefficient) +
                      "). " + replay::named(*t, row);
  }
  finding.evidence = {replay::evidence(*t, row),
                      {"trace coefficient", say::number(t->aux_coefficient), replay::head(*t)},
                      {"trace packages", t->packages, replay::head(*t)}};
  finding.remedy = remedy(*t, row);
  finding.does_not_show = "That this weight does harm: only that it is not the one that was configured.";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"fixtures/oracle/accumulation.json", "huggingface/trl issue 4070",
                     "huggingface/transformers issue 48690"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_mis_weighted;
const Rule rule_balance_loss_mis_weighted = {
    .id = "TR001",
    .name = "balance-loss-mis-weighted",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The balance loss is back-propagated with another weight than its coefficient.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
