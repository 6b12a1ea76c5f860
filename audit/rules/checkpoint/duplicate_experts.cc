// CK002: experts of one layer are exact copies of each other.
#include <algorithm>
#include <map>
#include <set>

#include "audit/rules/checkpoint/experts.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Within a layer, no two routed experts hold the same bits in all their tensors (64-bit content hash and length of every
tensor, or of the expert's slice of a stack). Their router rows are compared, too.

| found | verdict |
|---|---|
| one pair, or fewer than half of the layer's experts, are copies | error |
| at least half of them (all: the layer was upcycled from a dense MLP) | warning, with what to check |
| equal in some tensors, different in others | warning |

## Why it matters
Training from random numbers cannot make two experts of some 10^7 values each agree in every bit: a pair comes from a
converter, a merge or a save that wrote one expert over another, and the overwritten expert is lost. One of
Mixtral-8x7B's 256 experts is 176 million parameters.

Upcycling makes them on purpose: Sparse Upcycling (arXiv 2212.05055) copies the dense MLP into every expert and draws
the router at random; NVIDIA's granular upcycling (2410.07524) copies shards of it; expert upcycling (2604.19835)
copies the experts of a smaller MoE. Copies separate only because the router sends them different tokens: with equal
router rows they get equal scores, and with frozen experts they stay copies. And the scale changes: with softmax
before top-k and no renormalisation, top-k of E nearly equal scores gives k/E of the dense MLP's output, which
2410.07524 corrects by a factor on the weights (1.5 % lower loss for 8 experts, top-1).

Equal in one projection only is what a converter leaves that repeats one expert's slice, or a training that froze a
projection of an upcycled model. Drop-Upcycling (2502.19261) re-draws part of the columns in all three matrices: no
tensor stays equal, and nothing is reported.

## How to fix
A pair: fetch or convert the checkpoint again, from the source in which the experts differ. An upcycled start: check
that router rows differ, and the output scale; train on.

## Limits
Equal bits only: a copy with one changed bit is not seen. All-zero and constant experts are CK005's. Methods that
merge experts (2310.01334) write copies on purpose: fewer than half of a layer's experts merged looks like a fault.
Needs `--full` if the files hold more than 2 GB.
)md";

using Groups = std::vector<std::vector<int>>;

struct Row {
  std::string tensor, hash;
};
using Rows = std::map<std::pair<int, int>, std::vector<Row>>;  // (layer, expert)

enum class Routers { kUnknown, kEqual, kDiffer };

/// Are the router rows of these experts equal?
Routers compare_rows(const Rows& rows, const experts::Layer& layer, const std::vector<int>& group) {
  std::set<std::string> seen;
  for (int expert : group) {
    const auto found = rows.find({layer.layer, expert});
    if (found == rows.end()) return Routers::kUnknown;
    const auto row = std::find_if(found->second.begin(), found->second.end(),
                                  [&](const Row& r) { return r.tensor.rfind(layer.stack, 0) == 0; });
    if (row == found->second.end()) return Routers::kUnknown;
    seen.insert(row->hash);
  }
  return seen.size() == 1 ? Routers::kEqual : Routers::kDiffer;
}

std::string say_rows(Routers routers, bool many) {
  const std::string whose = many ? "The router rows of copies" : "Their router rows";
  switch (routers) {
    case Routers::kEqual: return " " + whose + " are equal, too: copies get equal scores for every token.";
    case Routers::kDiffer: return " " + whose + " differ: copies get different tokens.";
    case Routers::kUnknown: return {};
  }
  return {};
}

/// Copies found in one layer.
struct Found {
  const experts::Layer* layer;
  Groups groups;
  std::string projection;  // empty: all tensors
  std::size_t copies = 0;  // experts in the groups
};

Location place(const WeightScan& scan, const experts::Layer& layer, int expert) {
  const std::size_t i = layer.units.at(expert).front();
  return {scan.file[i], 0, "", scan.tensor[i]};
}

