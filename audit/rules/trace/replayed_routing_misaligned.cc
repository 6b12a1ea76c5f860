// TR025: a rollout's experts lie over the wrong tokens or layers.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
`--trace DIR --rollout FILE`: the experts of the recorded training forward against those that an inference engine chose for
the same tokens, as the array lies (row by token, layer by layer). Another alignment under which far more agree is named:
shifted by tokens, without the prompt, with or without padding, layers shifted or counted with the dense ones, viewed as
[layers, tokens] instead of transposed. Far more: by a tenth, and by five standard errors of the tokens compared.
Where the trace says routing_replayed, the training forward took these experts, and every one must be the same.

## Why it matters
Routing replay (R3) exists to train on the experts that produced the tokens. Laid one token off, every token is trained
through the experts of its neighbour: agreement falls to little above chance, and the gradient is that of another function.

## How to fix
Move the array as the named alignment says before it is replayed.

## Limits
The array must be that of the tokens of the trace's micro-batches, in their order. Shifts that differ from sequence to
sequence are not found.
)md";

Outcome check(Facts& f) {
  const bool* given = f.require(f->rollout_given);
  if (given && !*given) return Outcome::not_applicable("no rollout was given");
  const RolloutAgreement* r = f.require(f->rollout);
  if (f.missing()) return f.cannot_tell();

  if (r->misaligned.empty() && (!r->replayed || r->tokens_with_other == 0))
    return Outcome::pass("the rollout lies over the recorded tokens and layers: " + say::percent(r->overall) + " of the choices agree");
  Finding finding;
  finding.severity = r->replayed ? Severity::kError : Severity::kWarning;
  finding.message = say::percent(r->overall) + " of the experts of the training forward are the rollout's, and " +
                    say::percent(r->overall_chance) + " would be by chance.";
  if (!r->misaligned.empty()) {
    finding.message += " The array is misaligned: " + r->misaligned + "; laid so, " + say::percent(r->aligned) + " agree.";
  } else {
    finding.message += " The trace says that they were replayed, and no shift of tokens or layers explains it: " +
                       say::plural(r->tokens_with_other, "token", "tokens") + " differ in some layer.";
  }
  finding.evidence = {{"trace.rollout", say::count(r->training_tokens) + " tokens x " + say::count(r->training_layers) +
                       " layers, the rollout " + say::count(r->rollout_tokens) + " x " + say::count(r->rollout_layers), {r->rollout, 0, "", ""}}};
  finding.remedy = "Lay the array over the training forward so that row t is token t and column l is MoE layer l, then record again:\n    moe-audit check --trace " +
                   r->training + " --rollout " + r->rollout;
  finding.does_not_show = "Which side moved it.";
  finding.locations = {{r->rollout, 0, "", ""}};
  finding.sources = {"Rollout Routing Replay, arXiv 2510.11370"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_replayed_routing_misaligned;
const Rule rule_replayed_routing_misaligned = {
    .id = "TR025",
    .name = "replayed-routing-misaligned",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The experts of a rollout do not lie over the tokens and layers of the training forward.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
