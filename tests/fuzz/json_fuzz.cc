// parse_json on any bytes; where nlohmann/json reads the same language, both must agree on it and on every value.
#include <nlohmann/json.hpp>

#include "audit/text/text.h"
#include "tests/fuzz/fuzz.h"

using moeaudit::Node;
using nlohmann::json;

namespace {

bool same(const Node& node, const json& value) {
  if (value.is_null()) return node.is_null();
  if (value.is_boolean()) return node.as_bool() == value.get<bool>();
  if (value.is_string()) return node.is_string() && node.text == value.get<std::string>();
  if (value.is_number_unsigned()) return node.as_double() == value.get<double>();
  if (value.is_number_integer()) return node.as_int() == value.get<std::int64_t>();
  if (value.is_number()) return node.as_double() == value.get<double>();
  if (node.items.size() != value.size() || node.is_map() != value.is_object()) return false;
  for (std::size_t i = 0; i < node.items.size(); ++i) {
    if (node.is_map() ? !value.contains(node.keys[i]) : false) return false;
    if (!same(node.items[i], node.is_map() ? value.at(node.keys[i]) : value[i])) return false;
  }
  return true;
}

/// NaN and Infinity, a byte order mark, NUL, and a number beyond double: read differently there, and meant to be.
bool same_language(std::string_view text) {
  return text.find("NaN") == text.npos && text.find("Infinity") == text.npos && !text.starts_with("\xEF") &&
         text.find('\0') == text.npos;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view text = as_text(data, size);
  Node root;
  std::vector<moeaudit::DuplicateKey> duplicates;
  moeaudit::TextError error;
  moeaudit::TextLimits limits;
  limits.max_nodes = 100'000;
  const bool ok = moeaudit::parse_json(text, &root, &duplicates, &error, limits);
  FUZZ_REQUIRE(ok || (!error.what.empty() && error.line >= 1 && error.column >= 1));
  if (!same_language(text)) return 0;
  const bool bounded = !ok && (error.what.starts_with("nested deeper") || error.what.starts_with("more than"));
  json other;
  try {
    other = json::parse(text);
  } catch (const json::out_of_range&) {
    return 0;  // 1e999
  } catch (const json::exception&) {
    FUZZ_REQUIRE(!ok);
    return 0;
  }
  FUZZ_REQUIRE(ok || bounded);
  FUZZ_REQUIRE(!ok || same(root, other));
  return 0;
}
