// CK006: a matrix of an expert is close to rank 1 while its siblings are not.
#include <algorithm>
#include <cmath>
#include <map>

#include "audit/rules/checkpoint/experts.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The stable rank ||W||_F^2 / ||W||_2^2 of every matrix of every routed expert, against the median over the experts of
its layer: a note if it is at most 1/8 of the median, 6 robust deviations of the logarithm (1.4826 x median distance
from the median) away, and at least 4 experts are there to compare. Measured on the same block of every matrix: at
most 256 evenly spaced rows and 256 columns.

## Why it matters
The stable rank counts the directions that carry the matrix: 1 for an outer product, about m n / (sqrt(m) + sqrt(n))^2
for random numbers, 64 in a block of 256 x 256. An expert that falls to a few directions answers every token alike. It
is what a broken low-rank decomposition leaves, an expert merged with a delta of the wrong scale (the delta has the
adapter's rank), or a training that blew up in one direction. A norm does not show it.

## How to fix
Compare with the base model, or with the checkpoint before. If the base has it too it is a trait of the model; if only
the merged or tuned one has, look at the scale of the merge and at the loss around that step.

## Limits
Only the drop against siblings means anything: the absolute value depends on shape, initialisation and training.
Released checkpoints were not measured, and trained experts may hold a few very large weights, so this is advice. Of
simulated healthy layers whose stable ranks spread log-normally (fixtures/make/outlier_rates.py, factor 8) by a factor
of 1.35 none of 10^6 fires; by 1.65, 0.015 % of 8 experts, 0.005 % of 64, none of 256. The block can miss what lies
outside of it, never the collapse of a whole matrix: no block has a higher rank than its matrix. Power iteration in
float64, at most 24 steps: the stable rank is never too small and, at random matrices, at most 15 % too large. Of more
than 20,000 matrices (500 without `--full`) evenly spaced layers are measured; quantised experts are not. Needs
`--full` if the files hold more than 2 GB.
)md";

constexpr double kDrop = 8.0;
constexpr double kDeviations = 6.0;
constexpr std::size_t kExpertsToCompare = 4;
constexpr std::size_t kSingle = 4;  // so many matrices get a finding each; more share one

struct Collapsed {
  std::size_t row;  // of StableRanks
  double median;    // of its layer and projection
};

std::string describe(const StableRanks& ranks, const Collapsed& c) {
  return experts::short_name(ranks.projection[c.row]) + " of expert " + std::to_string(ranks.expert[c.row]) +
         " in layer " + std::to_string(ranks.layer[c.row]) + " has a stable rank of " +
         experts::rounded(ranks.stable_rank[c.row]) + " (layer's median " + experts::rounded(c.median) + ")";
}

Finding collapsed(const StableRanks& ranks, const std::vector<Collapsed>& all) {
  Finding finding;
  finding.severity = Severity::kNote;
  std::vector<std::string> texts;
  for (const Collapsed& c : all) {
    texts.push_back(describe(ranks, c));
    if (finding.locations.size() >= 8) continue;
    const Location where{ranks.file[c.row], 0, "", ranks.tensor[c.row]};
    finding.locations.push_back(where);
    finding.evidence.push_back({"stable rank", experts::rounded(ranks.stable_rank[c.row]), where});
    finding.evidence.push_back({"median of the layer", experts::rounded(c.median), where});
    finding.evidence.push_back(
        {"block", std::to_string(ranks.rows[c.row]) + " x " + std::to_string(ranks.columns[c.row]), where});
  }
  finding.message = (all.size() > 1 ? say::count(static_cast<std::int64_t>(all.size())) + " matrices: " : "") +
                    say::some(texts) + ": few directions carry what the siblings spread over many.";
  finding.remedy =
      "Measure the same tensor in the base model or an earlier checkpoint; if it is a trait of the model, accept it:\n"
      "    moe-audit check --ignore CK006";
  finding.does_not_show = "That the expert is of no use, or what made it so.";
  finding.sources = {"Rudelson, Vershynin 2007, J. ACM 54(4) 21 (stable rank)"};
  return finding;
}

Outcome check(Facts& f) {
  if (const bool* moe = f.want(f->has_moe); moe && !*moe)
    return Outcome::not_applicable("the model has no routed experts");
  const StableRanks* ranks = f.require(f->stable_ranks);
  if (f.missing()) return f.cannot_tell();
  std::map<std::pair<std::string, int>, std::vector<std::size_t>> siblings;
  for (std::size_t i = 0; i < ranks->layer.size(); ++i) siblings[{ranks->projection[i], ranks->layer[i]}].push_back(i);

  std::vector<Collapsed> found;
  std::size_t compared = 0;
  for (const auto& [key, rows] : siblings) {
    if (rows.size() < kExpertsToCompare) continue;
    compared += rows.size();
    std::vector<double> logs;
    for (std::size_t i : rows) logs.push_back(std::log(ranks->stable_rank[i]));
    const experts::Centre centre = experts::centre(logs);
    for (std::size_t n = 0; n < rows.size(); ++n) {
      const double drop = centre.median - logs[n];
      if (drop >= std::log(kDrop) && drop >= kDeviations * centre.deviation)
        found.push_back({rows[n], std::exp(centre.median)});
    }
  }
  if (compared == 0) return Outcome::not_applicable("no layer has four experts whose matrices are stored as values");
  std::vector<Finding> findings;
  if (found.size() > kSingle) {
    findings.push_back(collapsed(*ranks, found));
  } else {
    for (const Collapsed& c : found) findings.push_back(collapsed(*ranks, {c}));
  }
  return Outcome::findings_or_pass(std::move(findings),
                                   "none of " + say::plural(static_cast<std::int64_t>(compared), "matrix", "matrices") +
                                       " of experts is of a stable rank far below its layer's");
}

}  // namespace

extern const Rule rule_collapsed_expert;
const Rule rule_collapsed_expert = {
    .id = "CK006",
    .name = "collapsed-expert",
    .since = "0.2.0",
    .severity = Severity::kNote,
    .summary = "A matrix of an expert is close to rank 1 while its siblings are not.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
