// CK004: a router row is exactly zero, the same as another, or of a norm far from its layer's.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "audit/rules/checkpoint/experts.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every row of every router weight (one expert's vector), against the other rows of its layer.

| found | verdict |
|---|---|
| a row that is exactly zero, while others are not | error |
| all rows zero | warning |
| fewer than half of the rows equal to another, bit for bit, and no copy of the expert (CK002) behind it | error |
| at least half of the rows equal to another | note |
| norm at most 1/8 or at least 8 times the layer's median, and at least 6 robust deviations of the logarithm away | note |

## Why it matters
The score of an expert with a zero row is the same for every token: 0, or its bias. Gradients do not leave a row at
exactly zero, so it was filled with zeros: an expert that was added or padded, a tensor that a sharded save left
empty. Two equal rows give equal scores for every token: the pair always ties, and top-k takes both, or always the
lower index, whose twin then gets no tokens. With all rows zero every token ties between all experts. At least half of
the rows equal is how virtual groups begin (arXiv 2410.07524 repeats the router's rows for every shard).

## How to fix
Take the router from a checkpoint in which the row is not degenerate, or draw it anew with the layer's deviation and
train.

## Limits
The norm threshold is for accidents, not for style. A row of d random numbers has a relative deviation of 1/sqrt(2 d),
9 % at d = 64. Of simulated healthy layers whose norms spread log-normally (fixtures/make/outlier_rates.py): at a
spread of a factor 1.35 none of 10^6 fires; at 1.65, 0.015 % of those with 8 rows, 0.005 % with 64, none with 256.
Rows with NaN are CK001's. What the row does to routing needs tokens, which are not here.
)md";

constexpr double kFactor = 8.0;
constexpr double kDeviations = 6.0;
constexpr std::size_t kRowsToCompare = 4;  // a median of fewer says nothing
constexpr std::size_t kLayers = 4;         // so many layers get a finding each; more share one

/// The rows of one router weight.
struct Router {
  int layer;
  std::string tensor, file;
  std::vector<std::size_t> rows;  // of RouterRows
};

std::vector<Router> routers_of(const RouterRows& rows) {
  std::map<std::string, std::size_t> at;
  std::vector<Router> routers;
  for (std::size_t i = 0; i < rows.tensor.size(); ++i) {
    const auto [found, is_new] = at.emplace(rows.tensor[i], routers.size());
    if (is_new) routers.push_back({rows.layer[i], rows.tensor[i], rows.file[i], {}});
    routers[found->second].rows.push_back(i);
  }
  return routers;
}

/// One router with experts whose rows share a fault.
struct Fault {
  const Router* router;
  std::vector<int> experts;
  std::string detail;
};

bool is_zero(const RouterRows& rows, std::size_t i) {
  return rows.elements[i] > 0 && rows.zeros[i] == rows.elements[i];
}

std::string numbers(const std::vector<int>& experts) {
  return (experts.size() == 1 ? "expert " : "experts ") +
         to_text(std::vector<std::int64_t>(experts.begin(), experts.end()));
}

Finding common(Severity severity, const std::vector<Fault>& faults, const std::string& what) {
  Finding finding;
  finding.severity = severity;
  for (const Fault& fault : faults) {
    if (finding.locations.size() >= 8) break;
    const Location where{fault.router->file, 0, "", fault.router->tensor};
    finding.locations.push_back(where);
    finding.evidence.push_back(
        {what, numbers(fault.experts) + (fault.detail.empty() ? "" : ", " + fault.detail), where});
  }
  finding.does_not_show = "Whether the row was set on purpose, to switch an expert off or to start it.";
  finding.sources = {
      "huggingface/transformers src/transformers/models/mixtral/modeling_mixtral.py (MixtralTopKRouter)"};
  return finding;
}

std::string more(const std::vector<Fault>& faults) {
  if (faults.size() == 1) return {};
  std::vector<std::int64_t> layers;
  for (const Fault& fault : faults) layers.push_back(fault.router->layer);
  return " The like in " + say::count(static_cast<std::int64_t>(faults.size())) + " routers: layers " +
         to_text(layers) + ".";
}

