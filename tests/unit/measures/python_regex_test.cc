// PythonRegex against Python's own `re` (fixtures/make/python_regex_golden.py), and its bounds.
#include "audit/measures/python_regex.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

namespace moeaudit {
namespace {

constexpr std::int64_t kSteps = 10'000'000;

/// Valid Python that is refused here, each with the construct it must be refused for. Nothing else may be.
const std::map<std::string, std::string> kUnsupported = {
    {R"(.*(?<!shared_expert)\.up_proj)", "lookbehind (?<!"}, {"a(?#comment)b", "group (?#"}, {"a*+", "possessive quantifier"},
    {"a++", "possessive quantifier"}, {"(?>a)b", "group (?>"}, {R"((a)\1)", R"(backreference \1)"}, {R"(\0)", R"(escape \0)"},
    {R"(\u0061)", R"(escape \u)"}, {"(?P<x>a)(?P=x)", "group (?P"}, {"(?a)a", "group (?a"}, {"(?i:a)", "group (?i"},
    {"(?x) a b", "group (?x"}, {"(?s).", "group (?s"}, {"(?m)^", "group (?m"}, {"(?<=a)b", "lookbehind (?<="}, {"(?<!a)b", "lookbehind (?<!"},
    {"(a)?(?(1)b|c)", "group (?("}, {"\u00e9", "a non-ASCII character"},
};
/// Invalid in Python, but refused here as unsupported before the fault is seen.
const std::set<std::string> kInvalidButUnsupported = {R"(\1)", "(?", "a(?i)"};

std::vector<std::size_t> matches(const PythonRegex& regex, const nlohmann::json& texts, bool full) {
  std::vector<std::size_t> hits;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    std::int64_t steps = kSteps;
    const std::string text = texts[i];
    const RegexAnswer answer = full ? regex.full_match(text, &steps) : regex.match(text, &steps);
    EXPECT_NE(answer, RegexAnswer::kGaveUp);
    if (answer == RegexAnswer::kYes) hits.push_back(i);
  }
  return hits;
}

TEST(PythonRegex, AgreesWithPython) {
  std::ifstream file(MOE_AUDIT_SOURCE_DIR "/fixtures/text/python_regex_golden.json");
  const auto golden = nlohmann::json::parse(file);
  std::size_t compared = 0, unsupported = 0;
  for (const auto& set : golden["sets"]) {
    for (const auto& row : set["rows"]) {
      const std::string pattern = row["pattern"];
      SCOPED_TRACE(pattern);
      RegexError error;
      const auto regex = PythonRegex::compile(pattern, &error);
      if (const auto known = kUnsupported.find(pattern); known != kUnsupported.end()) {
        ASSERT_FALSE(regex);
        EXPECT_FALSE(error.invalid);
        EXPECT_EQ(error.what, known->second);
        ++unsupported;
      } else if (row.contains("error")) {
        ASSERT_FALSE(regex) << "Python: " << row["error"];
        EXPECT_EQ(error.invalid, kInvalidButUnsupported.count(pattern) == 0) << error.what;
      } else {
        ASSERT_TRUE(regex) << error.what;
        EXPECT_EQ(matches(*regex, set["texts"], false), row["match"].get<std::vector<std::size_t>>());
        EXPECT_EQ(matches(*regex, set["texts"], true), row["fullmatch"].get<std::vector<std::size_t>>());
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 1500u);
  EXPECT_EQ(unsupported, kUnsupported.size());
}

TEST(PythonRegex, NamesTheFaultAndItsPlace) {
  RegexError error;
  EXPECT_FALSE(PythonRegex::compile(".*(?<!gate)", &error));
  EXPECT_EQ(error.position, 2u);
  EXPECT_FALSE(PythonRegex::compile("abc)", &error));
  EXPECT_TRUE(error.invalid);
  EXPECT_EQ(error.position, 3u);
}

// Exponential in a backtracking matcher: 2^64 paths.
TEST(PythonRegex, NestedQuantifiersStayPolynomial) {
  RegexError error;
  const std::string text(64, 'a');
  for (const char* pattern : {"(a+)+b", "(a*)*b", "(a|a)*b", "(a|aa)+b", "((a+)+)+b", "(?=(a+)+b).*"}) {
    const auto regex = PythonRegex::compile(pattern, &error);
    ASSERT_TRUE(regex) << pattern;
    std::int64_t steps = 100'000;
    EXPECT_EQ(regex->full_match(text, &steps), RegexAnswer::kNo) << pattern;
  }
}

TEST(PythonRegex, BudgetAndSizesAreBounded) {
  RegexError error;
  const auto regex = PythonRegex::compile(".*.*.*.*x", &error);
  ASSERT_TRUE(regex);
  std::int64_t steps = 50;
  EXPECT_EQ(regex->full_match(std::string(100, 'a'), &steps), RegexAnswer::kGaveUp);
  steps = kSteps;
  EXPECT_EQ(regex->full_match("mod\xc3\xa8le", &steps), RegexAnswer::kGaveUp);

  EXPECT_FALSE(PythonRegex::compile("(a{1000}){1000}", &error));
  EXPECT_FALSE(error.invalid);
  EXPECT_FALSE(PythonRegex::compile(std::string(200, '(') + std::string(200, ')'), &error));
  EXPECT_EQ(error.what, "groups nested deeper than 100");
  EXPECT_FALSE(PythonRegex::compile(std::string(20000, 'a'), &error));
  EXPECT_EQ(error.what, "a pattern of more than 10,000 characters");
  EXPECT_TRUE(PythonRegex::compile("a{1000}", &error));
}

}  // namespace
}  // namespace moeaudit
