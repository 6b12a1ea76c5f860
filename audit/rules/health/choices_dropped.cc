// HE004: choices were dropped for capacity.
#include <algorithm>
#include <cmath>

#include "audit/rules/health/loads.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
A trace that records drops: the share of a layer's choices that its experts' capacity dropped. A note from 1 % on, a warning above
15 %.

## Why it matters
A dropped choice contributes nothing to its token and carries no gradient. Up to 15 % costs little that could be measured: with
10.6 % dropped (capacity factor 0.75) the fine-tuned model of arXiv 2202.08906 scores 86.5 on SuperGLUE, with 0.3 % dropped 86.7; without
a balance loss 85.7 at 15.6 % and 85.8 at 2.9 % (Table 5). Beyond that nothing was measured; Switch Transformers typically dropped less than 1 % (arXiv 2101.03961
section 2.2).

## How to fix
Raise the capacity factor, or balance the loads; dropless kernels (MegaBlocks, grouped GEMM) have no capacity.

## Limits
Needs 100 choices an expert. It is the recorded steps' share; drops are more frequent at the start of training and in small
micro-batches.
)md";

constexpr double kNote = 0.01, kMeasuredHarmless = 0.15, kChoicesToJudge = 100;

Outcome check(Facts& f) {
  Outcome otherwise;
  const TraceLoads* t = loads::table(f, &otherwise);
  if (!t) return otherwise;
  std::vector<std::size_t> dropping, undecided;
  bool recorded = false;
  for (std::size_t i = 0; i < t->layer.size(); ++i) {
    if (std::isnan(t->dropped[i])) continue;
    recorded = true;
    if (t->dropped[i] >= kNote) (t->can_judge[i] ? dropping : undecided).push_back(i);
  }
  if (!recorded) return Outcome::not_applicable("the trace records no drops");
  if (dropping.empty() && !undecided.empty()) return loads::too_few(f, *t, undecided, kChoicesToJudge);
  if (dropping.empty()) return Outcome::pass("under 1 % of the choices are dropped");
  const std::size_t worst = *std::max_element(dropping.begin(), dropping.end(), [&](auto a, auto b) { return t->dropped[a] < t->dropped[b]; });
  Finding finding;
  finding.severity = t->dropped[worst] > kMeasuredHarmless ? Severity::kWarning : Severity::kNote;
  finding.message = say::percent(t->dropped[worst]) + " of the choices of layer " + std::to_string(t->layer[worst]) +
                    " are dropped for capacity (1 % or more in " + loads::layers_of(*t, dropping) + "); up to 15 % has cost nothing measurable.";
  for (const std::size_t i : dropping) finding.evidence.push_back(loads::evidence(f, *t, i, "dropped choices", say::percent(t->dropped[i])));
  finding.remedy = "Megatron-LM: raise the capacity, or leave it out to drop nothing:\n    --moe-expert-capacity-factor 1.5\n"
                   "See which experts overflow:\n" + loads::show(f);
  finding.does_not_show = "That the model is worse for it.";
  finding.locations = {location_of(f->trace_loads.source())};
  finding.sources = {"arXiv 2202.08906 Table 5", "arXiv 2101.03961 section 2.2"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_choices_dropped;
const Rule rule_choices_dropped = {
    .id = "HE004",
    .name = "choices-dropped",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "Choices are dropped because experts are full.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
