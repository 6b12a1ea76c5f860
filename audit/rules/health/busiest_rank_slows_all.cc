// HE003: the busiest expert-parallel rank makes the others wait.
#include <algorithm>
#include <cmath>

#include "audit/rules/health/loads.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
A trace of a run with expert parallelism: load of the busiest rank over the mean of the ranks, experts in contiguous runs, summed
over the layers (the straggler factor). A note from 1.25 on, a warning from 2.

## Why it matters
Ranks wait for each other in every layer: a factor of 2 means that expert work takes twice as long as with even loads, and the
buffers of the busiest rank hold twice the tokens. OLMoE-1B-7B on 8 ranks: 1.16 on C4, 1.41 on Tulu, 1.57 on GitHub code
(`moe-audit health --expert-parallel 8` of the published counts).

## How to fix
Spread the busy experts over the ranks, duplicate them, or use fewer ranks: `moe-audit health --expert-parallel N` forecasts other
numbers of ranks, with `--expert-map FILE` another placement.

## Limits
Loads of all recorded tokens together: a single micro-batch is less even, so the factor is a lower bound. A framework that places or
duplicates experts by load is not seen. Time of communication and of dense parts is not in it.
)md";

constexpr double kNote = 1.25, kWarning = 2.0, kChoicesToJudge = 100;

Outcome check(Facts& f) {
  Outcome otherwise;
  const TraceLoads* t = loads::table(f, &otherwise);
  if (!t) return otherwise;
  const std::int64_t* ranks = f.require(f->expert_parallel);
  if (f.missing()) return f.cannot_tell();
  if (*ranks <= 1) return Outcome::not_applicable("no expert parallelism" + say::at(f->expert_parallel.source()));
  std::vector<std::size_t> undecided;
  for (std::size_t i = 0; i < t->layer.size(); ++i) {
    if (!t->can_judge[i]) undecided.push_back(i);
  }
  if (!undecided.empty()) return loads::too_few(f, *t, undecided, kChoicesToJudge);
  if (!std::isfinite(t->straggler_factor)) {
    return Outcome::not_applicable("the experts of a layer do not divide into " + std::to_string(*ranks) + " contiguous runs of one size");
  }
  if (t->straggler_factor < kNote) return Outcome::pass("straggler factor " + loads::rounded(t->straggler_factor));
  const auto worst = static_cast<std::size_t>(std::max_element(t->busiest_rank.begin(), t->busiest_rank.end()) - t->busiest_rank.begin());
  Finding finding;
  finding.severity = t->straggler_factor >= kWarning ? Severity::kWarning : Severity::kNote;
  finding.message = "On " + std::to_string(*ranks) + " expert-parallel ranks" + say::at(f->expert_parallel.source()) + " expert work takes " +
                    loads::rounded(t->straggler_factor) + " times as long as with even loads; in layer " + std::to_string(t->layer[worst]) +
                    " the busiest rank gets " + loads::rounded(t->busiest_rank[worst]) + " times the mean.";
  finding.evidence = {{"trace.loads straggler_factor", loads::rounded(t->straggler_factor), location_of(f->trace_loads.source())},
                      loads::evidence(f, *t, worst, "busiest rank / mean", loads::rounded(t->busiest_rank[worst])),
                      say::evidence(f->expert_parallel)};
  finding.remedy = "Spread the busy experts over the ranks, or use fewer:\n    moe-audit health " + f->trace_loads.source().file + " --expert-parallel " +
                   std::to_string(std::max<std::int64_t>(*ranks / 2, 2));
  finding.does_not_show = "The time of a step: communication and dense layers are not in it.";
  finding.locations = {location_of(f->expert_parallel.source())};
  finding.sources = {"arXiv 2006.16668 section 2.2", "docs/health.md forecast"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_busiest_rank_slows_all;
const Rule rule_busiest_rank_slows_all = {
    .id = "HE003",
    .name = "busiest-rank-slows-all",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "The busiest expert-parallel rank has far more than the mean load.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
