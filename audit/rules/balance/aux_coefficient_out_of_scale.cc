// BL006: the weight that the balance loss really has lies outside everything published.
#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The effective coefficient of the balance loss, put on the one scale that papers share, lies outside [1e-5, 1e-1].
The scale is that of the Switch form N * sum f_i P_i: 1 under uniform routing, averaged over layers. transformers
counts each of the k choices, so its loss is k under uniform routing: coefficient c there is c x k on this scale. It
pools all layers into one mean, so the number of layers is no factor. Accumulation and world size are (see BL004).

## Why it matters
Switch swept 1e-1 to 1e-5 and settled on 1e-2 (arXiv 2101.03961); ST-MoE takes 1e-2, DeepSeekMoE 1e-2 and 1e-3,
DeepSeek-V3 1e-4 (arXiv 2202.08906, 2401.06066, 2412.19437); OLMoE's 0.01 with k = 8 is 0.08 (arXiv 2409.02060).
Above, the balance loss outweighs the task: at 0.64 a perfectly even router still adds 0.64 to the loss, and any
preference of a token for its expert is trained away. Below, it does nothing. The class default of gpt_oss was 0.9
in transformers 4.57, which is 3.6 with k = 4.

## How to fix
Divide what you want on the common scale by k and by the multiple: c = wanted / (k x GA x world size).

## Limits
A range of what has been published, not a law. Where the multiple is unknown, a configured value that is inside gets
cannot_tell. A negative coefficient rewards imbalance and is always reported.
)md";

constexpr double kLow = 1e-5, kHigh = 1e-1, kUsual = 1e-2;

Finding out_of_scale(Facts& f, double coefficient, double uniform, double multiple, bool exact) {
  const double strength = coefficient * uniform * multiple;
  const std::string key = aux::coefficient_key(f);
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = std::string("The balance loss weighs ") + (exact ? "" : "at least ") + say::number(strength) +
                    " (" + key + " " + say::number(coefficient) + say::at(f->aux_coefficient.source()) + " x " +
                    say::number(multiple) + " by accumulation and world size x " + say::number(uniform) +
                    " by the form of the loss); published values lie " + "between 1e-05 and 0.1.";
  finding.evidence = {say::evidence(f->aux_coefficient), say::evidence(f->aux_uniform_value)};
  if (f->aux_multiplier.known())
    finding.evidence.push_back(say::evidence(f->aux_multiplier));
  else if (f->aux_multiplier_at_least.known())
    finding.evidence.push_back(say::evidence(f->aux_multiplier_at_least));
  finding.remedy =
      "For 0.01 on the common scale, as Switch and ST-MoE" +
      std::string(exact ? ":\n" : " (and divided by what is unknown of the multiple):\n") +
      say::model_config(f, {{aux::flag_key(f), "true"}, {key, say::literal(kUsual / (uniform * multiple))}});
  finding.does_not_show = "That this run is worse for it: it shows a weight that nobody has reported to work.";
  finding.locations = {location_of(f->aux_coefficient.source())};
  finding.sources = say::sources(
      {"arXiv 2101.03961", "arXiv 2202.08906", f->aux_multiplier.source().cite, f->aux_uniform_value.source().cite});
  return finding;
}

Outcome check(Facts& f) {
  if (auto none = aux::no_subject(f)) return Outcome::not_applicable(*none);
  const double* coefficient = f.require(f->aux_coefficient);
  const bool* added = f.require(f->aux_added);
  if (coefficient && *coefficient == 0) return Outcome::not_applicable("the coefficient is 0 (BL002)");
  if (added && !*added) return Outcome::not_applicable("nothing adds the balance loss to the loss (BL001, BL005)");
  const double* uniform = f.require(f->aux_uniform_value);
  if (f.missing()) return f.cannot_tell();

  const double* multiplier = f.require(f->aux_multiplier);
  const double* at_least = f.want(f->aux_multiplier_at_least);
  const double multiple = multiplier ? *multiplier : at_least ? *at_least : 1.0;
  const double strength = *coefficient * *uniform * multiple;
  // An unknown multiple can only add: what is too large already is too large, what is too small may not be.
  const bool out = strength < 0 || strength > kHigh || (multiplier && strength < kLow);
  if (out) return Outcome::finding(out_of_scale(f, *coefficient, *uniform, multiple, multiplier != nullptr));
  if (!multiplier) return f.cannot_tell();
  return Outcome::pass("the balance loss weighs " + say::number(strength) + " on the scale of the Switch form");
}

}  // namespace

extern const Rule rule_aux_coefficient_out_of_scale;
const Rule rule_aux_coefficient_out_of_scale = {
    .id = "BL006",
    .name = "aux-coefficient-out-of-scale",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "The balance loss weighs more or less than anything published.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
