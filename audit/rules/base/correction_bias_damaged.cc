// BT003: the selection bias of the base was lost, zeroed, rounded, or not updated.
#include <algorithm>

#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every correction bias of the base (`e_score_correction_bias`, `expert_bias`) is still in the trained model, is not all
zeros where the base's is not, and is not the base's bias rounded to 16 bits. Where the training stack updates the
bias (auxiliary-loss-free balancing), it is not bit for bit the base's.

## Why it matters
The bias is added to the scores for the choice of experts and is the whole load balancing of these families
(DeepSeek-V3, arXiv 2412.19437 section 2.1.2; it moves by 0.001 a step). Lost or zeroed, tokens fall back to the
unbalanced choice. bfloat16 keeps 8 bits: a bias of 10 moves in steps of 0.0625, 60 updates wide. transformers before
5.0 casts it to the model's dtype when it loads (huggingface/transformers pull request 42580), so a save after loading
in bfloat16 is enough.

transformers itself never updates the bias: identical is right there.

## How to fix
Copy the bias of the base into the trained model, in float32, or train and save with transformers 5.0 or later.

## Limits
It needs the base's weights. A bias that is missing altogether is CK003's finding where the family is known. That a
bias changed in another way is no finding: stacks that update it are meant to.
)md";

Finding describe(const BiasChanges& b, const std::vector<std::size_t>& rows, Severity severity, std::string what, std::string shows) {
  const std::size_t first = rows.front();
  std::vector<std::int64_t> layers;
  for (std::size_t i : rows) layers.push_back(b.layer[i]);
  Finding finding;
  finding.severity = severity;
  finding.message = "The correction bias of " + std::string(rows.size() == 1 ? "layer " : "layers ") + to_text(layers) + " " + what;
  finding.evidence = {{"non-zero in the base", say::count(b.base_non_zero[first]) + " of " + say::count(b.elements[first]), {b.file[first], 0, "", b.tensor[first]}},
                      {"non-zero here", say::count(b.non_zero[first]), {b.file[first], 0, "", b.tensor[first]}},
                      {"elements changed", say::count(b.changed[first]), {b.file[first], 0, "", b.tensor[first]}}};
  finding.remedy =
      "Put the base's bias back, in its own dtype:\n"
      "    w = load_file(\"MODEL/model.safetensors\"); b = load_file(\"BASE/model.safetensors\")\n"
      "    w.update({k: v for k, v in b.items() if \"bias\" in k and (\"correction\" in k or \"expert_bias\" in k)})\n"
      "    save_file(w, \"MODEL/model.safetensors\", metadata={\"format\": \"pt\"})";
  finding.does_not_show = std::move(shows);
  for (std::size_t i : rows) {
    if (finding.locations.size() < 8) finding.locations.push_back({b.file[i], 0, "", b.tensor[i]});
  }
  finding.sources = {"arXiv 2412.19437 section 2.1.2", "huggingface/transformers pull request 42580"};
  return finding;
}

/// " On the probe 98.2 % of the tokens keep their expert set in the worst of these layers."
std::string routing_text(Facts& f, const std::vector<int>& layers) {
  const RoutingKept* kept = f.want(f->base_routing);
  double worst = 1;
  bool any = false;
  for (std::size_t i = 0; kept && i < kept->layer.size(); ++i) {
    if (std::find(layers.begin(), layers.end(), kept->layer[i]) == layers.end()) continue;
    worst = std::min(worst, kept->same[i]);
    any = true;
  }
  return any ? " In the worst of these layers " + say::percent(worst) + " of the probe's tokens keep their expert set." : std::string();
}

Outcome check(Facts& f) {
  if (pair::no_pair(f)) return Outcome::not_applicable(pair::kNoPair);
  const BiasChanges* b = f.require(f->base_biases);
  if (f.missing()) return f.cannot_tell();
  if (b->layer.empty()) return Outcome::not_applicable("the base has no correction bias");
  const TensorDiff* missing = f.want(f->tensor_diff);
  const Balance* balance = f.want(f->balance);
  std::vector<std::size_t> lost, zeroed, rounded, stuck;
  std::vector<int> rounded_layers;
  for (std::size_t i = 0; i < b->layer.size(); ++i) {
    if (!b->present[i]) {
      const bool ck003 = missing && std::find(missing->missing.begin(), missing->missing.end(), b->tensor[i]) != missing->missing.end();
      if (!ck003) lost.push_back(i);
    } else if (b->base_non_zero[i] > 0 && b->non_zero[i] == 0) {
      zeroed.push_back(i);
    } else if (!b->rounded_to[i].empty()) {
      rounded.push_back(i);
      rounded_layers.push_back(b->layer[i]);
    } else if (b->changed[i] == 0 && balance && *balance == Balance::kBiasUpdate) {
      stuck.push_back(i);
    }
  }
  std::vector<Finding> findings;
  if (!lost.empty()) findings.push_back(describe(*b, lost, Severity::kError, "is not in the trained model: a loader fills it with zeros.", "Whether another name holds it."));
  if (!zeroed.empty()) {
    findings.push_back(describe(*b, zeroed, Severity::kError, "is all zeros; in the base " + say::count(b->base_non_zero[zeroed.front()]) + " of " + say::count(b->elements[zeroed.front()]) + " are not.",
                                "Whether the run trained with the zeros or only the save lost the values."));
  }
  if (!rounded.empty()) {
    double largest = 0;
    for (std::size_t i : rounded) largest = std::max(largest, b->largest_change[i]);
    findings.push_back(describe(*b, rounded, Severity::kWarning, "is the base's rounded to " + b->rounded_to[rounded.front()] + ", by up to " + say::number(largest) + "." + routing_text(f, rounded_layers),
                                "That the rounding hurts: other changes of the router are in the share, too."));
  }
  if (!stuck.empty()) {
    findings.push_back(describe(*b, stuck, Severity::kWarning, "is bit for bit the base's (0 of " + say::count(b->elements[stuck.front()]) + " elements changed) although this training stack updates it.",
                                "Whether the update was switched off on purpose."));
  }
  return Outcome::findings_or_pass(std::move(findings), say::plural(static_cast<std::int64_t>(b->layer.size()), "correction bias", "correction biases") + " compared with the base");
}

}  // namespace

extern const Rule rule_correction_bias_damaged;
const Rule rule_correction_bias_damaged = {
    .id = "BT003",
    .name = "correction-bias-damaged",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The selection bias of the base was lost, zeroed, rounded, or not updated.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
