// One result, both writers, what they must and must not show.
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "reports/writer.h"

namespace moeaudit {
namespace {

AuditResult sample() {
  RunResult run;
  run.name = "my-run";
  Source source;
  source.role = Role::kTrainingConfig;
  source.file = "train.yml";
  source.line = 4;
  source.key = "k";
  run.facts.aux_coefficient.set(0.001, Origin::kFrameworkDefault, {});
  run.facts.aux_coefficient.set(0.02, Origin::kStated, source);
  run.facts.loss_factor.set(std::numeric_limits<double>::quiet_NaN(), Origin::kMeasured, {});
  WeightProblem problem;
  problem.file = "w.safetensors";
  problem.offset = 12;
  problem.what = "short";
  run.facts.weight_problems.set({problem}, Origin::kMeasured, {});
  Finding f;
  f.severity = Severity::kWarning;
  f.message = "The message with 0.02.";
  f.evidence = {{"balance.aux_coefficient", "0.02", location_of(source)}};
  f.remedy = "Write:\n  k: 1";
  f.locations = {location_of(source)};
  f.sources = {"paper eq. 5"};
  run.rules.push_back({"ZZ001", "first", Outcome::finding(f)});
  run.rules.push_back({"ZZ002", "second", Outcome::pass()});
  Outcome unknown;
  unknown.kind = Outcome::Kind::kCannotTell;
  unknown.missing = {{"versions.peft", "--assume peft=VERSION", "two versions differ"}};
  run.rules.push_back({"ZZ003", "third", unknown});
  run.rules.push_back({"ZZ004", "fourth", Outcome::not_applicable("no adapter")});
  run.inputs.push_back({std::string("bad\xff name"), "axolotl config", ""});
  AuditResult result;
  result.tool_version = "0";
  result.verdict = Verdict::kFindings;
  result.exit_code = 0;
  result.runs.push_back(std::move(run));
  return result;
}

std::string render(std::string_view name, const AuditResult& result, WriterOptions options = {}) {
  for (int i = 0; i < kNumWriters; ++i) {
    if (kWriters[i]->name != name) continue;
    std::ostringstream out;
    kWriters[i]->write(result, options, out);
    return out.str();
  }
  ADD_FAILURE() << "no writer " << name;
  return {};
}

TEST(JsonWriter, HoldsEverything) {
  const auto report = nlohmann::json::parse(render("json", sample()));
  EXPECT_EQ(report["outcome"], "findings");
  ASSERT_EQ(report["findings"].size(), 1u);
  EXPECT_EQ(report["findings"][0]["locations"][0]["line"], 4);
  EXPECT_EQ(report["checks"]["ran"].size(), 2u);
  EXPECT_EQ(report["checks"]["cannot_tell"][0]["missing"][0]["why"], "two versions differ");
  EXPECT_EQ(report["checks"]["cannot_tell"][0]["supply"][0], "--assume peft=VERSION");
  EXPECT_EQ(report["checks"]["not_applicable"][0]["reason"], "no adapter");
  const auto& fact = report["facts"]["balance.aux_coefficient"];
  EXPECT_EQ(fact["value"], 0.02);
  EXPECT_EQ(fact["shadowed"][0]["value"], 0.001);
  EXPECT_EQ(fact["shadowed"][0]["origin"], "framework_default");
  EXPECT_EQ(report["facts"]["loss.accumulation_factor"]["value"], "nan");
  EXPECT_EQ(report["facts"]["weights.problems"]["value"][0]["offset"], 12);
  EXPECT_EQ(report["facts"]["router.top_k"]["origin"], "unknown");
}

TEST(JsonWriter, ListsRunsWhenAsked) {
  AuditResult result = sample();
  result.all_checkpoints = true;
  const auto report = nlohmann::json::parse(render("json", result));
  EXPECT_EQ(report["runs"].size(), 1u);
  EXPECT_FALSE(report.contains("findings"));
}

TEST(TextWriter, VerdictFirstThenFindingsThenWhatWasNotJudged) {
  const std::string text = render("text", sample());
  const auto at = [&](const char* part) {
    const std::size_t p = text.find(part);
    EXPECT_NE(p, std::string::npos) << part << "\n" << text;
    return p;
  };
  EXPECT_EQ(at("FINDINGS"), 0u);
  EXPECT_LT(at("warning ZZ001 first"), at("The message with 0.02."));
  EXPECT_LT(at("The message"), at("balance.aux_coefficient = 0.02  train.yml:4 (k)"));
  EXPECT_LT(at("Change"), at("      k: 1"));  // code to paste keeps its own indentation
  EXPECT_LT(at("passed: ZZ002"), at("Could not be judged"));
  at("give --assume peft=VERSION to settle ZZ003");
  at("not applicable: ZZ004 (no adapter)");
  EXPECT_EQ(text.find('\033'), std::string::npos);
}

TEST(TextWriter, StaysWithinTheWidth) {
  AuditResult result = sample();
  result.runs[0].rules[0].outcome.findings[0].message = std::string(50, 'x') + " " + std::string(50, 'y') + " " + std::string(50, 'z');
  WriterOptions options;
  options.width = 60;
  std::istringstream lines(render("text", result, options));
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 60u) << line;
}

TEST(FactsWriter, ShowsOriginAndShadowed) {
  std::ostringstream out;
  write_facts_text(sample(), {}, out);
  EXPECT_NE(out.str().find("balance.aux_coefficient = 0.02"), std::string::npos);
  EXPECT_NE(out.str().find("instead of 0.001: framework_default"), std::string::npos);
}

}  // namespace
}  // namespace moeaudit
