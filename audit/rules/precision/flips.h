// What the router-precision measure says of one mode, for the rules that print it (PR001, PR002, PR004, QU001).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "audit/facts/finding.h"

namespace moeaudit::precision {

/// The layer where most tokens change experts in this mode.
struct Flips {
  int layer = -1;
  std::string tensor;
  double share = 0, low = 0, high = 0;
  std::int64_t tokens = 0;
  std::int64_t overflowed = 0;  // over all layers
  std::string overflow_tensor;  // first router with an overflow
  double max_abs_logit = 0;     // of that router, float64
  std::string input;
};

/// Wants router.precision. Empty without a measurement of `mode`.
std::optional<Flips> measured(Facts& f, std::string_view mode);

/// Rows of "executed" are the order the family really uses; `otherwise` stands in where it was not replayed.
std::optional<Flips> executed_or(Facts& f, std::string_view otherwise);

/// "In layer 3, 1.2 % of 4,096 tokens change experts (95 %: 0.9 to 1.6 %; probe: ...)."; without a measurement, that
/// there is none and which input would give it.
std::string sentence(const std::optional<Flips>& flips);

/// Appends share, interval and tokens.
void add_evidence(const std::optional<Flips>& flips, Finding* finding);

}  // namespace moeaudit::precision
