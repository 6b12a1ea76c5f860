// BT005: the trained routers no longer make the base's choices.
#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
On the same inputs, the mean share |S0 and S1| / k of the base's chosen experts that the trained router still chooses,
per router, against k / E, what independent uniform choices keep. Judged is (kept - chance) / (1 - chance), 1 for
unchanged routing and 0 for chance, at the upper end of the 95 % interval of kept: below 0.1 a warning, below 0.5 a note.

## Why it matters
Experts were trained on the tokens that the base's router sends them. A fine-tune that sends most tokens elsewhere
trains other experts for the task and leaves what the base's experts know unused; at chance level nothing of the base's
routing is left, which a few thousand steps do not do by themselves: the usual causes are a router initialised anew, a
learning rate for the router far too high, experts in another order, or another base. The measure is OLMoE's router
saturation (arXiv 2409.02060 section 5.1), which reaches 60 % after 1 % of pre-training: routers settle early.

## How to fix
Check the base. Give the router a lower learning rate, or freeze it.

## Limits
The thresholds 0.1 and 0.5 are ours. Without --hidden-states the inputs are a probe, a seeded Gaussian through each
model's norm weight: it tells routers apart, it is not your data. Experts and router rows permuted together are the
same network and look like chance here. A router that does not train is BT001's.
)md";

constexpr double kLost = 0.1, kMostlyLost = 0.5;

Location place_of(Facts& f, const std::string& tensor) {
  const RouterTable* routers = f.want(f->routers);
  for (std::size_t i = 0; routers && i < routers->tensor.size(); ++i) {
    if (routers->tensor[i] == tensor) return {routers->file[i], 0, "", tensor};
  }
  return {"", 0, "", tensor};
}

Finding describe(Facts& f, const RoutingKept& r, const std::vector<std::size_t>& rows, Severity severity) {
  std::size_t worst = rows.front();
  std::vector<std::int64_t> layers;
  for (std::size_t i : rows) {
    layers.push_back(r.layer[i]);
    if (r.kept[i] < r.kept[worst]) worst = i;
  }
  const Location where = place_of(f, r.tensor[worst]);
  Finding finding;
  finding.severity = severity;
  finding.message = std::string(severity == Severity::kWarning ? "Next to nothing" : "Less than half") + " of the base's routing is left in " +
                    (rows.size() == 1 ? "layer " : "layers ") + to_text(layers) + ": in layer " + std::to_string(r.layer[worst]) + " the router keeps " + say::percent(r.kept[worst]) +
                    " of the base's choices (95 % interval " + say::percent(r.low[worst]) + " to " + say::percent(r.high[worst]) + "; chance is " + say::percent(r.chance[worst]) + ").";
  finding.evidence = {{"choices kept", say::percent(r.kept[worst]), where},
                      {"tokens with the same expert set", say::percent(r.same[worst]), where},
                      {"tokens", say::count(r.tokens[worst]) + ", " + r.input, where}};
  finding.remedy =
      "See that this is the base of the run, and train the router more gently:\n"
      "    optimizer = torch.optim.AdamW([{\"params\": routers, \"lr\": lr / 10}, {\"params\": others}], lr=lr)";
  finding.does_not_show = "That the new routing is worse for your task.";
  for (std::size_t i : rows) {
    if (finding.locations.size() < 8) finding.locations.push_back(place_of(f, r.tensor[i]));
  }
  finding.sources = {"arXiv 2409.02060 section 5.1 (router saturation)"};
  return finding;
}

Outcome check(Facts& f) {
  if (pair::no_pair(f)) return Outcome::not_applicable(pair::kNoPair);
  const bool* trains = f.want(f->router_trains);
  if (trains && !*trains) return Outcome::not_applicable("the run does not train the router: BT001 judges");
  const RoutingKept* r = f.require(f->base_routing);
  if (f.missing()) return f.cannot_tell();
  std::vector<std::size_t> lost, mostly;
  double lowest = 1;
  bool any = false;
  for (std::size_t i = 0; i < r->layer.size(); ++i) {
    if (r->chance[i] >= 1) continue;  // every expert is chosen
    any = true;
    lowest = std::min(lowest, r->kept[i]);
    const double left = (r->high[i] - r->chance[i]) / (1 - r->chance[i]);
    if (left < kLost) lost.push_back(i);
    else if (left < kMostlyLost) mostly.push_back(i);
  }
  if (!any) return Outcome::not_applicable("every token uses every expert");
  std::vector<Finding> findings;
  if (!lost.empty()) findings.push_back(describe(f, *r, lost, Severity::kWarning));
  if (!mostly.empty()) findings.push_back(describe(f, *r, mostly, Severity::kNote));
  return Outcome::findings_or_pass(std::move(findings), "every router keeps at least " + say::percent(lowest) + " of the base's choices");
}

}  // namespace

extern const Rule rule_routing_changed;
const Rule rule_routing_changed = {
    .id = "BT005",
    .name = "routing-changed",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "The trained routers no longer make the base's choices.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
