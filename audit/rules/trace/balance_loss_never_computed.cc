// TR005: a coefficient is configured and no balance loss was computed in the recorded steps.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the coefficient of the balance loss is over 0, and none of the recorded training micro-batches has an
aux_loss, because output_router_logits is false, or although it is true.

## Why it matters
In transformers the coefficient alone does nothing: the forward adds the balance loss only if output_router_logits is true,
and it is false by default (huggingface/transformers issue 44242). Some classes do not read that flag from the config (JetMoE of
4.57.6 reads it from the call alone; Llama 4 nowhere: BL005). What the loss is worth is in BL001.

## How to fix
Switch it on with `output_router_logits: true`, or write coefficient 0 and say so.

## Limits
A warning: most configs carry the coefficient of pre-training. A note where it is the default of the model's class, so that
nobody need have asked for it; nothing at all where that class computes no such loss in this release. BL001 is an error where
the user's own training config states the coefficient.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  if (!(t->aux_coefficient > 0))
    return Outcome::not_applicable("the trace has no coefficient of a balance loss over 0");
  const replay::Rows rows = replay::rows_of(*t, "aux_weight");
  if (!rows.differ.empty() || !rows.agree.empty() || replay::rows_of(*t, "aux_loss").any())
    return Outcome::pass("a balance loss was computed");
  const replay::Rows loss = replay::rows_of(*t, "loss_weight");  // the model's output was seen
  const bool ignored = t->output_router_logits == "true" && !(loss.agree.empty() && loss.differ.empty());
  if (t->output_router_logits != "false" && !ignored)
    return replay::nothing_differs(f, rows, "the trace does not say whether a balance loss was to be computed", "");
  const double* usual = f.want(f->aux_coefficient_default);
  const bool by_default = !ignored && usual != nullptr && *usual == t->aux_coefficient;
  const AuxEffect* effect = f.want(f->aux_effect);
  const bool deaf = effect != nullptr && *effect == AuxEffect::kIgnored;  // to the flag: the class has no such loss
  if (deaf && by_default) return Outcome::not_applicable(t->model_class + " computes no balance loss, and nobody asked for one");
  Finding finding;
  finding.severity = by_default ? Severity::kNote : Severity::kWarning;
  finding.message = "router_aux_loss_coef is " + say::number(t->aux_coefficient) +
                    (by_default ? ", the default of " + t->model_class : "") + ", and in " +
                    say::plural(t->micro_batches, "recorded micro-batch", "recorded micro-batches") +
                    " no balance loss was computed: " +
                    (ignored ? "output_router_logits is true, and " + t->model_class + " returned no aux_loss."
                             : "output_router_logits is false.");
  finding.evidence = {{"trace coefficient", say::number(t->aux_coefficient), replay::head(*t)},
                      {"trace output_router_logits", t->output_router_logits, replay::head(*t)}};
  finding.remedy = deaf    ? t->model_class + " computes no balance loss: say that it is off.\n    router_aux_loss_coef: 0"
                   : ignored ? "Ask for it in the call, and look whether aux_loss comes back:\n    "
                               "model(**batch, output_router_logits=True)\nor say that it is off:\n    router_aux_loss_coef: 0"
                             : "Switch the loss on in the model's config:\n    output_router_logits: true\nor say that it is "
                             "off:\n    router_aux_loss_coef: 0";
  finding.does_not_show = "That the load is uneven, or that the loss would help.";
  finding.locations = {replay::head(*t)};
  finding.sources = {"huggingface/transformers issue 44242"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_never_computed;
const Rule rule_balance_loss_never_computed = {
    .id = "TR005",
    .name = "balance-loss-never-computed",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "A balance loss is configured and was never computed.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
