// HE002: nearly all tokens go to the same few experts.
#include <algorithm>

#include "audit/rules/health/loads.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From the loads of a trace or of expert counts: the effective number of experts N = exp(entropy of the loads) of each layer, and
its evenness (N - k) / (E - k): 1 for even routing, 0 where every token takes the same k. Reported from 0.20 down; an error from
0.05 down in a trace of the recorder, which knows padding.

## Why it matters
A collapsed layer computes with k experts and carries E, and its other experts have no gradient. Released models are far from
it. Of the 39 published counts (OLMoE-1B-7B on six corpora, its SFT and DPO models, Mixtral-8x7B on five; three layers each;
arXiv 2409.02060) the least even is OLMoE on Wikipedia, layer 15: 0.42, N = 31.5 of 64. The same layer has 0.86 on C4, so text of one
kind halves evenness; the line of 0.20 lies another such step below the least even, 0.05 three. A real collapse has
nothing left: 0.003 and 0 in a tiny Mixtral whose balance loss had the wrong sign, from its fifth step on. In a published ablation
without balance loss one expert took 73.6 % of the choices after 500 steps (sumitdotml/moe-emergence).

MaxVio cannot tell them apart: OLMoE on arXiv, layer 0, has 6.81, and full collapse of 8 out of 64 has 7.

## How to fix
Go back to a checkpoint from before, and balance. A balance loss that is configured and yet does not act is BL001, BL005 or, in a
trace, TR003 (no gradient) and TR005 (never computed).

## Limits
Needs 100 choices an expert; chance then takes less than 0.5 % off N (half the variance of a load, 1 / 100 at most). Padding that is not
marked as such routes alike and looks like collapse: give a trace with a token mask. k unknown counts as 1. Text that repeats
one sequence collapses early layers of any model.
)md";

constexpr double kChoicesToJudge = 100, kFullCollapse = 0.05;

Outcome check(Facts& f) {
  Outcome otherwise;
  const TraceLoads* t = loads::table(f, &otherwise);
  if (!t) return otherwise;
  std::vector<std::size_t> collapsed, undecided;
  bool full = false;
  for (std::size_t i = 0; i < t->layer.size(); ++i) {
    if (t->experts[i] <= std::max<std::int64_t>(t->top_k[i], 1)) continue;  // every token takes every expert
    if (!t->can_judge[i]) undecided.push_back(i);
    else if (loads::collapsed(*t, i)) collapsed.push_back(i);
  }
  if (collapsed.empty() && !undecided.empty()) return loads::too_few(f, *t, undecided, kChoicesToJudge);
  if (collapsed.empty()) return Outcome::pass("no layer is near collapse");
  const std::size_t worst = *std::min_element(collapsed.begin(), collapsed.end(), [&](auto a, auto b) {
    return t->normalised_entropy[a] < t->normalised_entropy[b];
  });
  Finding finding;
  for (const std::size_t i : collapsed) {
    full = full || loads::evenness(*t, i) <= kFullCollapse;
    finding.evidence.push_back(loads::evidence(f, *t, i, "effective experts",
                                               loads::rounded(loads::effective_experts(*t, i)) + " of " + std::to_string(t->experts[i])));
  }
  const bool padding_known = f->trace_format.value() == "moe-audit-trace";
  finding.severity = full && padding_known ? Severity::kError : Severity::kWarning;
  finding.message = "Routing has collapsed in " + loads::layers_of(*t, collapsed) + ": the loads of layer " + std::to_string(t->layer[worst]) + " are those of " +
                    loads::rounded(loads::effective_experts(*t, worst)) + " experts, of " + std::to_string(t->experts[worst]) +
                    (t->top_k[worst] > 0 ? " with k = " + std::to_string(t->top_k[worst]) : "") + "; " + std::to_string(t->idle[worst]) +
                    " got no token, the busiest " + loads::rounded(1 + t->max_violation[worst]) + " times its fair share.";
  finding.remedy = "See the loads:\n" + loads::show(f) + "Go back to a checkpoint from before, and balance. " +
                   say::model_config(f, {{"output_router_logits", "true"}, {"router_aux_loss_coef", "0.01"}});
  finding.does_not_show = padding_known ? "Why, or since when: compare with a trace of the first steps."
                                        : "Whether padding, which this format does not mark, is what goes to the same experts.";
  finding.locations = {location_of(f->trace_loads.source())};
  finding.sources = {"arXiv 2409.02060 (published expert counts)", "arXiv 2101.03961 section 2.2"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_routing_collapsed;
const Rule rule_routing_collapsed = {
    .id = "HE002",
    .name = "routing-collapsed",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Nearly all tokens go to the same few experts of a layer.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