std::string from_before(const std::vector<Fault>& faults) {
  const std::string& file = faults.front().router->file;
  return "Take the router from a checkpoint in which it is sound:\n    hf download MODEL " +
         file.substr(file.rfind('/') + 1) +
         " --force-download\nor draw the rows anew and train the router:\n"
         "    torch.nn.init.normal_(gate.weight[EXPERT], std=gate.weight.std().item())";
}

Finding zero_rows(const std::vector<Fault>& faults) {
  const Fault& first = faults.front();
  Finding finding = common(Severity::kError, faults, "zero row");
  finding.message = "The router row of " + numbers(first.experts) + " in layer " + std::to_string(first.router->layer) +
                    " is exactly zero: the score is the same for every token." + more(faults);
  finding.remedy = from_before(faults);
  return finding;
}

Finding zero_routers(const std::vector<Fault>& faults) {
  Finding finding = common(Severity::kWarning, faults, "zero router");
  finding.message = "All " + std::to_string(faults.front().experts.size()) + " router rows of layer " +
                    std::to_string(faults.front().router->layer) +
                    " are exactly zero: every token ties between all experts, and top-k takes the first ones." +
                    more(faults);
  finding.remedy =
      "If the router was to start at zero, it needs noise to break the ties (arXiv 1701.06538); else draw it:\n"
      "    torch.nn.init.normal_(gate.weight, std=config.initializer_range)";
  finding.sources.push_back("arXiv 1701.06538, appendix A (zero start with noise)");
  return finding;
}

Finding equal_rows(const std::vector<Fault>& faults) {
  const Fault& first = faults.front();
  Finding finding = common(Severity::kError, faults, "equal rows");
  finding.message = "The router rows of experts " + first.detail + " in layer " + std::to_string(first.router->layer) +
                    " are the same, bit for bit: they tie for every token." + more(faults);
  finding.remedy = from_before(faults);
  return finding;
}

Finding repeated_rows(const std::vector<Fault>& faults) {
  const Fault& first = faults.front();
  Finding finding = common(Severity::kNote, faults, "equal rows");
  finding.message = std::to_string(first.experts.size()) + " router rows of layer " +
                    std::to_string(first.router->layer) + " have an exact copy in their layer (" + first.detail +
                    "), as an upcycled model with virtual groups begins." + more(faults);
  finding.remedy = "If this is such a start, accept it; else draw the router anew:\n    moe-audit check --ignore CK004";
  finding.sources.push_back("arXiv 2410.07524 (virtual group initialisation)");
  return finding;
}

Finding odd_norms(const std::vector<Fault>& faults) {
  const Fault& first = faults.front();
  Finding finding = common(Severity::kNote, faults, "norm against the layer's median");
  finding.message = "The router row of " + numbers(first.experts) + " in layer " + std::to_string(first.router->layer) +
                    " has a norm far from its layer's: " + first.detail + " times the median." + more(faults);
  finding.remedy =
      "See how many tokens these experts get (a small row scores near 0 for every token, a large one is always first "
      "or last); if that is as it should be, accept it:\n    moe-audit check --ignore CK004";
  return finding;
}

/// Experts that are zero themselves, or copies of each other, in this layer: CK005's and CK002's.
struct Explained {
  std::set<int> zero;
  std::vector<std::vector<int>> copies;
};

Explained explained(const WeightScan* scan, const std::vector<experts::Layer>& layers, const Router& router) {
  Explained out;
  for (const experts::Layer& layer : layers) {
    if (layer.layer != router.layer || router.tensor.rfind(layer.stack, 0) != 0) continue;
    out.copies = experts::identical(*scan, layer);
    for (const auto& [expert, units] : layer.units) {
      if (std::all_of(units.begin(), units.end(), [&](std::size_t i) { return scan->zeros[i] == scan->elements[i]; })) {
        out.zero.insert(expert);
      }
    }
  }
  return out;
}

struct Faults {
  std::vector<Fault> zero, all_zero, equal, repeated, norms;
};

