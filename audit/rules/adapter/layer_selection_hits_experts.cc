// AD012: layers_to_transform was read as expert numbers.
#include <algorithm>
#include <set>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
`layers_to_transform` is set, and adapters of routed experts sit in layers that it does not list.

## Why it matters
Before PEFT 0.20.0 the layer was read from the *last* number of a module's path (tuners/tuners_utils.py, a greedy
pattern; huggingface/peft pull request 3318). In `model.layers.5.mlp.experts.3.up_proj` that is the expert. With
`layers_to_transform: [2, 3]` experts 2 and 3 of *every* layer are adapted and no other expert of layers 2 and 3, while
attention follows the layers as meant. Nothing is said.

## How to fix
Use PEFT 0.20.0 or newer, or write the layers into a pattern.

## Limits
Experts that are one stack in memory (transformers 5) have no number in their path and are not concerned. Of routers and
attention the layer is the last number, and it is read rightly.
)md";

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const std::vector<std::int64_t>* layers = f.want(f->layers_to_transform);
  if (!layers || layers->empty()) return Outcome::not_applicable("layers_to_transform is not set");
  const AdapterModules* modules = f.require(f->adapter_modules);
  if (f.missing()) return f.cannot_tell();
  std::set<int> wrong_layers, experts;
  std::int64_t outside = 0, first = -1;
  for (std::size_t i = 0; i < modules->module.size(); ++i) {
    if (modules->part[i] != Part::kRoutedExpert || modules->expert[i] < 0) continue;
    if (std::find(layers->begin(), layers->end(), modules->layer[i]) != layers->end()) continue;
    if (outside++ == 0) first = static_cast<std::int64_t>(i);
    wrong_layers.insert(modules->layer[i]);
    experts.insert(modules->expert[i]);
  }
  if (outside == 0) return Outcome::pass("no routed expert outside these layers is adapted");
  const auto list = [](const std::set<int>& numbers) {
    std::vector<std::string> words;
    for (int n : numbers) words.push_back(std::to_string(n));
    return say::some(words, 6);
  };
  const std::string leaves = "gate_proj|up_proj|down_proj|w1|w2|w3";
  std::string alternatives;
  for (const std::int64_t layer : *layers) alternatives += (alternatives.empty() ? "" : "|") + std::to_string(layer);
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "layers_to_transform is " + to_text(*layers) + say::at(f->layers_to_transform.source()) + ", and PEFT took it for experts: " +
                    say::plural(outside, "module", "modules") + " of experts " + list(experts) + " are adapted in layers " +
                    list(wrong_layers) + ", which it does not list.";
  finding.evidence = {say::evidence(f->layers_to_transform),
                      {"adapter.modules", modules->module[static_cast<std::size_t>(first)], location_of(f->adapter_modules.source())}};
  if (f.want(f->peft)) finding.evidence.push_back(say::evidence(f->peft));
  finding.remedy = "Use a release that reads the layer:\n    pip install \"peft>=0.20.0\"\nor name the layers in a pattern instead. " +
                   say::lora(f, {{"target_modules", "'.*layers\\.(" + alternatives + ")\\..*(" + leaves + ")'"}, {"layers_to_transform", "null"}});
  finding.does_not_show = "Which experts were meant.";
  finding.locations = {location_of(f->layers_to_transform.source())};
  finding.sources = say::sources({"huggingface/peft pull request 3318", f->adapter_modules.source().cite});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_layer_selection_hits_experts;
const Rule rule_layer_selection_hits_experts = {
    .id = "AD012",
    .name = "layer-selection-hits-experts",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "layers_to_transform was read as numbers of experts.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
