// The balance loss: is it on, does anything add it, with which coefficient, and how accumulation scales it and the loss.
#include "audit/inputs/resolve_parts.h"

namespace moeaudit {
namespace {

/// TRL's SFT decides itself: since 1.7.0 its router_aux_loss_coef overwrites flag and coefficient of every model whose
/// config has the flag (trl/trainer/sft_trainer.py).
void apply_trl_override(Resolver& r) {
  FactSheet& f = r.facts;
  if (r.material.framework != "trl") return;
  for (const Setting& s : r.material.settings) {
    const auto value = s.name == "trl.router_aux_loss_coef" ? node_double(s.value) : std::nullopt;
    const bool default_of_the_field = s.source.role == Role::kTrainingArguments && value == 0.001;
    if (value && !default_of_the_field) f.aux_trainer_coefficient.set(*value, Resolver::origin_of(s.source), s.source);
  }
  f.aux_trainer_coefficient.set_if_unknown(0.0, Origin::kAbsent, r.material.framework_source);
  if (!f.aux_flag_key.known()) return;
  const BehaviourAnswer overrides = r.ask_about("trl", "overrides_aux_flag");
  if (!overrides.value || *overrides.value != "true") return;  // unknown: resolve_added() says so
  Fact<double> coefficient(&fact_info::aux_coefficient);
  r.apply(coefficient, "trl.router_aux_loss_coef", node_double);
  const BehaviourAnswer fallback = r.ask_about("trl", "default.router_aux_loss_coef");
  if (fallback.value && *fallback.value == "config") {
    // Since 1.14.0 the default is the model's own coefficient, and the flag follows from it.
    if (!coefficient.known() && f.aux_coefficient.known()) {
      f.aux_flag.set(f.aux_coefficient.value() != 0.0, Origin::kDerived, source_of(overrides));
    }
  } else if (fallback.value) {
    Node n;
    n.kind = Node::Kind::kString;
    n.text = *fallback.value;
    const auto value = node_double(n);
    // training_args.bin holds every field: a value equal to the default is no statement of the user.
    const bool silent = coefficient.known() && coefficient.source().role == Role::kTrainingArguments && value == coefficient.value();
    if (value && (!coefficient.known() || silent)) coefficient.set(*value, Origin::kFrameworkDefault, source_of(fallback));
  }
  if (!coefficient.known()) return;
  f.aux_coefficient.set(coefficient.value(), coefficient.origin(), coefficient.source());
  f.aux_flag.set(coefficient.value() != 0.0, Origin::kDerived, source_of(overrides));
}

void resolve_added(Resolver& r) {
  FactSheet& f = r.facts;
  const BehaviourAnswer effect = r.ask_about("transformers", "aux_flag_effect");
  if (effect.value) {
    for (AuxEffect e : {AuxEffect::kAdded, AuxEffect::kIgnored, AuxEffect::kCrash, AuxEffect::kKeywordOnly, AuxEffect::kNoField}) {
      if (*effect.value == name_of(e)) f.aux_effect.set(e, Origin::kFrameworkDefault, source_of(effect));
    }
  } else {
    f.aux_effect.explain_unknown(effect.why);
  }
  if (!f.balance.known() || f.balance.value() != Balance::kAuxLoss) return;
  if (!f.trainer.known()) {
    f.aux_added.explain_unknown("no file says which trainer runs");
    return;
  }
  const std::string& trainer = f.trainer.value();
  if (trainer != "Trainer" && trainer != "SFTTrainer") {
    const BehaviourAnswer path = r.ask_about(r.material.framework == "llama-factory" ? "llamafactory"
                                             : r.material.framework == "ms-swift"    ? "ms-swift"
                                                                                     : "trl",
                                             "aux_path");
    if (!path.value) {
      f.aux_added.explain_unknown(path.why.empty() ? "how " + trainer + " treats the balance loss is not known" : path.why);
      return;
    }
    if (*path.value == "none") {
      f.aux_added.set(false, Origin::kFrameworkDefault, source_of(path));
      return;
    }
  }
  if (r.material.framework == "trl" && f.aux_flag_key.known()) {
    const BehaviourAnswer overrides = r.ask_about("trl", "overrides_aux_flag");
    if (!overrides.value) {
      f.aux_added.explain_unknown("whether TRL overwrites the flag: " + overrides.why);
      return;
    }
  }
  // ms-swift adds the model's balance loss to the smoothed loss itself.
  if (f.label_smoothing.known() && f.label_smoothing.value() != 0.0 && r.material.framework != "ms-swift") {
    // Trainer takes the labels away before the forward, so the model cannot add its balance loss (trainer.py compute_loss).
    f.aux_added.set(false, Origin::kDerived, f.label_smoothing.source());
    return;
  }
  if (!f.aux_flag.known()) {
    f.aux_added.explain_unknown(f.aux_flag.why_unknown());
  } else if (!f.aux_flag.value()) {
    f.aux_added.set(false, Origin::kDerived, f.aux_flag.source());
  } else if (f.aux_effect.known()) {
    f.aux_added.set(f.aux_effect.value() == AuxEffect::kAdded, Origin::kDerived, f.aux_flag.source());
  } else {
    f.aux_added.explain_unknown(f.aux_effect.why_unknown());
  }
}

/// transformers' Trainer logs no balance loss of its own; TRL's trainers do, since some release.
void resolve_logged(Resolver& r) {
  FactSheet& f = r.facts;
  if (!f.trainer.known()) return;
  if (f.trainer.value() == "Trainer") {
    Source source = f.trainer.source();
    source.cite = "transformers src/transformers/trainer.py@v4.57.6 (no aux_loss in the file)";
    f.aux_logged.set(false, Origin::kFrameworkDefault, source);
    return;
  }
  const BehaviourAnswer logs = r.ask_about("trl", "logs_aux_loss");
  if (logs.value) f.aux_logged.set(*logs.value == "true", Origin::kFrameworkDefault, source_of(logs));
  else f.aux_logged.explain_unknown(logs.why.empty() ? "what " + f.trainer.value() + " logs is not known" : logs.why);
}

/// A formula of the closed set of the behaviours, over accumulation steps and world size.
struct Formula {
  bool times_ga = false, over_ga = false, times_w = false, valid = true;
};

Formula parse_formula(std::string_view text) {
  Formula f;
  if (text == "1") return f;
  if (text == "GA") f.times_ga = true;
  else if (text == "W") f.times_w = true;
  else if (text == "GA*W") f.times_ga = f.times_w = true;
  else if (text == "1/GA") f.over_ga = true;
  else f.valid = false;
  return f;
}

void resolve_factors(Resolver& r) {
  FactSheet& f = r.facts;
  if (!f.accumulation.known()) return;
  const double ga = static_cast<double>(f.accumulation.value());
  if (ga < 1) return;
  const bool engine_scales = f.deepspeed.known() && f.deepspeed.value();
  const std::string unmeasured = "DeepSpeed scales the loss itself, and no measured row covers it";

  const BehaviourAnswer loss = r.ask_about("transformers", "loss_factor");
  if (ga == 1) {
    f.loss_factor.set(1.0, Origin::kDerived, f.accumulation.source());
  } else if (engine_scales) {
    f.loss_factor.explain_unknown(unmeasured);
  } else if (!loss.value || !loss.measured) {
    f.loss_factor.explain_unknown(loss.why.empty() ? "no measured row covers this stack" : loss.why);
  } else if (const Formula formula = parse_formula(*loss.value); formula.valid && !formula.times_w) {
    f.loss_factor.set(formula.times_ga ? ga : formula.over_ga ? 1 / ga : 1.0, Origin::kDerived, source_of(loss));
  }

  // TRL's own rows first: since 1.16.0 it divides the balance loss by the accumulation steps itself; "transformers" means
  // that the model adds the loss and the rows of transformers hold.
  BehaviourAnswer aux = r.ask_about(r.material.framework == "trl" ? "trl" : "transformers", "aux_multiplier");
  if (aux.value && *aux.value == "transformers") aux = r.ask_about("transformers", "aux_multiplier");
  if (engine_scales) {
    f.aux_multiplier.explain_unknown(unmeasured);
  } else if (!aux.value || !aux.measured) {
    f.aux_multiplier.explain_unknown(aux.why.empty() ? "no measured row covers this stack" : aux.why);
  } else if (const Formula formula = parse_formula(*aux.value); formula.valid) {
    const double by_ga = formula.times_ga ? ga : formula.over_ga ? 1 / ga : 1.0;
    const bool w_counts = formula.times_w && (!f.average_tokens.known() || f.average_tokens.value());
    f.aux_multiplier_at_least.set(by_ga, Origin::kDerived, source_of(aux));
    if (!w_counts) {
      f.aux_multiplier.set(by_ga, Origin::kDerived, source_of(aux));
    } else if (f.world_size.known()) {
      f.aux_multiplier.set(by_ga * static_cast<double>(f.world_size.value()), Origin::kDerived, source_of(aux));
    } else {
      f.aux_multiplier.explain_unknown("the multiplier is " + *aux.value + " and the number of processes is unknown");
    }
  }
  if (f.aux_multiplier.known() && f.aux_coefficient.known()) {
    f.aux_effective.set(f.aux_coefficient.value() * f.aux_multiplier.value(), Origin::kDerived, f.aux_multiplier.source());
  }
}

}  // namespace

void resolve_balance(Resolver& r) {
  apply_trl_override(r);
  resolve_added(r);
  resolve_logged(r);
  resolve_factors(r);
}

}  // namespace moeaudit
