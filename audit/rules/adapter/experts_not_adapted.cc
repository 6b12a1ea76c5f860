// AD003: the targets name expert projections and no routed expert is adapted.
#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
target_modules or target_parameters name projections of routed experts (`w1`, `gate_proj`, `experts` ...), or say
`all-linear`, and under the pinned PEFT and transformers no routed expert gets an adapter.

## Why it matters
transformers 5 keeps all experts of a layer in two 3-D parameters, `experts.gate_up_proj` and `experts.down_proj`.
They are not modules, so names of the old linear layers pass them by. PEFT stops only when nothing at all matches;
with `q_proj` in the list it trains the attention and says nothing. PEFT from 0.19 rewrites the old names on
transformers 5 (utils/transformers_weight_conversion.py), PEFT before does not, and `all-linear` never reaches
parameters before 0.20.

The experts are the model: 96.6 % of Mixtral-8x7B's parameters (45.10 of 46.70 billion). A LoRA that misses them
trains the attention of an otherwise frozen network.

## How to fix
Name the parameters in target_parameters, which needs PEFT 0.17 and lora_dropout 0; or, in transformers 4, the
projections of this family: w1, w2, w3 for Mixtral, gate_proj, up_proj, down_proj for Qwen, OLMoE and DeepSeek.

## Limits
An error where names of experts are listed, a warning for `all-linear`, which promises linear layers only. A list
without any expert name (attention only) is a choice and not judged. The configuration may also come from a recorded
trace, which holds what PEFT ended up with. Which experts of a layer are reached is not
compared.
)md";

std::string remedy(Facts& f, const AdapterTargets& targets) {
  const bool* fused = f.want(f->experts_fused);
  const std::string* family = f.want(f->family);
  const std::string* framework = f.want(f->framework);
  if (fused && *fused && framework && framework->rfind("llama-factory", 0) == 0) {
    return "LLaMA-Factory has no key for parameters; a PEFT that rewrites the names does it:\n    pip install "
           "\"peft>=0.19\"";
  }
  if (!fused || *fused) {
    std::vector<std::string> kept;
    for (std::size_t i = 0; i < targets.entry.size(); ++i) {
      if (targets.field[i] == "target_modules" && targets.hits[i] > 0) kept.push_back(targets.entry[i]);
    }
    say::Settings settings;
    if (!kept.empty() && targets.entry[0] != "all-linear")
      settings.push_back({"target_modules", say::list_literal(kept)});
    settings.push_back({"target_parameters", say::list_literal({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"})});
    settings.push_back({"lora_dropout", "0.0"});
    return say::lora(f, settings);
  }
  const bool mixtral = family && *family == "mixtral";
  const std::vector<std::string> names = mixtral ? std::vector<std::string>{"w1", "w2", "w3"}
                                                 : std::vector<std::string>{"gate_proj", "up_proj", "down_proj"};
  std::vector<std::string> all;
  for (std::size_t i = 0; i < targets.entry.size(); ++i) {
    if (targets.field[i] == "target_modules" && targets.hits[i] > 0) all.push_back(targets.entry[i]);
  }
  all.insert(all.end(), names.begin(), names.end());
  return say::lora(f, {{"target_modules", say::list_literal(all)}});
}

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterTargets* targets = f.require(f->adapter_targets);
  const AdapterModules* modules = f.require(f->adapter_modules);
  if (f.missing()) return f.cannot_tell();
  if (adapter::reaches(*modules, Part::kRoutedExpert)) return Outcome::pass("routed experts are adapted");
  if (adapter::reaches_second_set(*modules)) return Outcome::not_applicable("experts of a second set are adapted, those for images");
  const bool* fused = f.want(f->experts_fused);
  std::vector<std::string> named;
  std::vector<Location> places;
  bool all_linear = false;
  for (std::size_t i = 0; i < targets->entry.size(); ++i) {
    const bool all = targets->entry[i] == "all-linear" && fused && *fused;
    if (!all && !adapter::missed_experts(*targets, i, *modules)) continue;
    all_linear |= all;
    if (!all) named.push_back(targets->entry[i]);
    places.push_back(adapter::place_of(f, *targets, i));
  }
  if (named.empty() && !all_linear) return Outcome::not_applicable("no entry names projections of routed experts");

  Finding finding;
  finding.severity = named.empty() ? Severity::kWarning : Severity::kError;
  finding.message =
      (named.empty() ? "all-linear is targeted" : "The targets name expert projections (" + say::some(named, 6) + ")") +
      std::string(", and of ") +
      say::plural(static_cast<std::int64_t>(modules->module.size()), "adapted module", "adapted modules") +
      " 0 are routed experts" + (fused && *fused ? ": they are 3-D parameters here, not linear modules." : ".");
  finding.evidence = {{"adapter.modules", to_text(*modules), location_of(f->adapter_modules.source())}};
  if (fused) finding.evidence.push_back(say::evidence(f->experts_fused));
  if (f.want(f->transformers)) finding.evidence.push_back(say::evidence(f->transformers));
  if (f.want(f->peft)) finding.evidence.push_back(say::evidence(f->peft));
  finding.remedy = remedy(f, *targets);
  finding.does_not_show = "That an adapter without experts learns too little for your task.";
  finding.locations = places;
  finding.sources =
      say::sources({f->experts_fused.source().cite, "huggingface/peft src/peft/utils/transformers_weight_conversion.py",
                    "huggingface/peft pull request 2638 (target_parameters)"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_experts_not_adapted;
const Rule rule_experts_not_adapted = {
    .id = "AD003",
    .name = "experts-not-adapted",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "The targets name expert projections, and no routed expert is adapted.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
