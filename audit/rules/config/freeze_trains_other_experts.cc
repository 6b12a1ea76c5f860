// CF003: LLaMA-Factory's freeze takes the index of an expert for the index of a layer.
#include <algorithm>
#include <charconv>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
`finetuning_type: freeze` of LLaMA-Factory with `freeze_trainable_modules: all`: a layer index that is an expert's too.

## Why it matters
The layers to train become substrings, ".46." for layer 46, and a parameter trains if its name contains one
(model/adapter.py _setup_freeze_tuning, the same from 0.8.0 to 0.9.5). Where each expert is a module of its own
(transformers 4), `model.layers.3.mlp.experts.46.up_proj.weight` contains ".46." as well: expert 46 trains in every layer that
was to be frozen. The function of 0.9.4, run on a Qwen3-MoE of 4 layers with one layer to train, unfroze 210 parameters: the
201 of layer 3, and 9 of expert 3 in layers 0 to 2. The router of those layers stays as it is and goes on sending the same tokens
to an expert that changes.

## How to fix
Name the modules instead of `all`: ".46.mlp" is in no expert's name.

## Limits
A warning. Only patterns that are a bare layer index are looked at. Where the experts are one 3-D parameter (transformers 5)
their indices are in no name.
)md";

/// 46 of ".46."; -1 for any other pattern.
std::int64_t layer_index(std::string_view pattern) {
  if (pattern.size() < 3 || pattern.front() != '.' || pattern.back() != '.') return -1;
  std::int64_t n = -1;
  const char* end = pattern.data() + pattern.size() - 1;
  const auto result = std::from_chars(pattern.data() + 1, end, n);
  return result.ec == std::errc{} && result.ptr == end ? n : -1;
}

/// "mlp" of "model.layers.{L}.mlp.gate.weight".
std::string moe_module(Facts& f) {
  const Routing* routing = f.want(f->routing);
  const std::string name = routing ? routing->weight_tensor : std::string();
  const std::size_t begin = name.find("{L}.");
  const std::size_t end = begin == std::string::npos ? begin : name.find('.', begin + 4);
  return end == std::string::npos ? "mlp" : name.substr(begin + 4, end - begin - 4);
}

Outcome check(Facts& f) {
  const std::string* framework = f.require(f->framework);
  if (framework && *framework != "llama-factory") return Outcome::not_applicable("LLaMA-Factory does not train this run");
  const Method* method = f.require(f->method);
  if (method && *method != Method::kFull) return Outcome::not_applicable("an adapter is trained, and the base is frozen");
  const std::vector<std::string>* patterns = f.want(f->unfrozen_patterns);
  if (method && !patterns) return Outcome::not_applicable("no parameters are chosen by name");
  const std::int64_t* experts = f.require(f->num_experts);
  const bool* fused = f.require(f->experts_fused);
  const std::vector<std::int64_t>* moe = f.require(f->moe_layers);
  if (f.missing()) return f.cannot_tell();
  if (*fused) return Outcome::pass("the experts are one parameter a layer: no name holds an expert's index");

  std::vector<std::int64_t> layers;
  for (const std::string& pattern : *patterns) {
    if (const std::int64_t n = layer_index(pattern); n >= 0) layers.push_back(n);
  }
  if (layers.empty()) return Outcome::pass("no pattern is a bare layer index");
  std::vector<std::string> hit;
  for (std::int64_t n : layers) {
    if (n < *experts) hit.push_back(std::to_string(n));
  }
  const std::int64_t others = std::count_if(moe->begin(), moe->end(), [&](std::int64_t l) {
    return std::find(layers.begin(), layers.end(), l) == layers.end();
  });
  if (hit.empty() || others == 0) return Outcome::pass("no other layer has an expert of these indices");

  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "Layer" + std::string(layers.size() == 1 ? " " : "s ") + to_text(layers) + " of the model " +
                    (layers.size() == 1 ? "is" : "are") + " to train" + say::at(f->unfrozen_patterns.source()) + ", and so does expert " +
                    say::some(hit, 6) + " in each of the " + say::plural(others, "other MoE layer", "other MoE layers") +
                    ": the patterns " + say::some(*patterns, 3) + " are in the names of these experts too.";
  finding.evidence = {say::evidence(f->unfrozen_patterns), say::evidence(f->num_experts), say::evidence(f->experts_fused)};
  finding.remedy = "In the LLaMA-Factory config, name the modules of a layer:\n    freeze_trainable_modules: self_attn," +
                   moe_module(f) + ",input_layernorm,post_attention_layernorm";
  finding.does_not_show = "How far these experts move.";
  finding.locations = {location_of(f->unfrozen_patterns.source())};
  finding.sources = {"hiyouga/LLaMA-Factory src/llamafactory/model/adapter.py@v0.9.5 _setup_freeze_tuning",
                     f->experts_fused.source().cite};
  finding.sources = say::sources(finding.sources);
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_freeze_trains_other_experts;
const Rule rule_freeze_trains_other_experts = {
    .id = "CF003",
    .name = "freeze-trains-other-experts",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "Freezing by layer index unfreezes the expert of that index in every layer.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
