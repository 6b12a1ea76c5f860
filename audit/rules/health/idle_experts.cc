// HE001: experts that got no token, in a sample that would have shown them.
#include <algorithm>

#include "audit/rules/health/loads.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From the loads of a trace or of expert counts: experts that no token chose, where an expert with a tenth of the fair share n
would be idle less often than once in a thousand samples (0.1 n > 6.9; n = tokens x k / E).

## Why it matters
An expert without tokens has no gradient: its weights are memory that learns nothing, and without a balancing term nothing brings
it back. It is a note up to n = 9,900 and a warning from there, where even 0.0007 of the fair share would have shown. The
reason for the two tiers: on text of one kind healthy experts are nearly idle. OLMoE-1B-7B, 209,000 tokens a corpus, k/E = 8/64:
on C4 the least used expert has 0.19 to 0.30 of its share, on GitHub 0.007, on arXiv 0.0007, the least of the 39 published counts, and
9 to 12 of 64 experts lie under a tenth of it there (arXiv 2409.02060); none is idle.

## How to fix
Count again on text of several kinds. Experts that stay idle: balance (a loss, or a correction bias that training moves), or start
again from a checkpoint that has them. In a fine-tune on narrow data leave them and freeze the router.

## Limits
Idle in this text is not dead in all. Layers with collapsed routing are HE002's. Tokens of one document are alike, so the chance
named above is that of independent tokens.
)md";

constexpr double kChancesOfOneInAThousand = 6.9;  // ln 1000: a Poisson count of that mean is 0 less often
constexpr double kTenth = 0.1, kLeastOfHealthy = 0.0007;

Outcome check(Facts& f) {
  Outcome otherwise;
  const TraceLoads* t = loads::table(f, &otherwise);
  if (!t) return otherwise;
  std::vector<std::size_t> idle, undecided, collapsed;
  for (std::size_t i = 0; i < t->layer.size(); ++i) {
    if (t->idle[i] == 0) continue;
    if (loads::collapsed(*t, i)) collapsed.push_back(i);
    else (t->idle_is_dead[i] ? idle : undecided).push_back(i);
  }
  if (idle.empty() && !undecided.empty()) return loads::too_few(f, *t, undecided, kChancesOfOneInAThousand / kTenth);
  if (idle.empty() && !collapsed.empty()) return Outcome::not_applicable("HE002 reports the collapsed routing that leaves experts idle");
  if (idle.empty()) return Outcome::pass("every expert got tokens");
  std::int64_t experts = 0, all = 0;
  bool certain = false;
  const std::size_t worst = *std::max_element(idle.begin(), idle.end(), [&](auto a, auto b) { return t->idle[a] < t->idle[b]; });
  Finding finding;
  for (const std::size_t i : idle) {
    experts += t->idle[i], all += t->experts[i];
    certain = certain || kLeastOfHealthy * t->fair_share[i] > kChancesOfOneInAThousand;
    finding.evidence.push_back(loads::evidence(f, *t, i, "idle experts", t->idle_experts[i] + " of " + std::to_string(t->experts[i])));
  }
  finding.severity = certain ? Severity::kWarning : Severity::kNote;
  finding.message = say::count(experts) + " of " + say::count(all) + " experts in " + loads::layers_of(*t, idle) + " got no token; most in layer " +
                    std::to_string(t->layer[worst]) + ": " + t->idle_experts[worst] + ", at a fair share of " + say::number(t->fair_share[worst]) + " choices.";
  finding.remedy = "See the loads, and count on text of several kinds:\n" + loads::show(f) +
                   "Experts that stay idle get no gradient. Balance them. " + say::model_config(f, {{"output_router_logits", "true"}, {"router_aux_loss_coef", "0.01"}});
  finding.does_not_show = "That they are idle on other text: a healthy model has nearly idle experts on text of one kind.";
  finding.locations = {location_of(f->trace_loads.source())};
  finding.sources = {"arXiv 2409.02060 (published expert counts)", "docs/health.md dead_experts"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_idle_experts;
const Rule rule_idle_experts = {
    .id = "HE001",
    .name = "idle-experts",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "Experts got no token in a sample that would have shown them.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
