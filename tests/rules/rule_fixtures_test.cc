// Every rule against its fixtures: fixtures/rules/<ID>/<outcome>_<case>/, read at run time (docs/add_a_rule.md).
//   facts.json     facts of the case, laid over fixtures/rules/<ID>/base.json (tests/support/facts_from_json.h), or
//   args.json      command-line arguments; paths are relative to the source folder and real files are read and measured
//   expected.json  what the rule must say of it: outcome, severities, exact (first message), parts of message, remedy
//   and
//                  reason, names of evidence, locations "file:line tensor", missing facts; by_hand shows how a number
//                  arose
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "audit/engine/engine.h"
#include "audit/inputs/inputs.h"
#include "audit/rules/rule.h"
#include "tests/support/facts_from_json.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kSource = MOE_AUDIT_SOURCE_DIR;
const fs::path kFixtures = kSource / "fixtures" / "rules";

const std::map<std::string, Outcome::Kind> kPrefixes = {{"fires_", Outcome::Kind::kFinding},
                                                        {"silent_", Outcome::Kind::kPass},
                                                        {"cannot_tell_", Outcome::Kind::kCannotTell},
                                                        {"not_applicable_", Outcome::Kind::kNotApplicable}};

std::string slurp(const fs::path& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

json read_json(const fs::path& path) {
  try {
    return json::parse(slurp(path));
  } catch (const json::exception& e) {
    throw std::runtime_error(path.string() + ": " + e.what());
  }
}

struct Case {
  std::string id, name;
  fs::path folder;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.folder.lexically_relative(kSource).string(); }

std::vector<fs::path> folders(const fs::path& parent) {
  std::vector<fs::path> found;
  if (!fs::is_directory(parent)) return found;
  for (const auto& entry : fs::directory_iterator(parent)) {
    if (entry.is_directory()) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const fs::path& rule : folders(kFixtures)) {
    for (const fs::path& c : folders(rule)) cases.push_back({rule.filename().string(), c.filename().string(), c});
  }
  return cases;
}

const Outcome::Kind* kind_of(const std::string& name) {
  for (const auto& [prefix, kind] : kPrefixes) {
    if (name.rfind(prefix, 0) == 0) return &kind;
  }
  return nullptr;
}

/// Command-line arguments of args.json, for a run of one rule.
Outcome run_files(const Rule& rule, const json& args) {
  RunOptions run;
  EngineOptions engine;
  engine.select = {std::string(rule.id)};
  const std::map<std::string, std::vector<std::string>*> lists = {
      {"--model", &run.models},   {"--base", &run.bases}, {"--adapter", &run.adapters},
      {"--config", &run.configs}, {"--env", &run.envs},   {"--log", &run.logs}};
  for (std::size_t i = 0; i < args.size(); ++i) {
    const std::string arg = args[i].get<std::string>();
    const auto value = [&] { return args.at(++i).get<std::string>(); };
    if (const auto list = lists.find(arg); list != lists.end())
      list->second->push_back(value());
    else if (arg == "--hidden-states")
      run.hidden_states = value();
    else if (arg == "--rollout")
      run.rollout = value();
    else if (arg == "--trace")
      run.trace = value();
    else if (arg == "--world-size")
      run.world_size = std::stoll(value());
    else if (arg == "--sequence-length")
      run.sequence_length = std::stoll(value());
    else if (arg == "--static")
      engine.replays = false;
    else if (arg == "--assume") {
      std::stringstream pairs(value());
      for (std::string pair; std::getline(pairs, pair, ',');) {
        run.assume.emplace_back(pair.substr(0, pair.find('=')), pair.substr(pair.find('=') + 1));
      }
    } else if (arg.rfind("--", 0) == 0)
      throw std::runtime_error("args.json: unknown option " + arg);
    else
      run.paths.push_back(arg);
  }
  std::vector<LoadedRun> loaded = load_runs(run);
  if (loaded.size() != 1)
    throw std::runtime_error("args.json: " + std::to_string(loaded.size()) + " runs instead of one");
  for (const InputProblem& problem : loaded[0].problems) {
    if (problem.fatal) throw std::runtime_error(problem.file + ": " + problem.what);
  }
  const RunResult result = audit_run(std::move(loaded[0]), engine);
  return result.rules.at(0).outcome;
}

Outcome run_case(const Rule& rule, const Case& c) {
  if (fs::exists(c.folder / "args.json")) return run_files(rule, read_json(c.folder / "args.json"));
  json facts = json::object();
  if (fs::exists(c.folder.parent_path() / "base.json")) facts = read_json(c.folder.parent_path() / "base.json");
  const json own = read_json(c.folder / "facts.json");
  for (const auto& item : own.items()) facts[item.key()] = item.value();
  const FactSheet sheet = testing::facts_from_json(facts);
  Facts view(sheet);
  return rule.check(view);
}

std::string join(const std::vector<Finding>& findings, std::string Finding::*member) {
  std::string text;
  for (const Finding& f : findings) text += f.*member + "\n";
  return text;
}

void expect_parts(const json& expected, const char* key, const std::string& text) {
  if (!expected.contains(key)) return;
  for (const json& part : expected.at(key)) {
    EXPECT_NE(text.find(part.get<std::string>()), std::string::npos)
        << key << " lacks '" << part.get<std::string>() << "':\n"
        << text;
  }
}

std::string place(const Location& where) {
  std::string text = where.file;
  if (where.line > 0) text += ":" + std::to_string(where.line);
  if (!where.tensor.empty()) text += " " + where.tensor;
  return text;
}

/// What every finding owes its reader.
void expect_complete(const Finding& f) {
  const bool digit = std::any_of(f.message.begin(), f.message.end(), [](unsigned char c) { return std::isdigit(c); });
  const bool named = std::any_of(f.evidence.begin(), f.evidence.end(), [&](const Evidence& e) {
    return f.message.find(e.name) != std::string::npos || f.message.find(e.value) != std::string::npos;
  });
  EXPECT_TRUE(digit || named) << "no value in the message: " << f.message;
  EXPECT_FALSE(f.evidence.empty()) << f.message;
  EXPECT_FALSE(f.remedy.empty()) << f.message;
  EXPECT_NE(f.remedy.find("\n    "), std::string::npos) << "no line to paste in the remedy:\n" << f.remedy;
  EXPECT_FALSE(f.does_not_show.empty()) << f.message;
  EXPECT_FALSE(f.sources.empty()) << f.message;
  EXPECT_FALSE(f.locations.empty()) << f.message;
}

void expect_findings(const Outcome& outcome, const json& expected) {
  std::vector<std::string> severities, evidence, locations;
  for (const Finding& f : outcome.findings) {
    expect_complete(f);
    severities.push_back(name_of(f.severity));
    for (const Evidence& e : f.evidence) evidence.push_back(e.name);
    for (const Location& l : f.locations) locations.push_back(place(l));
  }
  EXPECT_EQ(severities, expected.at("severities").get<std::vector<std::string>>())
      << join(outcome.findings, &Finding::message);
  if (expected.contains("exact")) {
    EXPECT_EQ(outcome.findings.at(0).message, expected.at("exact").get<std::string>());
  }
  expect_parts(expected, "message", join(outcome.findings, &Finding::message));
  expect_parts(expected, "remedy", join(outcome.findings, &Finding::remedy));
  for (const char* key : {"evidence", "locations"}) {
    const auto& got = std::string(key) == "evidence" ? evidence : locations;
    for (const json& one : expected.value(key, json::array())) {
      EXPECT_NE(std::find(got.begin(), got.end(), one.get<std::string>()), got.end())
          << key << " lacks " << one << ", has " << json(got);
    }
  }
}

class RuleFixture : public ::testing::TestWithParam<Case> {};

TEST_P(RuleFixture, SaysWhatIsExpected) {
  const Case& c = GetParam();
  fs::current_path(kSource);
  const Rule* rule = find_rule(c.id);
  ASSERT_NE(rule, nullptr) << "fixtures/rules/" << c.id << ": there is no such rule";
  const Outcome::Kind* kind = kind_of(c.name);
  ASSERT_NE(kind, nullptr) << c.folder
                           << ": a case is called fires_, silent_, cannot_tell_ or not_applicable_ something";
  const json expected = read_json(c.folder / "expected.json");
  EXPECT_EQ(expected.at("outcome").get<std::string>(), name_of(*kind))
      << "expected.json contradicts the name of the folder";
  for (const auto& item : expected.items()) {
    const std::set<std::string> known = {"outcome",  "severities", "exact",   "message", "remedy",
                                         "evidence", "locations",  "missing", "reason",  "by_hand"};
    EXPECT_TRUE(known.count(item.key())) << "expected.json: unknown key " << item.key();
  }
  const Outcome outcome = run_case(*rule, c);
  std::string said = outcome.reason + join(outcome.findings, &Finding::message);
  std::vector<std::string> missing;
  for (const Missing& m : outcome.missing) missing.push_back(m.fact);
  ASSERT_STREQ(name_of(outcome.kind), name_of(*kind)) << said << json(missing);
  switch (outcome.kind) {
    case Outcome::Kind::kFinding: expect_findings(outcome, expected); break;
    case Outcome::Kind::kCannotTell:
      EXPECT_EQ(missing, expected.at("missing").get<std::vector<std::string>>());
      expect_parts(expected, "reason", outcome.missing.empty() ? "" : outcome.missing[0].why);
      break;
    case Outcome::Kind::kNotApplicable:
      EXPECT_FALSE(outcome.reason.empty());
      EXPECT_TRUE(expected.contains("reason")) << "say by a part of the reason which of the rule's reasons is meant";
      expect_parts(expected, "reason", outcome.reason);
      break;
    case Outcome::Kind::kPass: expect_parts(expected, "reason", outcome.reason); break;
  }
}

std::string test_name(const ::testing::TestParamInfo<Case>& info) {
  std::string name = info.param.id + "_" + info.param.name;
  for (char& ch : name) {
    if (!std::isalnum(static_cast<unsigned char>(ch))) ch = '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Fixtures, RuleFixture, ::testing::ValuesIn(all_cases()), test_name);

/// The source file of a rule: audit/rules/<topic>/<name in snake case>.cc.
fs::path source_of(const Rule& rule) {
  std::string stem(rule.name);
  std::replace(stem.begin(), stem.end(), '-', '_');
  for (const fs::path& topic : folders(kSource / "audit" / "rules")) {
    if (fs::exists(topic / (stem + ".cc"))) return topic / (stem + ".cc");
  }
  return {};
}

TEST(RuleFixtures, EachRuleHasACaseOfEachOutcomeItCanHave) {
  std::map<std::string, std::set<Outcome::Kind>> seen;
  for (const Case& c : all_cases()) {
    if (const Outcome::Kind* kind = kind_of(c.name)) seen[c.id].insert(*kind);
  }
  for (int i = 0; i < kNumRules; ++i) {
    const Rule& rule = *kRules[i];
    const std::string id(rule.id);
    EXPECT_TRUE(seen[id].count(Outcome::Kind::kFinding)) << id << " has no fires_ case";
    EXPECT_TRUE(seen[id].count(Outcome::Kind::kPass)) << id << " has no silent_ case";
    const fs::path source = source_of(rule);
    ASSERT_FALSE(source.empty()) << id << ": no audit/rules/*/ file is called like " << rule.name;
    const std::string text = slurp(source);
    if (text.find("not_applicable(") != std::string::npos) {
      EXPECT_TRUE(seen[id].count(Outcome::Kind::kNotApplicable)) << id << " can be not applicable and has no such case";
    }
    if (text.find("cannot_tell()") != std::string::npos) {
      EXPECT_TRUE(seen[id].count(Outcome::Kind::kCannotTell)) << id << " can be unable to tell and has no such case";
    }
  }
}

}  // namespace
}  // namespace moeaudit
