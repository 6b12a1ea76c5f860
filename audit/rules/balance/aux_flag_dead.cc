// BL005: the flag is on and this class ignores it or crashes on it.
#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
`output_router_logits` resolves to true, and at this version the class does nothing with it, or stops the training
on it.

## Why it matters
The config says that a balance loss is trained, and none is. Found by setting the flag on every MoE class of two
releases and reading loss and gate gradient of a training step (fixtures/oracle/aux_flag.json): Llama 4 has both
keys and reads neither (4.57.6 and 5.23.0; huggingface/transformers issue 48889), JetMoE ignored the flag in 4.57.6
and adds the loss in 5.23.0, DeepSeek-V3 accepts the flag in 5.23.0 and has no loss behind it. Some multimodal
classes look at the forward keyword only, so the config cannot switch the loss on (issue 48885).

## How to fix
Say what runs: switch the flag off, or move to a version whose class adds the loss.

## Limits
Silent where a trainer passes the keyword itself, and where the coefficient is 0 and nothing was asked for. A class
that has the loss but whose trainer leaves it out is BL001's.
)md";

const char* what_happens(AuxEffect effect) {
  switch (effect) {
    case AuxEffect::kCrash: return "stops with an exception on it in training";
    case AuxEffect::kKeywordOnly: return "looks at the forward keyword only, which nobody passes";
    case AuxEffect::kNoField: return "has no such field";
    default: return "has the field and ignores it";
  }
}

Outcome check(Facts& f) {
  const Balance* balance = f.require(f->balance);
  if (balance && *balance != Balance::kAuxLoss && !f.want(f->aux_flag)) {
    return Outcome::not_applicable("this family has no balance loss and nothing switches one on");
  }
  const bool* flag = f.require(f->aux_flag);
  if (flag && !*flag) return Outcome::not_applicable(aux::flag_key(f) + " is false" + say::at(f->aux_flag.source()));
  const AuxEffect* effect = f.require(f->aux_effect);
  if (!flag || !effect) return f.cannot_tell();
  if (*effect == AuxEffect::kAdded) return Outcome::pass("this class adds the balance loss when the flag is on");
  if (!aux::flag_is_dead(f)) return Outcome::pass("nothing relies on the flag of the config here");

  const std::string* name = f.want(f->model_class);
  const std::string* family = f.want(f->family);
  const VersionSet* version = f.want(f->transformers);
  const std::string who = (name     ? *name
                           : family ? *family
                                    : "this class") +
                          (version ? " of transformers " + to_text(*version) : "");
  const std::string key = aux::flag_key(f);
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = key + " is true" + say::at(f->aux_flag.source()) + ", and " + who + " " + what_happens(*effect) +
                    (*effect == AuxEffect::kCrash ? "." : ": no balance loss is trained.");
  finding.evidence = {say::evidence(f->aux_flag), say::evidence(f->aux_effect)};
  if (f.want(f->aux_coefficient)) finding.evidence.push_back(say::evidence(f->aux_coefficient));
  if (version) finding.evidence.push_back(say::evidence(f->transformers));
  finding.remedy = "Say what runs. " + say::model_config(f, {{key, "false"}, {aux::coefficient_key(f), "0"}});
  finding.does_not_show =
      "That the experts are unevenly loaded; only that the loss which should balance them is not there.";
  finding.locations = {location_of(f->aux_flag.source())};
  finding.sources = say::sources({f->aux_effect.source().cite, "fixtures/oracle/aux_flag.json"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_aux_flag_dead;
const Rule rule_aux_flag_dead = {
    .id = "BL005",
    .name = "aux-flag-dead",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "The flag of the balance loss is on, and this class ignores it or crashes on it.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
