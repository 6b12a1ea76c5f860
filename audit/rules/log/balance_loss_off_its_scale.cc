// LG006: the level of the logged balance loss is not that of the form which the family has.
#include <cmath>

#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Where aux_loss levels off (the median of the second half of 3 entries or more) against what uniform routing gives in
this family: k in the Hugging Face form, 1 in the form of Switch and Megatron-LM. Routing can raise it to E / k times
that, when all tokens share k experts. A level above that, or under 0.9 of uniform, is another scale: the sum over
layers, micro-batches or processes, the other form, or a value that holds the coefficient already. All that fit are
named. And: a value below 0.

## Why it matters
A coefficient means something only with its form. 0.01 of the form that gives 1 is 0.01 / k of the form that gives k:
k = 8 taken for the other is a balance loss 8 times too weak or too strong. A log that sums over the micro-batches
grows with the accumulation (InternLM/xtuner pull request 1101), one that divides by dense layers too shrinks with
them (NVIDIA/Megatron-LM pull request 2197). Below 0 no sum of loads times probabilities can lie: the log holds logits
(NVIDIA-NeMo/Automodel issue 1559) or a signed surrogate (marin-community/marin issue 3124).

## How to fix
Mostly nothing, but read the log and choose the coefficient on the scale that it has.

## Limits
A note: the level alone never shows a fault, and the gradient may be right where the log is not. Below uniform is
possible, where loads and probabilities are ordered against each other or choices are biased, limited to groups or
dropped (a loss of 0.885 from four tokens and two experts). Within E / k of uniform the scale cannot be told from
imbalance, and the rule passes, but for a Megatron-LM log with recomputation at twice uniform, where it names both
(NVIDIA/Megatron-LM issue 1330); `moe-audit compare` with a log without recomputation tells.
)md";

struct Scale {
  std::string text, what;
  double value;
};

std::vector<Scale> scales_of(Facts& f, double uniform) {
  std::vector<Scale> all;
  const auto number = [&](const Fact<std::int64_t>& fact) {
    return f.want(fact) ? static_cast<double>(fact.value()) : 0.0;
  };
  const double m = number(f->accumulation), w = number(f->world_size), k = number(f->top_k),
               layers = number(f->num_layers);
  const std::vector<std::int64_t>* moe = f.want(f->moe_layers);
  const double l = moe ? static_cast<double>(moe->size()) : 0;
  const double* c = f.want(f->aux_coefficient);
  const auto add = [&](std::string text, std::string what, double value) {
    if (value > 0 && std::isfinite(value) && std::abs(value - 1) > 1e-9)
      all.push_back({std::move(text), std::move(what), value});
  };
  if (uniform > 1) add("1 / k", "divided by k, as Switch and Megatron-LM do", 1 / k);
  add("L", "summed over the " + say::number(l) + " MoE layers", l);
  add("M", "summed over the " + say::number(m) + " accumulation steps", m);
  add("W", "summed over the " + say::number(w) + " processes", w);
  add("M W", "summed over accumulation steps and processes", m * w);
  add("1 / M", "divided by the accumulation steps", 1 / m);
  add("L / layers", "averaged over all " + say::number(layers) + " layers, dense ones too",
      layers > 0 ? l / layers : 0);
  if (c && *c > 0) {
    add("coefficient", "already multiplied by the coefficient", *c);
    if (uniform > 1) add("coefficient / k", "divided by k and multiplied by the coefficient", *c / k);
  }
  return all;
}

