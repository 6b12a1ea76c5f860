// RT004: jitter that was meant for the router reaches the experts.
#include <cmath>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
`router_jitter_noise` (PhiMoE: `input_jitter_noise`) is above 0 in a family whose MoE block multiplies its input in place,
so that the experts compute on the noisy input too.

## Why it matters
Switch Transformers multiplies the input *of the router* by noise from 1 - j to 1 + j, to explore (arXiv 2101.03961
section 2.2). transformers writes `hidden_states *= noise` and hands the same tensor to the experts
(models/mixtral/modeling_mixtral.py; reported for Switch in huggingface/transformers issue 33969, open). With j = 0.01 the
experts train on inputs with a relative error of j / sqrt(3) = 0.6 % in every component. ST-MoE found input jitter to
stabilise training at a cost: quality -1.777 against -1.755 without (arXiv 2202.08906 Table 4).

## How to fix
Leave it at 0 in fine-tuning.

## Limits
A note: it is how every user of these classes trains, and nobody has measured the harm at 0.01.
)md";

Outcome check(Facts& f) {
  const double* jitter = f.want(f->jitter);
  if (!jitter) {
    const std::string* family = f.require(f->family);
    if (!family) return f.cannot_tell();
    if (*family != "unknown") return Outcome::not_applicable("this family has no jitter on the input of its MoE block");
    f.require(f->jitter);
    return f.cannot_tell();
  }
  const std::string& where = f->jitter.source().key;
  const std::string key = where.empty() ? "router_jitter_noise" : where.substr(where.rfind('.') + 1);
  if (!(*jitter > 0)) return Outcome::pass(key + " is 0");
  Finding finding;
  finding.severity = Severity::kNote;
  finding.message = key + " is " + say::number(*jitter) + say::at(f->jitter.source()) +
                    ": in training the experts, not only the router, get their input multiplied by noise from " +
                    say::number(1 - *jitter) + " to " + say::number(1 + *jitter) + ", a relative error of " +
                    say::percent(*jitter / std::sqrt(3.0)) + ".";
  finding.evidence = {say::evidence(f->jitter)};
  finding.remedy = say::model_config(f, {{key, "0.0"}});
  finding.does_not_show = "That the noise hurts this run.";
  finding.locations = {location_of(f->jitter.source())};
  finding.sources = say::sources({"huggingface/transformers issue 33969", "arXiv 2101.03961 section 2.2", "arXiv 2202.08906 Table 4"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_jitter_on_expert_inputs;
const Rule rule_jitter_on_expert_inputs = {
    .id = "RT004",
    .name = "jitter-on-expert-inputs",
    .since = "0.2.0",
    .severity = Severity::kNote,
    .summary = "The jitter of the router reaches the experts.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
