// parse_yaml against what PyYAML's safe_load returned (fixtures/make/yaml_golden.py). MOE_AUDIT_YAML_GOLDEN names
// another golden file, for a run over many more random texts than are committed.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "audit/text/text.h"

namespace moeaudit {
namespace {

using nlohmann::json;

/// Empty if the tree is the value; else where and how it differs.
std::string difference(const Node& node, const json& want, const std::string& path) {
  const auto differs = [&](const std::string& what) { return path + ": " + what + ", want " + want.dump(); };
  if (want.is_null()) return node.is_null() ? "" : differs("not null");
  if (want.is_boolean()) return node.as_bool() == want.get<bool>() ? "" : differs("another boolean");
  if (want.is_string())
    return node.is_string() && node.text == want.get<std::string>() ? "" : differs("'" + node.text + "'");
  if (want.is_array()) {
    if (!node.is_list() || node.items.size() != want.size()) return differs("no list of that size");
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (std::string d = difference(node.items[i], want[i], path + "[" + std::to_string(i) + "]"); !d.empty())
        return d;
    }
    return "";
  }
  if (want.contains("date")) return node.is_string() ? "" : differs("no string for a date");
  if (want.contains("int")) {
    const std::string text = want["int"];
    if (!node.is_number()) return differs("not a number: '" + node.text + "'");
    if (text.size() < 19) return node.as_int() == std::stoll(text) ? "" : differs("'" + node.text + "'");
    return node.as_double() == std::strtod(text.c_str(), nullptr)
               ? ""
               : differs("'" + node.text + "'");  // as a float, at least
  }
  if (want.contains("float")) {
    const std::string text = want["float"];
    const double value = std::strtod(text.c_str(), nullptr);
    const std::optional<double> got = node.as_double();
    return got && (*got == value || (std::isnan(*got) && std::isnan(value))) ? "" : differs("'" + node.text + "'");
  }
  const json& pairs = want["map"];
  if (!node.is_map() || node.keys.size() != pairs.size() || node.items.size() != pairs.size())
    return differs("no mapping of that size");
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    if (pairs[i][0].is_string() && node.keys[i] != pairs[i][0].get<std::string>())
      return differs("key '" + node.keys[i] + "'");
    if (std::string d = difference(node.items[i], pairs[i][1], path + "." + node.keys[i]); !d.empty()) return d;
  }
  return "";
}

std::string check(const std::string& text, const json& want) {
  Node root;
  TextError error;
  const bool ok = parse_yaml(text, &root, nullptr, &error);
  if (ok != want["ok"].get<bool>()) {
    return ok ? "accepted, PyYAML raises " + want["why"].get<std::string>()
              : "refused (" + std::to_string(error.line) + ":" + std::to_string(error.column) + " " + error.what +
                    "), PyYAML reads " + want["value"].dump();
  }
  return ok ? difference(root, want["value"], "$") : error.what.empty() ? "refused without a reason" : "";
}

json golden() {
  const char* other = std::getenv("MOE_AUDIT_YAML_GOLDEN");
  std::ifstream in(other ? other : MOE_AUDIT_SOURCE_DIR "/fixtures/text/yaml_golden.json");
  return json::parse(in);
}

TEST(YamlGolden, EveryTextReadsAsPyYamlReadsIt) {
  const json all = golden();
  ASSERT_GE(all["cases"].size(), 2000u);
  int shown = 0, failed = 0;
  for (const json& one : all["cases"]) {
    const std::string text = one["yaml"];
    const std::string wrong = check(text, one);
    if (wrong.empty()) continue;
    ++failed;
    if (shown++ < 25) ADD_FAILURE() << "----\n" << text << "\n---- " << wrong;
  }
  EXPECT_EQ(failed, 0) << "of " << all["cases"].size();
}

TEST(YamlGolden, ShippedConfigsReadAsPyYamlReadsThem) {
  const json all = golden();
  ASSERT_GE(all["files"].size(), 30u);
  for (const json& one : all["files"]) {
    const std::string file = one["file"];
    std::string text, error;
    ASSERT_TRUE(read_file(MOE_AUDIT_SOURCE_DIR "/" + file, &text, &error)) << error;
    EXPECT_EQ(check(text, one), "") << file;
  }
}

}  // namespace
}  // namespace moeaudit