/// Evidence and places that all kinds share: the first layers' copies.
Finding start(const WeightScan& scan, const std::vector<Found>& found) {
  Finding finding;
  for (const Found& f : found) {
    if (finding.locations.size() >= 8) break;
    for (int expert : f.groups.front()) {
      if (finding.locations.size() < 8) finding.locations.push_back(place(scan, *f.layer, expert));
    }
    const std::size_t unit = f.layer->units.at(f.groups.front().front()).front();
    finding.evidence.push_back({"layer " + std::to_string(f.layer->layer), "experts " + experts::list(f.groups),
                                place(scan, *f.layer, f.groups.front().front())});
    finding.evidence.push_back({"content hash", scan.hash[unit], place(scan, *f.layer, f.groups.front().front())});
  }
  return finding;
}

std::string of_layers(const std::vector<Found>& found) {
  std::vector<std::int64_t> numbers;
  for (const Found& f : found) numbers.push_back(f.layer->layer);
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return (numbers.size() == 1 ? "layer " : "layers ") + to_text(numbers);
}

std::string again(const WeightScan& scan, const Found& f) {
  const std::string file = place(scan, *f.layer, f.groups.front().back()).file;
  return "Convert or fetch the file again from the source in which they differ:\n    hf download MODEL " +
         file.substr(file.rfind('/') + 1) +
         " --force-download\nIf the copies are meant (a method that merges experts writes them):\n"
         "    moe-audit check --ignore CK002";
}

Finding pair(const WeightScan& scan, const Rows& rows, const std::vector<Found>& found) {
  const Found& first = found.front();
  Finding finding = start(scan, found);
  finding.severity = Severity::kError;
  finding.message =
      "Experts " + experts::list(first.groups) + " of layer " + std::to_string(first.layer->layer) +
      " are the same, bit for bit, in all " +
      say::plural(static_cast<std::int64_t>(first.layer->units.at(first.groups[0][0]).size()), "tensor", "tensors") +
      "." + say_rows(compare_rows(rows, *first.layer, first.groups[0]), false);
  if (found.size() > 1) finding.message += " The like in " + of_layers(found) + ".";
  finding.remedy = again(scan, first);
  finding.does_not_show = "Which of the copies is the right one.";
  finding.sources = {"arXiv 2401.04088 (Mixtral: 8 distinct experts a layer)"};
  return finding;
}

Finding upcycled(Facts& f, const WeightScan& scan, const Rows& rows, const std::vector<Found>& found) {
  const Found& first = found.front();
  const std::size_t total = first.layer->units.size();
  const bool all = first.groups.size() == 1 && first.groups[0].size() == total;
  Finding finding = start(scan, found);
  finding.severity = Severity::kWarning;
  finding.message =
      (all ? "All " + std::to_string(total) + " experts of " + of_layers(found) + " are copies of each other"
           : std::to_string(first.copies) + " of the " + std::to_string(total) + " experts of " + of_layers(found) +
                 " have an exact copy in their layer (" + std::to_string(first.groups.size()) +
                 " groups: " + experts::list(first.groups) + ")") +
      ": an upcycled model before training, or one whose experts never moved.";
  Routers routers = Routers::kDiffer;
  for (const Found& each : found) {
    for (const std::vector<int>& g : each.groups) {
      const Routers one = compare_rows(rows, *each.layer, g);
      if (one != Routers::kDiffer && routers == Routers::kDiffer) routers = one;
    }
  }
  finding.message += say_rows(routers, true);
  const bool* renormalised = f.want(f->renormalised);
  const std::int64_t* k = f.want(f->top_k);
  if (all && renormalised && !*renormalised && k && *k > 0) {
    finding.message += " The routing weights are not renormalised: with nearly equal scores the routed output is " +
                       std::to_string(*k) + "/" + std::to_string(total) + " of the dense MLP's.";
    finding.evidence.push_back(say::evidence(f->renormalised));
  }
  finding.remedy =
      "If this is the start of an upcycled model, check that the router rows differ (random, not zero: CK004) and the "
      "scale of the routed output, then accept it:\n    moe-audit check --ignore CK002\nIf it was trained already, its "
      "experts were not: see which parameters had a gradient, and go back to the source:\n    "
      "model.get_parameter(NAME).requires_grad";
  finding.does_not_show = "Whether the copies are meant.";
  finding.sources = {"arXiv 2212.05055 (Sparse Upcycling)", "arXiv 2410.07524 (virtual groups, weight scale)",
                     "arXiv 2604.19835 (duplicated experts)"};
  return finding;
}

