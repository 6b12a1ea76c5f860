// BL004: accumulation and world size multiply a coefficient that nobody chose with them in mind.
#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The balance loss counts more often than the cross-entropy, so its effective coefficient is a multiple of the
configured one, and the configured one is a default: of the class, of the trainer, or of the base model.

## Why it matters
Since transformers 4.46 the cross-entropy is divided by the tokens of the whole accumulated batch, while each
micro-batch adds its balance loss undivided: gradient_accumulation_steps GA makes it GA times as strong. With
average_tokens_across_devices (default since 4.54) Trainer multiplies the whole loss by the number of processes,
which the cross-entropy takes back and the balance loss does not (huggingface/transformers issue 48690). Both were
measured, one Trainer step per version, from the gradient of the gate: 8 times at GA 8 from 4.46.0 to 5.23.0, except
4.47.0 and 4.48.0, where the cross-entropy is mis-scaled too (GA001). 0.001 at GA 8 on 8 GPUs trains as 0.064.

## How to fix
Divide: coefficient = wanted / (GA x world size). A coefficient that your training config states is taken as chosen
for it.

## Limits
Measured rows only (fixtures/oracle/accumulation.json); other stacks get cannot_tell. More is not always worse:
OLMoE pretrains with 0.01 in this form. BL006 says when the product leaves every published range.
)md";

std::string worked_out(Facts& f, double coefficient, double multiple) {
  const std::int64_t* ga = f.want(f->accumulation);
  const std::int64_t* world = f.want(f->world_size);
  const double g = ga ? static_cast<double>(*ga) : 1.0;
  const double w = world ? static_cast<double>(*world) : 1.0;
  std::string factors;
  if (multiple == g * w && g > 1 && w > 1)
    factors = "GA " + say::number(g) + " x world " + say::number(w);
  else if (multiple == g)
    factors = "GA " + say::number(g);
  else if (multiple == w)
    factors = "world " + say::number(w);
  else
    factors = say::number(multiple);
  return say::number(coefficient) + " x " + factors + " = " + say::number(coefficient * multiple);
}

Outcome check(Facts& f) {
  if (auto none = aux::no_subject(f)) return Outcome::not_applicable(*none);
  const double* coefficient = f.require(f->aux_coefficient);
  const bool* added = f.require(f->aux_added);
  if (coefficient && *coefficient <= 0) return Outcome::not_applicable("no balance loss is asked for");
  if (added && !*added) return Outcome::not_applicable("nothing adds the balance loss to the loss (BL001, BL005)");
  const std::optional<bool> is_default = aux::coefficient_is_default(f);
  if (is_default && !*is_default) {
    return Outcome::pass("the coefficient is stated" + say::at(f->aux_coefficient.source()) +
                         " and taken as chosen for this run");
  }
  if (coefficient && !is_default) f.require(f->aux_coefficient_default);
  const double* multiplier = f.require(f->aux_multiplier);
  const double* at_least = f.want(f->aux_multiplier_at_least);
  const bool bound = !multiplier && at_least && *at_least > 1;
  if (!coefficient || !added || !is_default || (!multiplier && !bound)) return f.cannot_tell();
  const double multiple = multiplier ? *multiplier : *at_least;
  if (multiple <= 1) return Outcome::pass("the coefficient counts once");

  const std::string key = aux::coefficient_key(f);
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "The balance loss counts " + std::string(bound ? "at least " : "") + say::number(multiple) +
                    " times: " + (bound ? "at least " : "") + worked_out(f, *coefficient, multiple) + ", and " + key +
                    " = " + say::number(*coefficient) + " is a default" + say::at(f->aux_coefficient.source()) + ".";
  if (bound) finding.message += " The number of processes, unknown here, multiplies it again.";
  finding.evidence = {say::evidence(f->aux_coefficient), say::evidence(f->accumulation)};
  finding.evidence.push_back(bound ? say::evidence(f->aux_multiplier_at_least) : say::evidence(f->aux_multiplier));
  if (f.want(f->world_size)) finding.evidence.push_back(say::evidence(f->world_size));
  if (f.want(f->average_tokens)) finding.evidence.push_back(say::evidence(f->average_tokens));
  finding.remedy = "To train with an effective " + say::number(*coefficient) +
                   (bound ? ", divided by the world size too:\n" : ":\n") +
                   say::model_config(f, {{aux::flag_key(f), "true"}, {key, say::literal(*coefficient / multiple)}});
  finding.does_not_show =
      "That the stronger loss does harm; it shows that its weight follows the batch layout, not the config.";
  finding.locations = {location_of(f->aux_coefficient.source()), location_of(f->accumulation.source())};
  finding.sources = say::sources({(bound ? f->aux_multiplier_at_least : f->aux_multiplier).source().cite,
                                  "fixtures/oracle/accumulation.json", "huggingface/transformers issue 48690"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_aux_coefficient_multiplied;
const Rule rule_aux_coefficient_multiplied = {
    .id = "BL004",
    .name = "aux-coefficient-multiplied",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "Accumulation or world size multiply a balance coefficient that is only a default.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
