// The numbers of the model under audit, as families/family.h wants them.
#pragma once

#include <string>

#include "audit/facts/fact_sheet.h"
#include "audit/families/family.h"

namespace moeaudit {

/// Numbers from a config.json are not trusted: more tensors than this are not listed (the largest released models have
/// about 100,000).
inline constexpr std::int64_t kMaxListedExperts = 2'000'000;  // experts x layers

/// False with `why` if layers, MoE layers, experts or hidden size are unknown or absurd. Shared width and vocabulary stay 0.
inline bool model_shape(const FactSheet& f, FamilyShape* shape, std::string* why) {
  auto need = [&](const auto& fact) {
    if (fact.known()) return true;
    *why = std::string(fact.info().name) + " is not known" + (fact.why_unknown().empty() ? "" : ": " + fact.why_unknown());
    return false;
  };
  if (!need(f.num_layers) || !need(f.moe_layers) || !need(f.num_experts) || !need(f.hidden_size)) return false;
  shape->layers = f.num_layers.value();
  shape->experts = f.num_experts.value();
  shape->hidden = f.hidden_size.value();
  shape->expert_width = f.expert_width.known() ? f.expert_width.value() : 0;
  shape->moe_layers = f.moe_layers.value();
  shape->encoder_layers = f.encoder_layers.known() ? f.encoder_layers.value() : 0;
  shape->extra_rows = f.extra_rows.known() ? f.extra_rows.value() : 0;
  shape->expert_input = f.expert_input.known() ? f.expert_input.value() : 0;
  const bool sane = shape->layers >= 0 && shape->experts >= 0 && shape->layers <= kMaxListedExperts &&
                    (shape->layers == 0 || shape->experts <= kMaxListedExperts / shape->layers);
  if (!sane) {
    *why = "the configuration says " + std::to_string(shape->experts) + " experts in " + std::to_string(shape->layers) +
           " layers: more than moe-audit lists";
  }
  return sane;
}

}  // namespace moeaudit
