// CF001: a key that the framework which reads the file ignores.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Keys of a training config that the framework, at the versions this run may use, does not know: misspelt, or in a
place where it does not look.

## Why it matters
Axolotl's schema drops keys it does not know without a word: `router_aux_loss_coef: 0.02` at the top level of its
YAML does nothing, and belongs under `model_config:` (utils/schemas/config.py has no extra=forbid). Config classes
of transformers take any key and keep it: `router_z_loss_coef` in a Mixtral config.json is stored, saved again and
read by nothing. LLaMA-Factory refuses unknown keys unless ALLOW_EXTRA_ARGS is set. The run then differs from the
file that documents it.

## How to fix
Move the key to where it is read, or delete it.

## Limits
An error for keys about the experts, a note for others. Only frameworks and versions whose list of keys is known are
compared. Keys that moe-audit itself did not read are not findings; they are listed apart, as unread.
)md";

std::string indented(std::string text) {
  for (std::size_t at = text.find('\n'); at != std::string::npos; at = text.find('\n', at + 1))
    text.insert(at + 1, "    ");
  return text;
}

Outcome check(Facts& f) {
  const std::vector<IgnoredKey>* keys = f.require(f->ignored_keys);
  if (f.missing()) return f.cannot_tell();
  std::vector<Finding> findings;
  for (const IgnoredKey& key : *keys) {
    const Location where{key.file, key.line, key.key, ""};
    Finding finding;
    finding.severity = key.about_moe ? Severity::kError : Severity::kNote;
    finding.message = key.framework + " ignores \"" + key.key + "\" (" + key.file +
                      (key.line > 0 ? ":" + std::to_string(key.line) : "") + ")" +
                      (key.why.empty() ? "" : ": " + key.why) + ".";
    finding.evidence = {{"ignored key", key.key, where}, {"read by", key.framework, {}}};
    finding.remedy = key.instead.empty() ? "Delete the line:\n    " + key.key + ": ..."
                                         : "Delete it, and write instead:\n    " + indented(key.instead);
    finding.does_not_show = "What the run would do if the key were read.";
    finding.locations = {where};
    finding.sources = {key.framework + ": list of known keys"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "the framework knows every key");
}

}  // namespace

extern const Rule rule_misplaced_or_ignored_key;
const Rule rule_misplaced_or_ignored_key = {
    .id = "CF001",
    .name = "misplaced-or-ignored-key",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "The framework ignores a key of the config.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