Finding partial(const WeightScan& scan, const std::vector<Found>& found) {
  const Found& first = found.front();
  Finding finding = start(scan, found);
  finding.severity = Severity::kWarning;
  std::set<std::string> names;
  for (const Found& each : found) names.insert(experts::short_name(each.projection));
  finding.message = "Experts " + experts::list(first.groups) + " of layer " + std::to_string(first.layer->layer) +
                    " are the same, bit for bit, in " + say::some({names.begin(), names.end()}) +
                    " and differ in their other tensors.";
  if (found.size() > 1)
    finding.message += " " + std::to_string(found.size()) + " such cases in " + of_layers(found) + ".";
  finding.remedy = again(scan, first);
  finding.does_not_show = "Which of the copies is the right one, or whether this projection was frozen on purpose.";
  finding.sources = {"arXiv 2212.05055 (Sparse Upcycling)", "arXiv 2502.19261 (Drop-Upcycling: no tensor stays equal)"};
  return finding;
}

/// Groups of experts that agree in one projection and not in the others.
std::vector<Found> partial_copies(const WeightScan& scan, const experts::Layer& layer) {
  std::map<std::string, std::map<std::string, std::vector<int>>> by_projection;
  for (const auto& [expert, units] : layer.units) {
    for (std::size_t i : units) {
      if (experts::tells_apart(scan, i)) by_projection[scan.projection[i]][scan.hash[i]].push_back(expert);
    }
  }
  std::vector<Found> found;
  for (const auto& [projection, by_hash] : by_projection) {
    Found one{&layer, {}, projection};
    for (const auto& [hash, group] : by_hash) {
      if (group.size() > 1) one.groups.push_back(group);
    }
    std::sort(one.groups.begin(), one.groups.end());
    if (!one.groups.empty()) found.push_back(std::move(one));
  }
  return found;
}

constexpr std::size_t kLayers = 4;  // so many layers get a finding each; more share one

template <class Describe>
void report(const std::vector<Found>& found, std::vector<Finding>* findings, Describe describe) {
  if (found.size() > kLayers) return findings->push_back(describe(found));
  for (const Found& one : found) findings->push_back(describe({one}));
}

Outcome check(Facts& f) {
  if (const bool* moe = f.want(f->has_moe); moe && !*moe)
    return Outcome::not_applicable("the model has no routed experts");
  const WeightScan* scan = f.require(f->weight_scan);
  if (f.missing()) return f.cannot_tell();
  const std::vector<experts::Layer> layers = experts::layers(*scan);
  if (layers.empty()) return Outcome::not_applicable("the weight files hold no two routed experts of a layer");
  Rows rows;
  if (const RouterRows* r = f.want(f->router_rows)) {
    for (std::size_t i = 0; i < r->layer.size(); ++i)
      rows[{r->layer[i], r->expert[i]}].push_back({r->tensor[i], r->hash[i]});
  }

  std::vector<Found> pairs, many, parts;
  for (const experts::Layer& layer : layers) {
    Found one{&layer, experts::identical(*scan, layer), {}};
    for (const std::vector<int>& g : one.groups) one.copies += g.size();
    if (one.groups.empty()) {
      for (Found& p : partial_copies(*scan, layer)) parts.push_back(std::move(p));
      continue;
    }
    const std::size_t total = layer.units.size();
    (one.copies * 2 < total || (one.copies == 2 && total > 2) ? pairs : many).push_back(std::move(one));
  }
  std::vector<Finding> findings;
  report(pairs, &findings, [&](const std::vector<Found>& v) { return pair(*scan, rows, v); });
  if (!many.empty()) findings.push_back(upcycled(f, *scan, rows, many));
  if (!parts.empty()) findings.push_back(partial(*scan, parts));
  return Outcome::findings_or_pass(std::move(findings),
                                   "no two experts are the same in any of " +
                                       say::plural(static_cast<std::int64_t>(layers.size()), "layer", "layers"));
}

}  // namespace

extern const Rule rule_duplicate_experts;
const Rule rule_duplicate_experts = {
    .id = "CK002",
    .name = "duplicate-experts",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "Experts of one layer are exact copies of each other.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
