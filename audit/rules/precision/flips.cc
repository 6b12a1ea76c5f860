#include "audit/rules/precision/flips.h"

#include "audit/rules/say.h"

namespace moeaudit::precision {

std::optional<Flips> measured(Facts& f, std::string_view mode) {
  const PrecisionTable* table = f.want(f->router_precision);
  if (!table) return std::nullopt;
  std::optional<Flips> worst;
  for (std::size_t i = 0; i < table->mode.size(); ++i) {
    if (table->mode[i] != mode) continue;
    if (!worst) worst.emplace();
    if (worst->layer < 0 || table->flipped[i] > worst->share) {
      worst->layer = table->layer[i];
      worst->tensor = table->tensor[i];
      worst->share = table->flipped[i];
      worst->low = table->low[i];
      worst->high = table->high[i];
      worst->tokens = table->tokens[i];
    }
    if (table->overflowed[i] > 0 && worst->overflowed == 0) {
      worst->overflow_tensor = table->tensor[i];
      worst->max_abs_logit = table->max_abs_logit[i];
    }
    worst->overflowed += table->overflowed[i];
  }
  if (worst) worst->input = table->input;
  return worst;
}

std::optional<Flips> executed_or(Facts& f, std::string_view otherwise) {
  std::optional<Flips> flips = measured(f, "executed");
  return flips ? flips : measured(f, otherwise);
}

std::string sentence(const std::optional<Flips>& flips) {
  if (!flips) {
    return "How many tokens change experts was not measured: it needs the model's weights (--model DIR) and no "
           "--static.";
  }
  return "In layer " + std::to_string(flips->layer) + ", the worst, " + say::percent(flips->share) + " of " +
         say::count(flips->tokens) + " tokens get other experts than in float64 (95 % interval " +
         say::percent(flips->low) + " to " + say::percent(flips->high) + "; " + flips->input + ").";
}

void add_evidence(const std::optional<Flips>& flips, Finding* finding) {
  if (!flips) return;
  Location where;
  where.tensor = flips->tensor;
  finding->evidence.push_back({"tokens with other experts than in float64", say::percent(flips->share), where});
  finding->evidence.push_back({"95 % interval", say::percent(flips->low) + " to " + say::percent(flips->high), where});
  finding->evidence.push_back({"tokens measured", say::count(flips->tokens), where});
}

}  // namespace moeaudit::precision
