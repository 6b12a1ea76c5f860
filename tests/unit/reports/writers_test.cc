// One result, both writers, what they must and must not show.
#include <gtest/gtest.h>

#include <algorithm>

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
  at("not applicable: ZZ004 (--verbose says why)");
  EXPECT_EQ(text.find('\033'), std::string::npos);
  WriterOptions options;
  options.verbose = true;
  EXPECT_NE(render("text", sample(), options).find("not applicable: ZZ004 (no adapter)"), std::string::npos);
}

TEST(TextWriter, CountsTheRulesThatLackWhatWasNotGiven) {
  AuditResult result = sample();
  auto& rules = result.runs[0].rules;
  const RuleResult undecided = *std::find_if(rules.begin(), rules.end(), [](const RuleResult& r) { return r.id == "ZZ003"; });
  for (int i = 0; i < 30; ++i) rules.push_back(undecided);
  const std::string text = render("text", result);
  EXPECT_NE(text.find("31 rules for what was not given (--verbose lists them)"), std::string::npos) << text;
  EXPECT_EQ(text.find("ZZ003"), std::string::npos) << text;
  WriterOptions options;
  options.verbose = true;
  EXPECT_NE(render("text", result, options).find("ZZ003"), std::string::npos);
  rules.back().outcome.missing = {{"trace.replay", "a trace that records it", "needs drops"}};  // not of what was not given
  EXPECT_NE(render("text", result).find("ZZ003: needs drops"), std::string::npos);
}

TEST(TextWriter, StaysWithinTheWidth) {
  AuditResult result = sample();
  result.runs[0].rules[0].outcome.findings[0].message = std::string(50, 'x') + " " + std::string(50, 'y') + " " + std::string(50, 'z');
  WriterOptions options;
  options.width = 60;
  std::istringstream lines(render("text", result, options));
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 60u) << line;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

TEST(SarifWriter, HasWhatCodeScanningShows) {
  AuditResult result = sample();
  Location weights{"my model/w.safetensors", 0, "", "gate.weight"};
  auto& locations = result.runs[0].rules[0].outcome.findings[0].locations;
  locations.insert(locations.begin(), weights);
  const auto sarif = nlohmann::json::parse(render("sarif", result));
  EXPECT_EQ(sarif["version"], "2.1.0");
  const auto& run = sarif["runs"][0];
  ASSERT_EQ(run["tool"]["driver"]["rules"].size(), 4u);
  ASSERT_EQ(run["results"].size(), 1u);
  const auto& entry = run["results"][0];
  EXPECT_EQ(entry["ruleId"], run["tool"]["driver"]["rules"][entry["ruleIndex"].get<int>()]["id"]);
  EXPECT_EQ(entry["level"], "warning");
  // The line of the config, which a reviewer can see, comes before the tensor.
  EXPECT_EQ(entry["locations"][0]["physicalLocation"]["artifactLocation"]["uri"], "train.yml");
  EXPECT_EQ(entry["locations"][0]["physicalLocation"]["region"]["startLine"], 4);
  EXPECT_EQ(entry["relatedLocations"][0]["physicalLocation"]["artifactLocation"]["uri"], "my%20model/w.safetensors");
  EXPECT_EQ(entry["relatedLocations"][0]["logicalLocations"][0]["fullyQualifiedName"], "gate.weight");
  EXPECT_NE(entry["message"]["text"].get<std::string>().find("  k: 1"), std::string::npos);
  EXPECT_EQ(run["invocations"][0]["toolExecutionNotifications"][0]["associatedRule"]["id"], "ZZ003");
}

TEST(SarifWriter, FingerprintsKeepWhenLinesMoveAndDifferBetweenFindings) {
  AuditResult result = sample();
  auto& findings = result.runs[0].rules[0].outcome.findings;
  findings.push_back(findings[0]);
  const auto fingerprints = [&] {
    std::vector<std::string> out;
    const auto sarif = nlohmann::json::parse(render("sarif", result));
    for (const auto& r : sarif["runs"][0]["results"]) out.push_back(r["partialFingerprints"]["primaryLocationLineHash"]);
    return out;
  };
  const auto before = fingerprints();
  EXPECT_NE(before[0], before[1]);
  for (Finding& f : findings) f.locations[0].line = 99;
  EXPECT_EQ(fingerprints(), before);
  findings[0].locations[0].key = "other";
  EXPECT_NE(fingerprints()[0], before[0]);
}

TEST(GithubWriter, EscapesAndNamesThePlace) {
  AuditResult result = sample();
  auto& f = result.runs[0].rules[0].outcome.findings[0];
  f.message = "50% of a: b, c";
  f.locations[0].file = "a,b:c.yml";
  EXPECT_EQ(render("github", result),
            "::warning file=a%2Cb%3Ac.yml,line=4,title=ZZ001 first::50%25 of a: b, c%0AWrite:%0A  k: 1\n");
}

TEST(GithubWriter, NeverWritesMoreThanGithubShows) {
  AuditResult result = sample();
  auto& rules = result.runs[0].rules;
  const Finding f = rules[0].outcome.findings[0];
  rules[0].outcome.findings.assign(11, f);
  EXPECT_EQ(lines_of(render("github", result)).size(), 1u);  // one rule, with a count
  EXPECT_NE(render("github", result).find("and 10 more of this rule"), std::string::npos);
  static const char* const kIds[] = {"AA001", "AA002", "AA003", "AA004", "AA005", "AA006", "AA007", "AA008", "AA009", "AA010", "AA011"};
  rules.clear();
  for (const char* id : kIds) rules.push_back({id, "n", Outcome::finding(f)});
  const auto lines = lines_of(render("github", result));
  ASSERT_EQ(lines.size(), 10u);
  EXPECT_NE(lines.back().find("2 more rules"), std::string::npos);
  EXPECT_NE(lines.back().find("AA010 n: 1%0AAA011 n: 1"), std::string::npos);
}

TEST(Writers, ShowWhatIsSuppressedAndDoNotCountIt) {
  AuditResult result = sample();
  auto& run = result.runs[0];
  run.suppressed.push_back({"ZZ001", "first", run.rules[0].outcome.findings[0], {"train.yml", 3, "", ""}, -1, "meant so"});
  run.rules[0].outcome.findings.clear();
  result.verdict = Verdict::kPassed;
  const std::string text = render("text", result);
  EXPECT_NE(text.find("PASSED  no findings that count, 1 suppressed"), std::string::npos) << text;
  EXPECT_NE(text.find("warning ZZ001 at train.yml:4 (k), by train.yml:3: meant so"), std::string::npos) << text;
  const auto json = nlohmann::json::parse(render("json", result));
  EXPECT_EQ(json["findings"].size(), 0u);
  EXPECT_EQ(json["suppressed"][0]["by"]["reason"], "meant so");
  EXPECT_EQ(json["checks"]["ran"][0]["outcome"], "suppressed");
  EXPECT_EQ(nlohmann::json::parse(render("sarif", result))["runs"][0]["results"].size(), 0u);
  EXPECT_EQ(render("github", result), "");
  EXPECT_EQ(nlohmann::json::parse(render("baseline", result))["findings"].size(), 0u);  // the comment stays
}

TEST(FactsWriter, ShowsOriginAndShadowed) {
  std::ostringstream out;
  write_facts_text(sample(), {}, out);
  EXPECT_NE(out.str().find("balance.aux_coefficient = 0.02"), std::string::npos);
  EXPECT_NE(out.str().find("instead of 0.001: framework_default"), std::string::npos);
}

}  // namespace
}  // namespace moeaudit
