// CF004: what a pattern of unfrozen_parameters names stays frozen.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every pattern of Axolotl's `unfrozen_parameters` reaches at least one parameter of the model, under every release of
transformers that the run may use.

## Why it matters
Everything that no pattern reaches is frozen, and Axolotl warns only if *all* parameters are (utils/freeze.py,
freeze_layers_except). A stale pattern passes without a word, and the part it names does not train. Three ways that
happens:

- The pattern is matched from the beginning of the name (`re.match`), although the documentation says that it
  "will match any part of the layer name": `block_sparse_moe.gate` reaches nothing, `model.layers.[0-9]+.block_sparse_moe.gate` does.
- A dot is a literal dot unless a plus follows, so `.*` means "any number of dots" and reaches nothing; `.+` works.
- transformers 5 renamed parameters: `block_sparse_moe` is `mlp`, and the experts are two stacks without `w1`.

## How to fix
Begin the pattern with `model.` and use `.+` for any text.

## Limits
Only names are compared, those of the family in audit/families. A pattern with a range of rows (`[:32000]`) trains
these rows by zeroing the gradient of the others; weight decay still moves them, which is not judged here.
)md";

/// The pattern that reaches what this one was meant for.
std::string corrected(const std::string& pattern) {
  std::string out = pattern;
  for (std::size_t at = out.find(".*"); at != std::string::npos; at = out.find(".*", at)) out.replace(at, 2, ".+");
  return out.rfind("model.", 0) == 0 || out.rfind("^", 0) == 0 ? out : "model.+" + out;
}

Outcome check(Facts& f) {
  const std::vector<std::string>* patterns = f.want(f->unfrozen_patterns);
  if (!patterns || patterns->empty()) return Outcome::not_applicable("no parameters are unfrozen by pattern");
  const std::string* framework = f.want(f->framework);
  if (framework && *framework != "axolotl") return Outcome::not_applicable(*framework + " stops at a name that it does not find");
  const UnfrozenTargets* targets = f.require(f->unfrozen_targets);
  if (f.missing()) return f.cannot_tell();
  const Source& said = f->unfrozen_patterns.source();
  std::vector<Finding> findings;
  for (std::size_t i = 0; i < targets->pattern.size(); ++i) {
    if (targets->hits[i] > 0 || !targets->why[i].empty()) continue;
    const std::string& pattern = targets->pattern[i];
    Location where = location_of(said);
    if (targets->line[i] > 0) where.line = targets->line[i];
    Finding finding;
    finding.severity = Severity::kError;
    finding.message = "unfrozen_parameters names \"" + pattern + "\"" + say::at(said) +
                      ", and no parameter of the model begins so: what it names stays frozen.";
    if (!targets->anywhere[i].empty()) {
      finding.message += " " + targets->anywhere[i] + " holds it further on, but Axolotl matches from the beginning of the name.";
    }
    finding.evidence = {{"training.unfrozen_targets hits", "0", where}};
    if (const VersionSet* version = f.want(f->transformers)) {
      finding.evidence.push_back({"versions.transformers", to_text(*version), location_of(f->transformers.source())});
    }
    std::string list = "In the Axolotl config:\n    unfrozen_parameters:\n";
    for (std::size_t j = 0; j < targets->pattern.size(); ++j) {
      list += "      - \"" + (targets->hits[j] > 0 ? targets->pattern[j] : corrected(targets->pattern[j])) + "\"\n";
    }
    finding.remedy = list;
    finding.does_not_show = "That the part was meant to train: an old line may have been forgotten.";
    finding.locations = {where};
    finding.sources = {"axolotl src/axolotl/utils/freeze.py@v0.18.0 (LayerNamePattern)"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "every pattern reaches parameters");
}

}  // namespace

extern const Rule rule_unfrozen_pattern_matches_nothing;
const Rule rule_unfrozen_pattern_matches_nothing = {
    .id = "CF004",
    .name = "unfrozen-pattern-matches-nothing",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "A pattern of unfrozen_parameters reaches no parameter.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
