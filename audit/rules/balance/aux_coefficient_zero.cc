// BL002: the balance loss is there, with coefficient 0.
#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The routers are trained, this family has a balance loss, and its coefficient resolves to 0: nothing keeps the
experts evenly loaded while this run trains.

## Why it matters
Zero is often a default nobody looked at: ms-swift sets `router_aux_loss_coef` to 0 since 3.7.1 whatever the
checkpoint says (modelscope/ms-swift issue 5318), and trainers that read the coefficient from a wrapped engine got
0.0 (huggingface/trl issue 2197). Without any balance term a router can collapse: 17.8 times the mean load on the
busiest of 256 experts (arXiv 1701.06538 Table 6), dead experts in upcycling (arXiv 2410.07524).

It can also be right. OLMoE trains its SFT without the loss (54.0 against 52.8 with it, arXiv 2409.02060), and the
weight matters less than the batch it is taken over: perplexity 8.167, 8.154 and 8.159 for 0.008, 0.004 and 0.001
(arXiv 2501.11873 Table 4).

## How to fix
Nothing, if it is meant. Else set the coefficient, and the flag that lets it through.

## Limits
A note, never more: the literature is on both sides. It does not look at loads; HE001 and HE002 do, where a trace or expert
counts are given.
)md";

Outcome check(Facts& f) {
  if (auto none = aux::no_subject(f)) return Outcome::not_applicable(*none);
  const AuxEffect* effect = f.want(f->aux_effect);
  if (effect && *effect != AuxEffect::kAdded) {
    return Outcome::not_applicable("this class adds no balance loss at this version, whatever the coefficient");
  }
  const double* coefficient = f.require(f->aux_coefficient);
  if (f.missing()) return f.cannot_tell();
  if (*coefficient != 0) return Outcome::pass("the coefficient is " + say::number(*coefficient));

  const double* usual = f.want(f->aux_coefficient_default);
  const double set = usual && *usual > 0 ? *usual : 0.001;  // 0.001: default of most classes of transformers
  const std::string key = aux::coefficient_key(f);
  Finding finding;
  finding.severity = Severity::kNote;
  finding.message =
      key + " is 0" + say::at(f->aux_coefficient.source()) + ": the routers are trained with no balance loss.";
  finding.evidence = {say::evidence(f->aux_coefficient), say::evidence(f->router_trains)};
  finding.remedy = "Nothing, if it is meant. To balance with this family's usual coefficient:\n" +
                   say::model_config(f, {{aux::flag_key(f), "true"}, {key, say::literal(set)}});
  finding.does_not_show =
      "That the load is or becomes uneven: many fine-tuning runs keep their balance without the loss.";
  finding.locations = {location_of(f->aux_coefficient.source())};
  finding.sources = say::sources({"arXiv 1701.06538 Table 6", "arXiv 2409.02060", "arXiv 2501.11873 Table 4"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_aux_coefficient_zero;
const Rule rule_aux_coefficient_zero = {
    .id = "BL002",
    .name = "aux-coefficient-zero",
    .since = "0.1.0",
    .severity = Severity::kNote,
    .summary = "The balance loss of this family has coefficient 0.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
