// "# moe-audit: ignore[RULE] reason" in files, and the baseline file.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "audit/inputs/inputs.h"
#include "audit/inputs/readers.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

Material read(std::string_view text) {
  Material m;
  read_suppressions("c.yml", text, &m);
  return m;
}

TEST(Suppressions, SpeakOfTheirOwnLineOrOfTheNextThatIsNoComment) {
  const Material m = read(
      "a: 1  # moe-audit: ignore[BL001] measured, the load stays even\n"
      "# moe-audit: ignore[PR, GA001]: known\n"
      "# an ordinary comment\n"
      "\n"
      "b: 2\n"
      "#moe-audit: ignore-file[router-quantised] we serve it so\n");
  ASSERT_EQ(m.suppressions.size(), 3u);
  EXPECT_TRUE(m.problems.empty());
  EXPECT_EQ(m.suppressions[0].line, 1);
  EXPECT_EQ(m.suppressions[0].comment_line, 1);
  EXPECT_EQ(m.suppressions[0].rules, std::vector<std::string>{"BL001"});
  EXPECT_EQ(m.suppressions[0].reason, "measured, the load stays even");
  EXPECT_EQ(m.suppressions[1].line, 5);
  EXPECT_EQ(m.suppressions[1].comment_line, 2);
  EXPECT_EQ(m.suppressions[1].rules, (std::vector<std::string>{"PR", "GA001"}));
  EXPECT_EQ(m.suppressions[1].reason, "known");
  EXPECT_EQ(m.suppressions[2].line, 0);
}

TEST(Suppressions, OneWithoutReasonOrRuleSuppressesNothingAndSaysSo) {
  for (const char* text : {"a: 1  # moe-audit: ignore[BL001]\n", "a: 1  # moe-audit: ignore[] why\n", "a: 1 # moe-audit: ignore BL001 why\n",
                           "a: 1 # moe-audit: ignore[BL001 why\n", "a: 1 # moe-audit: skip[BL001] why\n"}) {
    const Material m = read(text);
    EXPECT_TRUE(m.suppressions.empty()) << text;
    ASSERT_EQ(m.problems.size(), 1u) << text;
    EXPECT_FALSE(m.problems[0].fatal);
    EXPECT_EQ(m.problems[0].line, 1);
  }
}

TEST(Suppressions, TextThatIsNoCommentIsNone) {
  const Material m = read("url: http://x#moe-audit: ignore[BL001] why\ntext: \"moe-audit: ignore[BL001] why\"\n# moe-auditing\n");
  EXPECT_TRUE(m.suppressions.empty());
  EXPECT_TRUE(m.problems.empty());
}

TEST(Suppressions, NoTextMakesThemFail) {
  std::string text = "# moe-audit: ignore[BL001] x";
  for (std::size_t cut = 0; cut <= text.size(); ++cut) read(std::string_view(text).substr(0, cut));
  read(std::string("# moe-audit: ignore[") + '\0' + "] \xff");
}

TEST(BaselineFile, IsReadAndRefusedWithPlace) {
  const test::TempTree tree;
  Baseline baseline;
  InputProblem problem;
  const std::string good = tree.write("b.json", R"({"baseline_version": 1, "findings": [
    {"rule": "BL001", "severity": "error", "file": "a.yml", "key": "k", "reason": "later"}]})");
  ASSERT_TRUE(read_baseline(good, &baseline, &problem)) << problem.what;
  ASSERT_EQ(baseline.entries.size(), 1u);
  EXPECT_EQ(baseline.entries[0].where.file, "a.yml");
  EXPECT_EQ(baseline.entries[0].severity, Severity::kError);
  EXPECT_EQ(baseline.entries[0].reason, "later");
  for (const char* text : {"", "[]", "{}", R"({"baseline_version": 2, "findings": []})", R"({"baseline_version": 1, "findings": {}})",
                           R"({"baseline_version": 1, "findings": [7]})", R"({"baseline_version": 1, "findings": [{"rule": "BL001"}]})",
                           "{\n \"findings\": tru}"}) {
    EXPECT_FALSE(read_baseline(tree.write("bad.json", text), &baseline, &problem)) << text;
    EXPECT_TRUE(problem.fatal);
  }
  EXPECT_EQ(problem.line, 2);
  EXPECT_FALSE(read_baseline(tree.path("none.json"), &baseline, &problem));
}

}  // namespace
}  // namespace moeaudit
