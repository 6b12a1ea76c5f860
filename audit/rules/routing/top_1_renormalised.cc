// RT002: with one expert a token, a renormalised weight is the constant 1.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The routers are trained, each token goes to one expert (k = 1), and the executed weight of the chosen expert is
divided by the sum of the chosen, or is a softmax over the chosen ones: in both cases over itself.

## Why it matters
The router learns from the task only through the weights that multiply the experts' outputs: dL/dp_i = <g, E_i(x)>.
With k = 1 and renormalisation the weight is p / p = 1 whatever the logits are; the gradient of the task loss to the
router is exactly 0. It then moves by the balance loss alone, or not at all, while every metric of balance looks
perfect. Found in the wild: jingyaogong/minimind issue 858 (worse than the dense model, 5.45 against 5.25
perplexity) and NVIDIA/Megatron-LM issue 894 (softmax after top-k over one element, confirmed by a maintainer).
Switch multiplies by the softmax probability itself (arXiv 2101.03961).

## How to fix
Switch the renormalisation off for k = 1, or choose k = 2.

## Limits
Routed scaling does not change it: a constant stays one. An epsilon in the sum (1e-20) leaves no gradient that
counts.
)md";

Outcome check(Facts& f) {
  const std::int64_t* k = f.require(f->top_k);
  const bool* trains = f.require(f->router_trains);
  const bool* renormalised = f.require(f->renormalised);
  if (k && *k != 1) {
    return Outcome::not_applicable("k = " + std::to_string(*k) +
                                   ": renormalised weights of several experts depend on the logits");
  }
  if (trains && !*trains) return Outcome::not_applicable("no gradient updates the routers");
  if (f.missing()) return f.cannot_tell();
  const Routing* routing = f.want(f->routing);
  const bool over_chosen = routing && routing->softmax_over_chosen();
  if (!*renormalised && !over_chosen) return Outcome::pass("the weight of the chosen expert is its own score");

  const std::string& full = f->renormalised.source().key;
  const std::size_t dot = full.rfind('.');
  const std::string key = dot == std::string::npos ? full : full.substr(dot + 1);
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "k = 1" + say::at(f->top_k.source()) + " and the weight of the chosen expert is " +
                    (over_chosen ? "a softmax over itself" : "divided by itself") + say::at(f->renormalised.source()) +
                    ": it is always 1, and the task loss gives the router no gradient.";
  finding.evidence = {say::evidence(f->top_k), say::evidence(f->renormalised), say::evidence(f->router_trains)};
  finding.remedy = key.empty() || over_chosen ? say::model_config(f, {{"num_experts_per_tok", "2"}})
                                              : say::model_config(f, {{key, "false"}});
  finding.does_not_show = "That the router stands still: the balance loss, if there is one, still moves it.";
  finding.locations = {location_of(f->renormalised.source()), location_of(f->top_k.source())};
  finding.sources = say::sources({f->renormalised.source().cite, "arXiv 2101.03961", "jingyaogong/minimind issue 858",
                                  "NVIDIA/Megatron-LM issue 894"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_top_1_renormalised;
const Rule rule_top_1_renormalised = {
    .id = "RT002",
    .name = "top-1-renormalised",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "One expert a token and a renormalised weight: no gradient from the task.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