Outcome check(Facts& f) {
  const LogTable* log = f.require(f->log);
  if (f.missing()) return f.cannot_tell();
  const LogColumns* columns = f.require(f->log_columns);
  if (f.missing()) return f.cannot_tell();
  std::size_t aux = 0;
  while (aux < columns->name.size() && columns->name[aux] != "aux_loss") ++aux;
  if (aux == columns->name.size()) return Outcome::not_applicable("the log holds no balance loss");
  const double level = columns->level[aux], least = columns->least[aux];

  Finding finding;
  const Location where{log->file, columns->line[aux], "aux_loss", ""};
  finding.severity = Severity::kNote;
  finding.locations = {where};
  finding.evidence = {{"log.history aux_loss, level", say::number(level), where},
                      {"log.history aux_loss, least", say::number(least), where}};
  finding.does_not_show = "That the loss which is trained on has this scale: the log may be computed apart from it.";
  finding.sources = {"arXiv 2101.03961 equation 4", "InternLM/xtuner pull request 1101",
                     "NVIDIA/Megatron-LM pull request 2197", "NVIDIA-NeMo/Automodel issue 1559",
                     "marin-community/marin issue 3124"};
  if (least < 0) {
    finding.severity = Severity::kWarning;
    finding.message = "aux_loss is " + say::number(least) +
                      " at its least: loads times probabilities cannot be negative. It is made of logits, "
                      "or it is another loss.";
    finding.remedy = "Make it of probabilities:\n    P = torch.softmax(router_logits.float(), -1).mean(0)";
    return Outcome::finding(std::move(finding));
  }
  if (columns->entries[aux] < 3) return Outcome::not_applicable("the log has fewer than three values of aux_loss");
  if (level == 0) return Outcome::not_applicable("aux_loss is 0 (LG002)");
  const double* uniform = f.require(f->aux_uniform_value);
  if (f.missing()) return f.cannot_tell();
  const std::int64_t *k = f.want(f->top_k), *e = f.want(f->num_experts);
  const double most = k && e && *k > 0 && *e > *k ? static_cast<double>(*e) / static_cast<double>(*k) : 1e300;
  const double ratio = level / *uniform;
  const bool* recompute = f.want(f->gradient_checkpointing);
  if (recompute && *recompute && f->gradient_checkpointing.source().role == Role::kTrainerState && ratio > 1.97 &&
      ratio < 2.3) {
    finding.message = "aux_loss levels off at " + say::number(level) + ", twice the " + say::number(*uniform) +
                      " of uniform routing, and activations are recomputed" +
                      say::at(f->gradient_checkpointing.source()) +
                      ": Megatron-LM before core 0.12 counts it once more in the recomputation. Only the log "
                      "is doubled then; the coefficient is right as it is.";
    finding.evidence.push_back(say::evidence(f->gradient_checkpointing));
    finding.remedy =
        "Leave the coefficient, and see it in a short run without:\n    moe-audit compare WITHOUT.log WITH.log";
    finding.does_not_show = "That it is the log: a routing twice as uneven as uniform gives the same number.";
    return Outcome::finding(std::move(finding));
  }
  if (ratio >= 0.9 && ratio <= 1.02 * most) {
    return Outcome::pass("aux_loss levels off at " + say::number(level) + ", " + say::number(ratio) + " times the " +
                         say::number(*uniform) + " of uniform routing in this form");
  }
  const double above = ratio > 1 ? most : 1.5;  // how far imbalance may have raised what a scale gives
  std::string names;
  for (const Scale& s : scales_of(f, *uniform)) {
    if (ratio / s.value < 0.97 || ratio / s.value > above) continue;
    names += (names.empty() ? "" : ", or ") + s.what + " (" + s.text + " = " + say::number(s.value) + ")";
  }
  finding.message = "aux_loss levels off at " + say::number(level) + ", where uniform routing gives " +
                    say::number(*uniform) + " in this family's form" +
                    (ratio > 1 ? " and no routing more than " + say::number(most * *uniform) : "") + ": " +
                    (!names.empty() ? "the logged value is " + names + "."
                     : ratio > 1    ? "no setting that is known explains the factor."
                                 : "choices that are biased, limited to groups or dropped give less than uniform, or "
                                   "the log has a scale of its own.");
  finding.evidence.push_back(say::evidence(f->aux_uniform_value));
  finding.remedy = "Read it on the family's scale, and the coefficient with it:\n    aux_loss * " +
                   say::literal(1 / ratio) + "  # about " + say::number(*uniform) + " at balance";
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_off_its_scale;
const Rule rule_balance_loss_off_its_scale = {
    .id = "LG006",
    .name = "balance-loss-off-its-scale",
    .since = "0.3.0",
    .severity = Severity::kNote,
    .summary = "The logged balance loss levels off where its form cannot, or is negative.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