void judge(const RouterRows& rows, const Router& router, const Explained& known, Faults* out) {
  std::vector<int> zero;
  std::map<std::string, std::vector<int>> same;
  std::vector<std::size_t> sound;
  std::vector<double> logs;
  for (std::size_t i : router.rows) {
    if (rows.non_finite[i] > 0 || rows.elements[i] == 0) continue;
    if (is_zero(rows, i)) {
      zero.push_back(rows.expert[i]);
      continue;
    }
    same[rows.hash[i]].push_back(rows.expert[i]);
    sound.push_back(i);
    logs.push_back(0.5 * std::log(rows.sum_of_squares[i]));
  }
  if (!zero.empty() && zero.size() == router.rows.size()) {
    out->all_zero.push_back({&router, zero, {}});
    return;
  }
  std::erase_if(zero, [&](int expert) { return known.zero.count(expert) > 0; });
  if (!zero.empty()) out->zero.push_back({&router, zero, {}});

  std::vector<int> twins;
  std::vector<std::vector<int>> groups;
  for (const auto& [hash, group] : same) {
    const bool one_expert = std::any_of(known.copies.begin(), known.copies.end(), [&](const std::vector<int>& copies) {
      return std::includes(copies.begin(), copies.end(), group.begin(), group.end());
    });
    if (group.size() < 2 || one_expert) continue;
    twins.insert(twins.end(), group.begin(), group.end());
    groups.push_back(group);
  }
  if (!twins.empty()) {
    std::sort(twins.begin(), twins.end());
    std::sort(groups.begin(), groups.end());
    const bool few = twins.size() * 2 < router.rows.size() || (twins.size() == 2 && router.rows.size() > 2);
    (few ? out->equal : out->repeated).push_back({&router, twins, experts::list(groups)});
  }

  if (sound.size() < kRowsToCompare) return;
  const experts::Centre centre = experts::centre(logs);
  std::vector<int> odd;
  std::vector<std::string> ratios;
  for (std::size_t n = 0; n < sound.size(); ++n) {
    const double off = logs[n] - centre.median;
    if (std::fabs(off) < std::log(kFactor) || std::fabs(off) < kDeviations * centre.deviation) continue;
    odd.push_back(rows.expert[sound[n]]);
    ratios.push_back(experts::rounded(std::exp(off)));
  }
  if (!odd.empty()) out->norms.push_back({&router, odd, say::some(ratios, 4)});
}

template <class Describe>
void report(const std::vector<Fault>& faults, std::vector<Finding>* findings, Describe describe) {
  if (faults.size() > kLayers) return findings->push_back(describe(faults));
  for (const Fault& one : faults) findings->push_back(describe({one}));
}

Outcome check(Facts& f) {
  const RouterRows* rows = f.require(f->router_rows);
  if (f.missing()) return f.cannot_tell();
  if (rows->layer.empty()) return Outcome::not_applicable("the weight files hold no router");
  const WeightScan* scan = f.want(f->weight_scan);
  std::vector<experts::Layer> layers;
  if (scan) layers = experts::layers(*scan);

  const std::vector<Router> routers = routers_of(*rows);
  Faults faults;
  for (const Router& router : routers) judge(*rows, router, explained(scan, layers, router), &faults);
  std::vector<Finding> findings;
  report(faults.zero, &findings, zero_rows);
  report(faults.equal, &findings, equal_rows);
  report(faults.all_zero, &findings, zero_routers);
  report(faults.repeated, &findings, repeated_rows);
  report(faults.norms, &findings, odd_norms);
  return Outcome::findings_or_pass(
      std::move(findings), "no row of " + say::plural(static_cast<std::int64_t>(routers.size()), "router", "routers") +
                               " is zero, repeated or far from the norm of its layer");
}

}  // namespace

extern const Rule rule_degenerate_router_row;
const Rule rule_degenerate_router_row = {
    .id = "CK004",
    .name = "degenerate-router-row",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "A router row is exactly zero, the same as another, or of a norm far from its layer's.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
