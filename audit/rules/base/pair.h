// What the rules on a base and what was trained from it share.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/rules/say.h"

namespace moeaudit::pair {

/// Both sets of weights are known not to be there: the rules of this folder have no subject.
inline bool no_pair(Facts& f) {
  const bool* given = f.require(f->base_given);
  return given && !*given;
}
inline constexpr const char* kNoPair = "no weights of a base model beside weights trained from it";

inline bool trains_adapter(Facts& f) {
  const bool* adapter = f.want(f->has_adapter);
  return adapter && *adapter;
}

inline Location place_of(const BaseChanges& c, std::size_t row) { return {c.file[row], 0, "", c.tensor[row]}; }

/// ||W1 - W0|| / ||W0||.
inline double relative(const BaseChanges& c, std::size_t row) {
  return c.base_norm[row] > 0 ? c.change_norm[row] / c.base_norm[row] : (c.change_norm[row] > 0 ? INFINITY : 0.0);
}

/// "layer 0 experts 1, 5-7; layer 3 expert 2".
inline std::string by_layer(const std::map<int, std::vector<std::int64_t>>& experts) {
  std::string text;
  int shown = 0;
  for (const auto& [layer, list] : experts) {
    if (++shown > 8) return text + " and " + say::count(static_cast<std::int64_t>(experts.size()) - 8) + " more layers";
    text += (text.empty() ? "layer " : "; layer ") + std::to_string(layer) + (list.size() == 1 ? " expert " : " experts ") + to_text(list);
  }
  return text;
}

}  // namespace moeaudit::pair
