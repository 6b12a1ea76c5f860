// What the rules of the balance loss (BL001, BL002, BL004, BL005, BL006) have in common.
#pragma once

#include <optional>
#include <string>

#include "audit/facts/finding.h"

namespace moeaudit::aux {

/// Why a rule about the balance loss of a trained router has no subject, if facts prove it: the router is frozen, or
/// this family's training code has no balance loss. Requires both facts.
std::optional<std::string> no_subject(Facts& f);

/// BL005's condition: the flag resolves to true, a loss is asked for, and this class ignores the flag or crashes on it.
/// False where facts are missing. BL001 leaves these cases to BL005.
bool flag_is_dead(Facts& f);

/// The coefficient was not chosen with this run in mind: a default of class or framework, or it came with the model.
/// Empty where the config that the run saved gives a number that nothing tells from a choice.
std::optional<bool> coefficient_is_default(Facts& f);

std::string flag_key(Facts& f);         // "output_router_logits"
std::string coefficient_key(Facts& f);  // "router_aux_loss_coef"

}  // namespace moeaudit::aux
