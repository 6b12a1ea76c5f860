#include "audit/engine/suppress.h"

#include <gtest/gtest.h>

#include "audit/engine/engine.h"

namespace moeaudit {
namespace {

Finding finding(Severity severity, Location where) {
  Finding f;
  f.severity = severity;
  f.message = "m";
  f.locations = {std::move(where)};
  return f;
}

RunResult run_with(std::vector<Finding> findings) {
  RunResult run;
  run.rules.push_back({"BL001", "aux-loss-not-in-loss", Outcome::findings_or_pass(std::move(findings))});
  return run;
}

Suppression comment(std::string rule, std::string file, int line) {
  return {std::move(file), line, line, {std::move(rule)}, "meant"};
}

TEST(Suppress, ACommentTakesWhatItsLineAndRuleName) {
  const Location here{"a.yml", 4, "k", ""};
  for (const char* rule : {"BL001", "BL", "aux-loss-not-in-loss"}) {
    RunResult run = run_with({finding(Severity::kError, here), finding(Severity::kError, {"a.yml", 9, "j", ""})});
    const std::vector<Suppression> comments = {comment(rule, "a.yml", 4)};
    suppress(&run, comments, {});
    ASSERT_EQ(run.rules[0].outcome.findings.size(), 1u) << rule;
    EXPECT_EQ(run.rules[0].outcome.findings[0].locations[0].line, 9);
    ASSERT_EQ(run.suppressed.size(), 1u);
    EXPECT_EQ(run.suppressed[0].reason, "meant");
    EXPECT_EQ(run.suppressed[0].by.line, 4);
    EXPECT_TRUE(run.problems.empty());
  }
  RunResult whole = run_with({finding(Severity::kError, here), finding(Severity::kError, {"a.yml", 9, "j", ""})});
  suppress(&whole, std::vector<Suppression>{comment("BL001", "a.yml", 0)}, {});
  EXPECT_EQ(whole.suppressed.size(), 2u);
}

TEST(Suppress, ACommentThatTakesNothingIsReported) {
  for (const Suppression& s : {comment("BL001", "a.yml", 5), comment("BL001", "b.yml", 4)}) {
    RunResult run = run_with({finding(Severity::kError, {"a.yml", 4, "k", ""})});
    suppress(&run, std::vector<Suppression>{s}, {});
    EXPECT_EQ(run.rules[0].outcome.findings.size(), 1u);
    ASSERT_EQ(run.problems.size(), 1u);
    EXPECT_NE(run.problems[0].what.find("suppresses nothing"), std::string::npos);
    EXPECT_FALSE(run.problems[0].fatal);
  }
  RunResult other = run_with({});
  suppress(&other, std::vector<Suppression>{comment("GA001", "a.yml", 4), comment("XX9", "a.yml", 4)}, {});
  ASSERT_EQ(other.problems.size(), 1u);  // GA001 was not selected; XX9 does not exist
  EXPECT_NE(other.problems[0].what.find("XX9"), std::string::npos);
}

TEST(Suppress, ABaselineForgivesTheSamePlaceUnlessItGotWorse) {
  Baseline baseline;
  baseline.file = "b.json";
  baseline.entries = {{"BL001", Severity::kWarning, {"./a.yml", 0, "k", ""}, ""}};
  RunResult run = run_with({finding(Severity::kWarning, {"a.yml", 40, "k", ""}), finding(Severity::kError, {"a.yml", 40, "k", ""}),
                            finding(Severity::kWarning, {"a.yml", 40, "other", ""}), finding(Severity::kWarning, {"c.yml", 40, "k", ""})});
  suppress(&run, {}, baseline);
  EXPECT_EQ(run.rules[0].outcome.findings.size(), 3u);
  ASSERT_EQ(run.suppressed.size(), 1u);
  EXPECT_EQ(run.suppressed[0].baseline_entry, 0);
}

TEST(Suppress, WhatIsSuppressedDoesNotCountAndWhatIsGoneIsStale) {
  EngineOptions options;
  options.baseline.file = "b.json";
  options.baseline.entries = {{"BL001", Severity::kError, {"a.yml", 0, "k", ""}, ""}, {"BL001", Severity::kError, {"a.yml", 0, "gone", ""}, ""},
                              {"PR001", Severity::kError, {"a.yml", 0, "not asked", ""}, ""}};
  RunResult run = run_with({finding(Severity::kError, {"a.yml", 4, "k", ""})});
  suppress(&run, {}, options.baseline);
  std::vector<RunResult> runs;
  runs.push_back(std::move(run));
  const AuditResult result = conclude(std::move(runs), options);
  EXPECT_EQ(result.verdict, Verdict::kPassed);
  EXPECT_EQ(result.exit_code, 0);
  ASSERT_EQ(result.stale_baseline.size(), 1u);
  EXPECT_EQ(result.stale_baseline[0].where.key, "gone");
}

}  // namespace
}  // namespace moeaudit
