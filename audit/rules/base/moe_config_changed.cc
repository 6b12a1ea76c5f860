// BT006: the trained model routes by other numbers, or stores its routers in fewer bits, than the base.
#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The keys of config.json by which tokens are routed (experts per token, groups, norm_topk_prob, routed_scaling_factor,
scoring function, capacity) and the shape of the MoE are the base's, defaults of the class included; and router weights
are not stored in fewer bits than in the base.

## Why it matters
The weights were trained for the base's numbers. norm_topk_prob scales every expert's output by the sum of the chosen
scores, at k = 8 of 128 a factor of several; one expert more or less changes every token. transformers writes whatever
the config object held at save time, so an override meant for one experiment, or a default of another release, ends up
in the checkpoint and is served from then on. Keys of the balance loss act only in training and are no finding, nor is a
key that the training config itself overrides.

A router stored in bfloat16 that was float32 loses 16 of 24 bits for good; router.precision shows what that changes.

## How to fix
Put the base's value back, or say in the training config that the change is meant.

## Limits
It needs the base's config.json beside the run's own. It cannot tell a slip from a decision that was made in a script.
Correction biases have rule BT003; tensors that contradict their own config.json have RT003.
)md";

int bits_of(DType d) {
  switch (d) {
    case DType::kF64: return 64;
    case DType::kF32: return 32;
    case DType::kBF16: case DType::kF16: return 16;
    default: return 0;  // scales and packing decide
  }
}

Finding config_finding(const ConfigChanges& c, const std::vector<std::size_t>& rows) {
  Finding finding;
  finding.severity = Severity::kWarning;
  std::string text, lines;
  for (std::size_t i : rows) {
    text += (text.empty() ? "" : ", ") + c.key[i] + " is " + c.trained[i] + " and was " + c.base[i];
    lines += (lines.empty() ? "\n    \"" : ",\n    \"") + c.key[i] + "\": " + c.base[i];
    finding.evidence.push_back({c.key[i] + " (base)", c.base[i], {c.base_file, c.base_line[i], c.key[i], ""}});
    finding.evidence.push_back({c.key[i], c.trained[i], {c.file, c.line[i], c.key[i], ""}});
    finding.locations.push_back({c.file, c.line[i], c.key[i], ""});
  }
  finding.message = "The trained model routes by other numbers than the base: " + text + ".";
  finding.remedy = "If that was not meant, in the config.json of the trained model:" + lines;
  finding.does_not_show = "Whether the run trained with the new value or only the save has it.";
  finding.sources = {"huggingface/transformers src/transformers/configuration_utils.py (save_pretrained writes the config object)"};
  return finding;
}

Outcome check(Facts& f) {
  const bool* given = f.require(f->base_given);
  const ConfigChanges* c = f.want(f->base_config);
  if (given && !*given && !c) return Outcome::not_applicable("no base model beside one trained from it");
  const DTypePairs* dtypes = given && *given ? f.require(f->base_dtypes) : nullptr;
  if (f.missing()) return f.cannot_tell();
  std::vector<std::size_t> rows;
  std::string other;
  for (std::size_t i = 0; c && i < c->key.size(); ++i) {
    if (c->effect[i] == "routing" || c->effect[i] == "shape") rows.push_back(i);
    else other += (other.empty() ? "" : ", ") + c->key[i] + " " + c->base[i] + " -> " + c->trained[i];
  }
  std::vector<Finding> findings;
  if (!rows.empty()) findings.push_back(config_finding(*c, rows));
  for (std::size_t i = 0; dtypes && i < dtypes->part.size(); ++i) {
    const int from = bits_of(dtypes->base[i]), to = bits_of(dtypes->trained[i]);
    const bool bias = dtypes->first[i].find("bias") != std::string::npos;
    if (dtypes->part[i] != Part::kRouter || bias || from <= to || to == 0) continue;
    const Location where{dtypes->file[i], 0, "", dtypes->first[i]};
    Finding finding;
    finding.severity = Severity::kWarning;
    finding.message = say::plural(dtypes->tensors[i], "router weight is", "router weights are") + " stored as " + name_of(dtypes->trained[i]) + ", in the base as " + name_of(dtypes->base[i]) + ".";
    finding.evidence = {{"router dtype in the base", name_of(dtypes->base[i]), where}, {"router dtype", name_of(dtypes->trained[i]), where}};
    finding.remedy = "Keep the routers in the base's dtype when saving:\n    for n, p in model.named_parameters():\n        if n.endswith(\"" + say::router_leaf(f) + ".weight\"): p.data = p.data.float()";
    finding.does_not_show = "That the rounding changes choices: router.precision measures it.";
    finding.locations = {where};
    finding.sources = {"arXiv 2202.08906 section 3.4 (router precision)"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), other.empty() ? "the base's MoE keys and router dtypes" : "changed, and no finding: " + other);
}

}  // namespace

extern const Rule rule_moe_config_changed;
const Rule rule_moe_config_changed = {
    .id = "BT006",
    .name = "moe-config-changed",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "The trained model routes by other numbers, or stores its routers in fewer bits, than the base.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
