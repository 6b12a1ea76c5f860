// LG002: the trainer should have logged the balance loss, and the log has none.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The resolved configuration adds the balance loss, the trainer logs `aux_loss` at this release whenever it does so
(TRL's SFTTrainer since 0.26, its DPOTrainer from 0.19 to 0.28 and since 1.8), and the log has training losses and no
`aux_loss`. Or the log has `aux_loss`, whoever wrote it, and it is exactly 0 throughout. (Megatron-LM prints
`load_balancing_loss: 0` beside the sequence or global loss that it trains on; then that one is read.)

## Why it matters
The log is the run's own word: the loss was not added. In the Hugging Face form it cannot be 0, its least value is k
under uniform routing (arXiv 2101.03961 equation 4, times k). What is missing may be the flag (a wrapped model whose
config the trainer does not see: huggingface/trl issue 2197, DPO under DeepSpeed), or the code is another one than the
version says.

## How to fix
Print `trainer.aux_loss_enabled` before training, and state the flag on the config of the language model.

## Limits
transformers' own Trainer logs no balance loss at any release; then this rule does not apply, and BL001 judges from the
configuration. A log that another tool has cut is not recognised as such.
)md";

Outcome check(Facts& f) {
  const bool* added = f.want(f->aux_added);
  if (added && !*added) return Outcome::not_applicable("nothing adds the balance loss to the loss (BL001, BL005)");
  const LogTable* log = f.want(f->log);
  std::int64_t losses = 0, aux = 0, zero = 0;
  std::size_t first = 0;
  for (std::size_t i = 0; log && i < log->step.size(); ++i) {
    if (!log->has_loss[i]) continue;
    if (losses++ == 0) first = i;
    aux += log->has_aux_loss[i] != 0;
    zero += log->has_aux_loss[i] != 0 && log->aux_loss[i] == 0.0;
  }
  const bool* logged = f.want(f->aux_logged);
  if (logged && !*logged && aux == 0) return Outcome::not_applicable("this trainer logs no balance loss" + say::at(f->trainer.source()));
  const bool* trains = f.want(f->router_trains);
  if (trains && !*trains && !logged) return Outcome::not_applicable("the routers do not train");
  f.require(f->aux_added);
  if (aux == 0) f.require(f->aux_logged);  // a log that has it needs no release that says so
  f.require(f->log);
  if (f.missing()) return f.cannot_tell();
  if (losses == 0) return Outcome::not_applicable("the log holds no training loss");
  if (aux > zero) return Outcome::pass("aux_loss is in the log, and not 0");

  const Location where{log->file, log->line[first], aux == 0 ? "loss" : "aux_loss", ""};
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = (aux == 0 ? "None of " + say::plural(losses, "log entry", "log entries") + " with a loss has aux_loss"
                              : "aux_loss is exactly 0 in all " + say::plural(aux, "log entry", "log entries") + " that have it") +
                    ", although this configuration adds the balance loss and " + (f->trainer.known() ? f->trainer.value() : "the trainer") +
                    " logs it" + (logged && *logged ? " at this release" : "") + ": it was not added.";
  finding.evidence = {{"log.history entries with loss", std::to_string(losses), where},
                      {"log.history entries with aux_loss", std::to_string(aux), where},
                      say::evidence(f->aux_added)};
  if (logged) finding.evidence.push_back(say::evidence(f->aux_logged));
  finding.remedy = "Look at what the trainer sees, on the object that it trains:\n    print(trainer.aux_loss_enabled, "
                   "trainer.model.config.get_text_config().output_router_logits)\nand state it. " +
                   say::model_config(f, {{"output_router_logits", "true"}});
  finding.does_not_show = "Why: a wrapped model, another release than the files say, or a flag on the wrong config.";
  finding.locations = {where};
  finding.sources = say::sources({f->aux_logged.source().cite, "huggingface/trl issue 2197"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_aux_loss_absent_from_log;
const Rule rule_aux_loss_absent_from_log = {
    .id = "LG002",
    .name = "aux-loss-absent-from-log",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The trainer logs the balance loss at this release, and the log has none.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
