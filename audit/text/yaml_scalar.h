// What a YAML 1.1 scalar means to PyYAML: its implicit types (resolver.py) and their conversions (constructor.py).
#pragma once

#include <string>
#include <string_view>

#include "audit/text/text.h"

namespace moeaudit {

inline constexpr std::string_view kYamlTagPrefix = "tag:yaml.org,2002:";

/// The type a plain scalar has by its looks: "null", "bool", "int", "float", "timestamp", "merge", "value", "str".
/// The same words that a tag has after kYamlTagPrefix.
std::string_view yaml_implicit_type(std::string_view text);

/// Fills kind, boolean and text of `node` from a scalar of the given type. `implicit`: the type came from its looks.
/// False with `error` where PyYAML raises. A timestamp stays a string, but must be a date that exists.
bool yaml_construct_scalar(std::string_view type, std::string_view text, bool implicit, Node* node, std::string* error);

}  // namespace moeaudit
