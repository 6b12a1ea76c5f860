// What the rules about a recorded trace share: rows of the replay, and how they are told.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit::replay {

/// The replay, or nullptr with `otherwise` set: no trace was given, or it could not be replayed.
const ReplayTable* table(Facts& f, Outcome* otherwise);

/// The rows of a quantity, sorted by what became of them.
struct Rows {
  std::vector<std::size_t> differ, agree;
  std::string missing;  // of those that were not compared
  bool any() const { return !differ.empty() || !agree.empty() || !missing.empty(); }
};
Rows rows_of(const ReplayTable& t, std::string_view quantity);

/// Nothing differs: not applicable where there are no such rows (`none` says why), cannot_tell where none was compared,
/// else pass.
Outcome nothing_differs(Facts& f, const Rows& rows, std::string none, std::string pass);

std::string bands(double distance);                                                 // "31,000 bands"
std::string layers_of(const ReplayTable& t, const std::vector<std::size_t>& rows);  // "layers 0-3"
/// "It is A8, softmax of the softmax, within 0.3 bands; the next candidate, ..., is 4,000 bands off."
std::string named(const ReplayTable& t, std::size_t row);
Evidence evidence(const ReplayTable& t, std::size_t row);
Location where(const ReplayTable& t, std::size_t row);
Location head(const ReplayTable& t);  // trace.json
/// Version of a package in the trace: "0.23.0"; "" if it does not say.
std::string version_of(const ReplayTable& t, std::string_view package);

}  // namespace moeaudit::replay
