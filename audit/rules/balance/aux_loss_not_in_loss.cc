// BL001: a balance loss is asked for and nothing adds it to the loss.
#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The routers are trained, the coefficient of the balance loss (`router_aux_loss_coef`) resolves to more than 0, and
nothing in this stack adds that loss: `output_router_logits` is off, or the trainer's own path leaves it out (TRL's
DPO trainer before 1.8.0, Trainer with label smoothing, which takes the labels away from the model).

## Why it matters
In Hugging Face transformers the coefficient alone does nothing. The forward of every family adds the balance loss
only if `output_router_logits` is true, and it is false by default (models/mixtral/modeling_mixtral.py;
huggingface/transformers issue 44242). A run that says 0.02 and trains with 0 is not the run that was configured.

What the loss is worth: ST-MoE fine-tunes slightly better with it (SuperGLUE 86.35 with, 85.95 without, mean of the
four capacity settings of arXiv 2202.08906 Table 5). OLMoE does better without it in SFT (54.0 against 52.8, arXiv
2409.02060), and its balance hardly moves (12.22 to 12.16). Training from scratch without any balance term
collapses: the busiest expert of 256 gets 17.8 times the mean load (arXiv 1701.06538 Table 6).

## How to fix
Switch the loss on with `output_router_logits: true`, or say that it is off: coefficient 0.

## Limits
Off can be a choice, as OLMoE shows; then write coefficient 0 and the next reader knows. Error only if your own
training config or arguments state the coefficient; a warning if it merely came with the model. A class that ignores
the flag or crashes on it is BL005's, coefficient 0 is BL002's. Balance terms that your own code adds are not seen.
)md";

std::string cause(Facts& f) {
  const bool* flag = f.want(f->aux_flag);
  const double* smoothing = f.want(f->label_smoothing);
  const std::string* trainer = f.want(f->trainer);
  const std::string key = aux::flag_key(f);
  if (smoothing && *smoothing != 0.0) {
    return "label_smoothing_factor is " + say::number(*smoothing) + say::at(f->label_smoothing.source()) +
           ", and Trainer then takes the labels away before the model could add it";
  }
  if (flag && !*flag) return key + " is false" + say::whence(f->aux_flag.origin(), f->aux_flag.source());
  const std::string who = trainer ? *trainer : "this trainer";
  return "the loss of " + who + " leaves it out, although " + key + " is " + (flag ? "true" : "not known");
}

std::string remedy(Facts& f, double coefficient) {
  const std::string key = aux::coefficient_key(f);
  const std::string off = "If it is off by choice, say so. " + say::model_config(f, {{key, "0"}});
  const AuxEffect* effect = f.want(f->aux_effect);
  if (effect && *effect != AuxEffect::kAdded) return "This class cannot add it in this version. " + off;
  const double* smoothing = f.want(f->label_smoothing);
  const bool* flag = f.want(f->aux_flag);
  std::string on;
  if (smoothing && *smoothing != 0.0) on += say::training(f, {{"label_smoothing_factor", "0"}}) + "\n";
  if (flag && !*flag) on += say::model_config(f, {{aux::flag_key(f), "true"}, {key, say::literal(coefficient)}}) + "\n";
  if (on.empty())
    on = "Use a trainer that adds it (TRL's DPO trainer does since 1.8.0):\n    pip install \"trl>=1.8.0\"\n";
  return on + off;
}

Outcome check(Facts& f) {
  if (auto none = aux::no_subject(f)) return Outcome::not_applicable(*none);
  const double* coefficient = f.require(f->aux_coefficient);
  if (coefficient && *coefficient <= 0) {
    return Outcome::not_applicable("the coefficient of the balance loss is " + say::number(*coefficient) +
                                   say::at(f->aux_coefficient.source()) + ": no balance loss is asked for");
  }
  if (aux::flag_is_dead(f)) return Outcome::not_applicable("BL005 reports that the flag has no effect in this class");
  const bool* added = f.require(f->aux_added);
  if (f.missing()) return f.cannot_tell();
  if (*added) return Outcome::pass("the balance loss is added with coefficient " + say::number(*coefficient));

  const Source& said = f->aux_coefficient.source();
  Finding finding;
  const bool chosen = say::chosen_for_training(f->aux_coefficient.origin(), said);
  finding.severity = chosen ? Severity::kError : Severity::kWarning;
  finding.message = aux::coefficient_key(f) + " is " + say::number(*coefficient) +
                    say::whence(f->aux_coefficient.origin(), said) +
                    ", but nothing adds the balance loss to the loss: " + cause(f) + ". The routers train without it.";
  finding.evidence = {say::evidence(f->aux_coefficient), say::evidence(f->aux_added), say::evidence(f->router_trains)};
  if (f.want(f->aux_flag)) finding.evidence.push_back(say::evidence(f->aux_flag));
  finding.remedy = remedy(f, *coefficient);
  finding.does_not_show =
      "That the load is uneven, or that adding the loss would help: fine-tuning has been reported to do "
      "slightly better with it (ST-MoE) and better without it (OLMoE).";
  finding.locations = {location_of(said)};
  if (f->aux_flag.known()) finding.locations.push_back(location_of(f->aux_flag.source()));
  finding.sources =
      say::sources({f->aux_added.source().cite, f->aux_effect.source().cite, "huggingface/transformers issue 44242",
                    "arXiv 2202.08906 Table 5", "arXiv 2409.02060"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_aux_loss_not_in_loss;
const Rule rule_aux_loss_not_in_loss = {
    .id = "BL001",
    .name = "aux-loss-not-in-loss",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "A balance loss is configured and nothing adds it to the loss.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
