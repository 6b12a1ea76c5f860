#include "audit/rules/balance/aux_loss.h"

#include <algorithm>

namespace moeaudit::aux {

std::optional<std::string> no_subject(Facts& f) {
  const Balance* balance = f.require(f->balance);
  const bool* trains = f.require(f->router_trains);
  if (balance && *balance != Balance::kAuxLoss) return "this family's training code has no balance loss";
  if (trains && !*trains) return "no gradient updates the routers";
  return std::nullopt;
}

bool flag_is_dead(Facts& f) {
  const bool* flag = f.want(f->aux_flag);
  const AuxEffect* effect = f.want(f->aux_effect);
  if (!flag || !*flag || !effect || *effect == AuxEffect::kAdded) return false;
  if (*effect == AuxEffect::kCrash) return true;
  const double* coefficient = f.want(f->aux_coefficient);
  const bool* added = f.want(f->aux_added);
  // A trainer that passes output_router_logits as a keyword reaches a class that looks at nothing else.
  return !(coefficient && *coefficient == 0) && !(added && *added);
}

std::optional<bool> coefficient_is_default(Facts& f) {
  const Fact<double>& fact = f->aux_coefficient;
  if (!fact.known()) return std::nullopt;
  if (fact.origin() != Origin::kStated && fact.origin() != Origin::kAssumed) return true;
  if (fact.source().role == Role::kBaseModelConfig) return true;
  if (fact.source().role != Role::kCheckpointConfig) return false;
  // The config that a full fine-tune saves holds whatever was in force, chosen or not: it is a default if it says what
  // the base model or the config class says.
  const auto& shadowed = fact.shadowed();
  if (std::any_of(shadowed.begin(), shadowed.end(),
                  [&](const auto& s) { return s.source.role == Role::kBaseModelConfig && s.value == fact.value(); })) {
    return true;
  }
  if (const double* usual = f.want(f->aux_coefficient_default)) return *usual == fact.value();
  return std::nullopt;
}

std::string flag_key(Facts& f) {
  const std::string* key = f.want(f->aux_flag_key);
  return key ? *key : "output_router_logits";
}

std::string coefficient_key(Facts& f) {
  const std::string* key = f.want(f->aux_coefficient_key);
  return key ? *key : "router_aux_loss_coef";
}

}  // namespace moeaudit::aux
