// AD006: adapters of experts that training never touched.
#include <map>
#include <set>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
After warm-up, the B matrices of some routed experts are exactly zero while other B of the same adapter are not.

## Why it matters
LoRA starts with B = 0, and the first optimizer step that sees a gradient moves it: with Adam by about the learning
rate, however small the gradient. A B that is exactly zero never got one. Either no token reached the expert, or the
gradient was lost on the way: a frozen parameter, a fused kernel without backward (unslothai/unsloth issue 5230), a
wrapper that was not in the optimizer. Such an adapter is the identity; merged or not, this expert is the base
model's.

Experts without tokens are normal for a short run: under even load each expert gets k / E of the tokens, and loads
are not even: the least used of OLMoE's 64 experts gets 0.7 % to 17 % of the mean on GitHub code, by layer (counts
published in allenai/OLMoE). A whole layer without a single trained expert is not normal: every token passes k
experts of that layer.

## How to fix
All experts of a layer: look for what freezes them. Some: train longer or on more tokens per step, balance the
routers, or leave these experts out on purpose.

## Limits
An error if all adapted experts of a layer are untouched, a warning if some are. It needs the adapter's weights and
the number of steps. Initialisations with a B other than zero (PiSSA, OLoRA) cannot be judged this way and never
fire.
)md";

struct Layer {
  std::set<int> experts, untouched;
};

std::string where_text(const std::map<int, Layer>& layers, bool whole) {
  std::string text;
  for (const auto& [index, layer] : layers) {
    if (layer.untouched.empty() || (layer.untouched == layer.experts) != whole) continue;
    const std::vector<std::int64_t> ids(layer.untouched.begin(), layer.untouched.end());
    text += (text.empty() ? "layer " : "; layer ") + std::to_string(index) +
            (ids.front() < 0 ? "" : " experts " + to_text(ids));
  }
  return text;
}

/// "under even load each of 64 experts gets 512 of 4,096 tokens a step"; "" if the batch is not known.
std::string load_context(Facts& f) {
  const std::int64_t *micro = f.want(f->micro_batch), *ga = f.want(f->accumulation),
                     *length = f.want(f->sequence_length);
  const std::int64_t *k = f.want(f->top_k), *experts = f.want(f->num_experts), *world = f.want(f->world_size);
  if (!micro || !ga || !length || !k || !experts || *experts < 1) return {};
  const std::int64_t tokens = *micro * *ga * *length * (world ? *world : 1);
  return " Under even load each of " + std::to_string(*experts) + " experts would get " +
         say::count(tokens * *k / *experts) + " of at most " + say::count(tokens) + " tokens a step" +
         (world ? "." : " and process.");
}

Finding describe(Facts& f, const std::map<int, Layer>& layers, bool whole, std::int64_t steps, bool any_trained) {
  std::int64_t experts = 0;
  for (const auto& [index, layer] : layers) {
    if ((layer.untouched == layer.experts) == whole) experts += static_cast<std::int64_t>(layer.untouched.size());
  }
  const std::string text = where_text(layers, whole);
  Finding finding;
  finding.severity = whole ? Severity::kError : Severity::kWarning;
  finding.message =
      "After " + say::plural(steps, "optimizer step", "optimizer steps") + " the adapters of " +
      (whole ? "all routed experts of a layer" : say::plural(experts, "routed expert", "routed experts")) +
      " are untouched, B exactly 0: " + text + "." +
      (any_trained ? "" : " So is every other B: the run changed nothing.") + (whole ? "" : load_context(f));
  finding.evidence = {{"adapter.tensors with B = 0", text, location_of(f->adapter_tensors.source())},
                      say::evidence(f->optimizer_steps)};
  finding.remedy =
      whole ? "See what is frozen, before training:\n"
              "    print([n for n, p in model.named_parameters() if \"lora_\" in n and not p.requires_grad])\n"
              "and train it:\n"
              "    for n, p in model.named_parameters():\n"
              "        if \"lora_\" in n: p.requires_grad_(True)"
            : "Train longer or on more tokens per step, or balance the routers if they are trained; to accept it:\n"
              "    moe-audit check --ignore AD006";
  finding.does_not_show = whole ? "Which of freezing, optimizer or backward lost the gradient."
                                : "Whether these experts got no tokens or lost their gradient.";
  finding.locations = {location_of(f->adapter_tensors.source())};
  finding.sources = say::sources({"arXiv 2106.09685 section 4.1 (B starts at zero)", "unslothai/unsloth issue 5230"});
  return finding;
}

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterTensors* tensors = f.require(f->adapter_tensors);
  const std::int64_t* steps = f.require(f->optimizer_steps);
  const std::int64_t* warmup = f.want(f->warmup_steps);
  if (steps && *steps < 1) return Outcome::not_applicable("no optimizer step yet: every B is zero by construction");
  if (steps && warmup && *steps <= *warmup)
    return Outcome::not_applicable("still in warm-up at step " + std::to_string(*steps));
  if (f.missing()) return f.cannot_tell();
  std::map<int, Layer> layers;
  bool any_trained = false, any_untouched = false;
  for (std::size_t i = 0; i < tensors->module.size(); ++i) {
    any_trained |= !tensors->b_zero[i];
    if (tensors->part[i] != Part::kRoutedExpert) continue;
    Layer& layer = layers[tensors->layer[i]];
    layer.experts.insert(tensors->expert[i]);
    if (!tensors->b_zero[i]) continue;
    layer.untouched.insert(tensors->expert[i]);
    any_untouched = true;
  }
  if (layers.empty()) return Outcome::not_applicable("the adapter holds no routed experts");
  if (!any_untouched) return Outcome::pass("every adapted expert has a B other than zero");
  std::vector<Finding> findings;
  if (!where_text(layers, true).empty()) findings.push_back(describe(f, layers, true, *steps, any_trained));
  if (!where_text(layers, false).empty()) findings.push_back(describe(f, layers, false, *steps, any_trained));
  return Outcome::findings_or_pass(std::move(findings));
}

}  // namespace

extern const Rule rule_expert_adapter_untrained;
const Rule rule_expert_adapter_untrained = {
    .id = "AD006",
    .name = "expert-adapter-untrained",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "Adapters of routed experts are exactly as they were initialised.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
