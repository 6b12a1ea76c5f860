// What a Python dict does with equal keys, for the JSON and the YAML tree alike.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "audit/text/text.h"

namespace moeaudit {

/// Positions of keys that are equal, in order, one group a key; only groups of two and more.
using EqualKeys = std::vector<std::vector<std::size_t>>;
EqualKeys equal_keys(const std::vector<std::string>& identity);

/// Leaves of each group the place of the first key and the value (and line) of the last.
void merge_equal_keys(const EqualKeys& groups, Node* map);

}  // namespace moeaudit
