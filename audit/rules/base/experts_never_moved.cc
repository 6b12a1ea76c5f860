// BT004: some experts are the base's while their siblings were trained.
#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
In a layer where routed experts moved, none is bit for bit the base's, and none only shrank along its own direction
(cosine of W1 - W0 and W0 at most -0.99: weight decay without a gradient).

## Why it matters
An expert without a gradient got no token during the whole fine-tune (or the gradient was lost on the way). It still
takes part in inference, and with weight decay it fades: in a stack of experts (transformers 5) the gradient of an
expert without tokens is zero, not absent, and AdamW multiplies it by 1 - lr x weight_decay at every step. Where each
expert is a module of its own (transformers 4) the gradient is None and AdamW skips it: it stays bit for bit.

Under even load each expert gets k / E of the tokens; loads are not even. The least used of OLMoE's 64 experts gets
0.7 % to 17 % of the mean on GitHub code, by layer (counts published in allenai/OLMoE).

## How to fix
More tokens per step, a balance loss that works, or leave these experts out on purpose.

## Limits
It needs the base's weights and judges full fine-tunes: under an adapter AD006 judges the adapter itself. In bfloat16
without float32 master weights an update below half a unit in the last place is lost, and an expert with few tokens can
stay identical although it got gradients. Training chosen experts only (ESFT, arXiv 2407.01906) looks the same:
ignore the rule there.
)md";

constexpr double kShrunk = -0.99;

Outcome check(Facts& f) {
  if (pair::no_pair(f)) return Outcome::not_applicable(pair::kNoPair);
  if (pair::trains_adapter(f)) return Outcome::not_applicable("the run trains an adapter: AD006 judges its matrices, BT002 the merge");
  const BaseChanges* c = f.require(f->base_changes);
  if (f.missing()) return f.cannot_tell();
  struct Layer {
    std::vector<std::int64_t> same, shrunk;
    std::int64_t moved = 0;
    std::size_t first = 0;
  };
  std::map<int, Layer> layers;
  for (std::size_t i = 0; i < c->part.size(); ++i) {
    if (c->part[i] != Part::kRoutedExpert || c->expert[i] < 0) continue;
    Layer& layer = layers[c->layer[i]];
    const bool same = c->changed[i] == 0, shrunk = !same && c->along[i] <= kShrunk;
    if ((same || shrunk) && layer.same.empty() && layer.shrunk.empty()) layer.first = i;
    if (same) layer.same.push_back(c->expert[i]);
    else if (shrunk) layer.shrunk.push_back(c->expert[i]);
    else ++layer.moved;
  }
  if (layers.empty()) return Outcome::not_applicable("the two models have no single experts to compare");
  std::map<int, std::vector<std::int64_t>> same, shrunk;
  std::int64_t dead = 0, all = 0;
  std::vector<Location> where;
  for (const auto& [index, layer] : layers) {
    all += static_cast<std::int64_t>(layer.same.size() + layer.shrunk.size()) + layer.moved;
    if (layer.moved == 0 || (layer.same.empty() && layer.shrunk.empty())) continue;
    if (!layer.same.empty()) same[index] = layer.same;
    if (!layer.shrunk.empty()) shrunk[index] = layer.shrunk;
    dead += static_cast<std::int64_t>(layer.same.size() + layer.shrunk.size());
    if (where.size() < 8) where.push_back(pair::place_of(*c, layer.first));
  }
  if (dead == 0) return Outcome::pass(say::plural(all, "expert", "experts") + " compared: in each layer all moved or none did");
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = say::plural(dead, "routed expert of ", "routed experts of ") + say::count(all) + " got no update while siblings in the same layer did";
  if (!same.empty()) {
    finding.message += ": bit for bit the base's: " + pair::by_layer(same);
    finding.evidence.push_back({"experts identical to the base", pair::by_layer(same), where.front()});
  }
  if (!shrunk.empty()) {
    finding.message += std::string(same.empty() ? ": " : "; ") + "only shrunk by weight decay: " + pair::by_layer(shrunk);
    finding.evidence.push_back({"experts that only shrank", pair::by_layer(shrunk), where.front()});
  }
  finding.message += ".";
  finding.remedy =
      "Give the routers a balance loss and the experts more tokens a step, or accept it:\n"
      "    moe-audit check --ignore BT004";
  finding.does_not_show = "Whether these experts got no tokens, were frozen on purpose, or lost their gradient.";
  finding.locations = std::move(where);
  finding.sources = {"torch/optim/adamw.py (parameters without a gradient are skipped; decay is p *= 1 - lr x weight_decay)", "arXiv 2407.01906"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_experts_never_moved;
const Rule rule_experts_never_moved = {
    .id = "BT004",
    .name = "experts-never-moved",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "Some experts are the base's while their siblings were trained.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
