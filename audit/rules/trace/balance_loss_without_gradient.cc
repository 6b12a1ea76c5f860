// TR003: a balance loss is reported and trains nothing.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: aux_loss was computed, its coefficient is over 0, and nothing of it is back-propagated: it does not
require a gradient, or the gradient of what was back-propagated with respect to it is exactly 0, in every recorded step.

## Why it matters
The log shows a balance loss, the routers train without one. Seen with re-entrant gradient checkpointing, where the
router logits that the model collects come from the forward under no_grad; with a scaler whose output is thrown away
(Automodel issue 1408); with counts in place of probabilities (Megatron-LM, January 2024).

## How to fix
With checkpointing, use the non-reentrant form. Else look for detach(), no_grad or an unused result between the router and
the loss.

## Limits
Steps that were recorded; a path that carries a gradient from another rank is not seen.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  if (t->aux_coefficient == 0) return Outcome::not_applicable("the coefficient of the balance loss is 0");
  replay::Rows rows = replay::rows_of(*t, "aux_weight");
  const replay::Rows of_router = replay::rows_of(*t, "router_grad_aux");
  if (rows.differ.empty() && rows.agree.empty() && (!of_router.differ.empty() || !of_router.agree.empty()))
    rows = of_router;
  const bool zero = !rows.differ.empty() && t->recorded[rows.differ[0]] == 0.0 && t->factor[rows.differ[0]] == "0";
  if (!zero) {
    if (!rows.differ.empty()) return Outcome::pass("the balance loss has a gradient");
    if (rows.agree.empty() && t->output_router_logits == "false")
      return Outcome::not_applicable("no balance loss was computed: output_router_logits is false");
    return replay::nothing_differs(f, rows, "the trace has no coefficient of a balance loss",
                                   "the balance loss has a gradient");
  }
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "The balance loss is computed with coefficient " + say::number(t->aux_coefficient) +
                    ", and nothing of it is back-propagated: its gradient is exactly 0 in all " +
                    say::plural(t->compared[row], "recorded step", "recorded steps") +
                    ". The routers train without it.";
  finding.evidence = {replay::evidence(*t, row),
                      {"trace coefficient", say::number(t->aux_coefficient), replay::head(*t)}};
  finding.remedy =
      "With gradient checkpointing, take the form that keeps the logits' graph:\n    gradient_checkpointing_kwargs: "
      "{use_reentrant: false}\n"
      "Else look for detach() or no_grad between the router's logits and the loss.";
  finding.does_not_show = "That the load is uneven.";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"NVIDIA-NeMo/Automodel issue 1408", "pytorch torch/utils/checkpoint.py"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_without_gradient;
const Rule rule_balance_loss_without_gradient = {
    .id = "TR003",
    .name = "balance-loss-without-gradient",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The balance loss is computed and logged, and has no gradient.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
