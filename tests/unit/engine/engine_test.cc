// Verdict and exit code (docs/architecture.md), and that measures run only when a rule asks.
#include "audit/engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace moeaudit {
namespace {

Finding finding(Severity severity) {
  Finding f;
  f.severity = severity;
  f.message = "m";
  return f;
}

RunResult run_with(std::vector<Outcome> outcomes) {
  RunResult run;
  run.name = "run";
  for (Outcome& o : outcomes) run.rules.push_back({"ZZ001", "zz", std::move(o)});
  return run;
}

AuditResult judge(RunResult run, FailOn fail_on = FailOn::kError, bool strict = false) {
  EngineOptions options;
  options.fail_on = fail_on;
  options.strict = strict;
  std::vector<RunResult> runs;
  runs.push_back(std::move(run));
  return conclude(std::move(runs), options);
}

Outcome cannot_tell() {
  Outcome o;
  o.kind = Outcome::Kind::kCannotTell;
  return o;
}

TEST(Conclude, PassedIsZero) {
  const AuditResult r = judge(run_with({Outcome::pass(), cannot_tell()}));
  EXPECT_EQ(r.verdict, Verdict::kPassed);
  EXPECT_EQ(r.exit_code, 0);
}

TEST(Conclude, ExitCodeFollowsFailOnAndTheVerdictDoesNot) {
  const struct { Severity severity; FailOn limit; int exit_code; } cases[] = {
      {Severity::kError, FailOn::kError, 1},     {Severity::kError, FailOn::kWarning, 1},  {Severity::kError, FailOn::kNote, 1},
      {Severity::kError, FailOn::kNever, 0},     {Severity::kWarning, FailOn::kError, 0},  {Severity::kWarning, FailOn::kWarning, 1},
      {Severity::kWarning, FailOn::kNote, 1},    {Severity::kWarning, FailOn::kNever, 0},  {Severity::kNote, FailOn::kError, 0},
      {Severity::kNote, FailOn::kWarning, 0},    {Severity::kNote, FailOn::kNote, 1},      {Severity::kNote, FailOn::kNever, 0},
  };
  for (const auto& c : cases) {
    const AuditResult r = judge(run_with({Outcome::finding(finding(c.severity))}), c.limit);
    EXPECT_EQ(r.exit_code, c.exit_code) << name_of(c.severity) << " at limit " << static_cast<int>(c.limit);
    EXPECT_EQ(r.verdict, Verdict::kFindings);
  }
}

TEST(Conclude, TheWorstFindingDecides) {
  EXPECT_EQ(judge(run_with({Outcome::finding(finding(Severity::kNote)), Outcome::finding(finding(Severity::kError)), Outcome::pass()})).exit_code, 1);
}

TEST(Conclude, FatalProblemBeatsFindings) {
  RunResult run = run_with({Outcome::finding(finding(Severity::kError))});
  run.problems.push_back({"config.json", 3, 1, "broken", "", true});
  const AuditResult r = judge(std::move(run));
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_EQ(r.verdict, Verdict::kCouldNotJudge);
  EXPECT_EQ(r.could_not_judge, "config.json: broken");
}

TEST(Conclude, ProblemThatIsNotFatalChangesNothing) {
  RunResult run = run_with({Outcome::pass()});
  run.problems.push_back({"README.md", 0, 0, "no versions", "", false});
  EXPECT_EQ(judge(std::move(run)).exit_code, 0);
}

TEST(Conclude, StrictTurnsCannotTellIntoTwoAndKeepsTheVerdict) {
  const AuditResult r = judge(run_with({Outcome::pass(), cannot_tell()}), FailOn::kError, true);
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_EQ(r.verdict, Verdict::kPassed);
  EXPECT_EQ(judge(run_with({Outcome::pass()}), FailOn::kError, true).exit_code, 0);
}

TEST(Conclude, NothingJudgedIsTwo) {
  EXPECT_EQ(judge(run_with({cannot_tell()})).exit_code, 2);
  EXPECT_EQ(judge(run_with({Outcome::not_applicable("no adapter")})).exit_code, 2);
  EXPECT_EQ(judge(run_with({})).exit_code, 2);
  EngineOptions options;
  EXPECT_EQ(conclude({}, options).exit_code, 2);
}

TEST(Conclude, NoMoeIsTwoWhateverPassed) {
  RunResult run = run_with({Outcome::pass()});
  Source where;
  where.file = "config.json";
  run.facts.has_moe.set(false, Origin::kDerived, where);
  const AuditResult r = judge(std::move(run));
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_NE(r.could_not_judge.find("config.json"), std::string::npos);
}

TEST(AuditRun, ResultsAreOrderedByIdAndSelectable) {
  EngineOptions options;
  const RunResult all = audit_run(LoadedRun{}, options);
  ASSERT_GE(all.rules.size(), 25u);
  EXPECT_TRUE(std::is_sorted(all.rules.begin(), all.rules.end(), [](const auto& a, const auto& b) { return a.id < b.id; }));
  options.select = {"RT"};
  options.ignore = {"RT002", "RT004", "RT005"};
  const RunResult some = audit_run(LoadedRun{}, options);
  ASSERT_EQ(some.rules.size(), 2u);
  EXPECT_EQ(some.rules[0].id, "RT001");
  EXPECT_EQ(some.rules[1].id, "RT003");
}

TEST(AuditRun, AnEmptyRunPassesNothing) {
  // With no facts at all a rule may not pass: unknown is cannot_tell.
  for (const RuleResult& rule : audit_run(LoadedRun{}, EngineOptions{}).rules) {
    EXPECT_NE(rule.outcome.kind, Outcome::Kind::kPass) << rule.id;
    EXPECT_NE(rule.outcome.kind, Outcome::Kind::kFinding) << rule.id;
    if (rule.outcome.kind == Outcome::Kind::kCannotTell) {
      EXPECT_FALSE(rule.outcome.missing.empty()) << rule.id;
    }
  }
}

}  // namespace
}  // namespace moeaudit
