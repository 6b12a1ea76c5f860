// RT003: config.json and the tensors describe different models.
#include "audit/rules/routing/shape_check.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The number of experts, the hidden size and the layers with experts, as config.json gives them, against the shapes of
the router and expert tensors. Each number that differs is one finding.

## Why it matters
from_pretrained builds the model from the config and fills in what fits. With fewer experts in the config than in
the files, the rest is left behind; with more, they are initialised at random; a size that differs is an error or,
with ignore_mismatched_sizes, a new random router. Each time the log has a warning among hundreds of lines, and
training starts from a router that belongs to another model. Usual causes: a config of a sibling model, experts
pruned or merged without a new config, a key renamed between versions (`num_experts` is stored as
`num_local_experts` for Qwen3-MoE since transformers 5).

## How to fix
Give the model the config it was saved with; the tensors say what it must contain.

## Limits
Headers only, no values. Packed 4-bit routers hide their shape and are passed over. Tensors that are merely absent
are CK003's.
)md";

Outcome check(Facts& f) {
  const std::vector<routing::Disagreement> found = routing::disagreements(f);
  if (f.missing()) return f.cannot_tell();
  if (f->routers.value().layer.empty()) return Outcome::not_applicable("the weight files hold no router");
  const auto from_tensors = [](const Fact<std::int64_t>& fact) {
    return fact.known() && fact.source().role == Role::kModelWeights;
  };
  if (from_tensors(f->num_experts) && from_tensors(f->hidden_size)) {
    return Outcome::not_applicable("no config: the numbers come from the tensors themselves");
  }
  if (!f.require(f->num_experts)) return f.cannot_tell();

  std::vector<Finding> findings;
  for (const routing::Disagreement& d : found) {
    Finding finding;
    finding.severity = Severity::kError;
    finding.message = "Config and tensors disagree: " + d.what + ".";
    finding.evidence = {d.config, d.tensor};
    finding.remedy = d.key.empty()
                         ? "Use the config.json that was saved with these tensors:\n    cp CHECKPOINT/config.json ."
                         : say::model_config(f, {{d.key, d.value}});
    finding.does_not_show = "Which of the two is the model you want.";
    finding.locations = {d.config.where, d.tensor.where};
    finding.sources = {
        "huggingface/transformers src/transformers/modeling_utils.py (from_pretrained builds from the config)"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "experts, hidden size and MoE layers agree");
}

}  // namespace

extern const Rule rule_config_disagrees_with_tensors;
const Rule rule_config_disagrees_with_tensors = {
    .id = "RT003",
    .name = "config-disagrees-with-tensors",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "config.json and the tensors describe different models.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
