// Every advisory against facts made from its own row: it fires at both edges of each window, is silent just outside,
// cannot tell where a release or a fact is unknown, and does not apply where one condition is broken. What a row says of
// the real package is tested by the cases of fixtures/rules/AV*.
#include <gtest/gtest.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <type_traits>

#include "audit/rules/advisory.h"
#include "tests/support/facts_from_json.h"

namespace moeaudit {
namespace {

using nlohmann::json;

class Advisories : public ::testing::TestWithParam<int> {
 protected:
  const Advisory& row() const { return kAdvisories[GetParam()]; }
  Outcome judge(const json& facts) const {
    const FactSheet sheet = testing::facts_from_json(facts);
    Facts view(sheet);
    return kAdvisoryRules[GetParam()].check(view);
  }
};

// ---- values that a condition takes or refuses, worked out here and not by the code under test -----------------------

double number(std::string_view text) {
  double v = 0;
  std::from_chars(text.data(), text.data() + text.size(), v);
  return v;
}

bool holds(const json& value, const AdvisoryCondition& c) {
  const auto is = [&](std::string_view v) {
    if (value.is_boolean()) return v == (value.get<bool>() ? "true" : "false");
    return value.is_number() ? value.get<double>() == number(v) : value.get<std::string>() == v;
  };
  const bool any = !value.is_array() && std::any_of(c.values.begin(), c.values.end(), is);
  switch (c.comparison) {
    case Comparison::kEqual:
    case Comparison::kIn: return any;
    case Comparison::kNotEqual: return !any;
    case Comparison::kLess: return value.get<double>() < number(c.values[0]);
    case Comparison::kAtMost: return value.get<double>() <= number(c.values[0]);
    case Comparison::kMore: return value.get<double>() > number(c.values[0]);
    case Comparison::kAtLeast: return value.get<double>() >= number(c.values[0]);
    case Comparison::kContains:
      return std::any_of(value.begin(), value.end(), [&](const json& item) { return item.get<std::string>() == c.values[0]; });
  }
  return false;
}

template <class T>
void add_candidates(const Fact<T>&, const AdvisoryCondition& c, std::vector<json>* out) {
  if constexpr (std::is_same_v<T, bool>) {
    out->insert(out->end(), {true, false});
  } else if constexpr (std::is_same_v<T, std::int64_t>) {
    for (std::string_view v : c.values) {
      const auto n = static_cast<std::int64_t>(number(v));
      out->insert(out->end(), {n, n + 1, n - 1});
    }
  } else if constexpr (std::is_same_v<T, double>) {
    for (std::string_view v : c.values) out->insert(out->end(), {number(v), number(v) + 0.25, number(v) - 0.25});
  } else if constexpr (std::is_same_v<T, std::string>) {
    for (std::string_view v : c.values) out->push_back(std::string(v));
    out->push_back("something_else");
  } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
    out->push_back(json::array({std::string(c.values[0])}));
    out->push_back(json::array({"something_else"}));
  } else if constexpr (std::is_enum_v<T>) {
    for (int i = 0; i < 32; ++i) {
      const std::string word = name_of(static_cast<T>(i));
      if (word == "?") break;
      out->push_back(word);
    }
  }
}

std::vector<json> candidates(const AdvisoryCondition& c) {
  std::vector<json> out;
  const FactSheet blank;
  blank.visit([&](const auto& fact) {
    if (&fact.info() == c.fact) add_candidates(fact, c, &out);
  });
  return out;
}

/// A value of `fact` that meets every condition on it but `broken`, which it breaks; null if there is none.
json value_for(const Advisory& a, const FactInfo* fact, const AdvisoryCondition* broken) {
  std::vector<json> values;
  for (const AdvisoryCondition& c : a.when) {
    if (c.fact == fact) for (json& v : candidates(c)) values.push_back(std::move(v));
  }
  for (const json& v : values) {
    const bool fits = std::all_of(a.when.begin(), a.when.end(), [&](const AdvisoryCondition& c) {
      return c.fact != fact || holds(v, c) != (&c == broken);
    });
    if (fits) return v;
  }
  return nullptr;
}

// ---- versions at the edges --------------------------------------------------------------------------------------------

/// Below every release that could follow: 5.6.0 -> 5.5.999, 0.23.1 -> 0.23.0.999.
std::string just_below(std::string_view version) {
  std::vector<int> parts = Version::parse(version)->release;
  while (parts.size() > 1 && parts.back() == 0) parts.pop_back();
  --parts.back();
  parts.push_back(999);
  std::string text;
  for (int p : parts) text += (text.empty() ? "" : ".") + std::to_string(p);
  return text;
}

std::string first_of(const AdvisoryWindow& w) { return w.from.empty() ? just_below(w.until) : std::string(w.from); }
std::string last_of(const AdvisoryWindow& w) { return w.seen.empty() ? just_below(w.until) : std::string(w.seen); }

json bitten(const Advisory& a) {
  json facts = json::object();
  for (const AdvisoryCondition& c : a.when) facts[std::string(c.fact->name)] = value_for(a, c.fact, nullptr);
  for (const AffectedPackage& p : a.affected) {
    if (!p.windows.empty()) facts[std::string(p.versions->name)] = first_of(p.windows[0]);
  }
  return facts;
}

std::set<std::string> missing(const Outcome& o) {
  std::set<std::string> names;
  for (const Missing& m : o.missing) names.insert(m.fact);
  return names;
}

TEST_P(Advisories, FireAtBothEdgesOfEachWindowAndNotOutside) {
  for (const AffectedPackage& p : row().affected) {
    json facts = bitten(row());
    const std::string name(p.versions->name);
    for (const AdvisoryWindow& w : p.windows) {
      for (const std::string& version : {first_of(w), last_of(w)}) {
        facts[name] = version;
        const Outcome o = judge(facts);
        ASSERT_EQ(o.kind, Outcome::Kind::kFinding) << facts << " " << o.reason;
        EXPECT_EQ(o.findings.at(0).severity, row().severity);
        EXPECT_NE(o.findings[0].message.find(version), std::string::npos) << o.findings[0].message;
      }
      if (!w.from.empty()) {
        facts[name] = just_below(w.from);
        EXPECT_EQ(judge(facts).kind, Outcome::Kind::kPass) << facts;
        facts[name] = ">=" + just_below(w.from) + ",<=" + last_of(w);
        EXPECT_EQ(judge(facts).kind, Outcome::Kind::kCannotTell) << facts;
      }
      facts[name] = w.seen.empty() ? std::string(w.until) : std::string(w.seen) + ".1";
      EXPECT_EQ(judge(facts).kind, w.seen.empty() ? Outcome::Kind::kPass : Outcome::Kind::kCannotTell) << facts;
      facts[name] = nullptr;
      EXPECT_EQ(missing(judge(facts)), std::set<std::string>{name}) << facts;
    }
  }
}

TEST_P(Advisories, DependOnEachOfTheirConditions) {
  const json facts = bitten(row());
  ASSERT_EQ(judge(facts).kind, Outcome::Kind::kFinding) << facts;
  for (const AdvisoryCondition& c : row().when) {
    const std::string name(c.fact->name);
    json unknown = facts;
    unknown[name] = nullptr;
    const Outcome o = judge(unknown);
    EXPECT_EQ(o.kind, Outcome::Kind::kCannotTell) << unknown;
    EXPECT_EQ(missing(o), std::set<std::string>{name});

    json broken = facts;
    broken[name] = value_for(row(), c.fact, &c);
    if (broken[name].is_null()) continue;  // no value breaks this condition alone
    const Outcome other = judge(broken);
    EXPECT_EQ(other.kind, Outcome::Kind::kNotApplicable) << broken;
    EXPECT_NE(other.reason.find(name), std::string::npos) << other.reason;
  }
}

TEST_P(Advisories, OweTheirReaderEvidenceARemedyAndSources) {
  const Outcome o = judge(bitten(row()));
  ASSERT_EQ(o.findings.size(), 1u);
  const Finding& f = o.findings[0];
  EXPECT_TRUE(std::regex_search(f.message, std::regex("[0-9]"))) << f.message;
  EXPECT_GE(f.evidence.size(), row().when.size());
  EXPECT_NE(f.remedy.find("\n    "), std::string::npos) << "no line to paste:\n" << f.remedy;
  EXPECT_FALSE(f.does_not_show.empty());
  EXPECT_FALSE(f.sources.empty());
  EXPECT_FALSE(f.locations.empty());
  EXPECT_TRUE(row().severity != Severity::kError || row().evidence != "reported");
  for (std::string_view issue : row().issues) {
    EXPECT_TRUE(std::regex_match(std::string(issue), std::regex("[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+#[0-9]+"))) << issue;
  }
}

// ---- against what the real libraries did (fixtures/oracle/advisories.jsonl) --------------------------------------------

/// Facts of the run that a row measured: only what the advisories ask.
json facts_of(const json& row) {
  static const std::map<std::string, std::string> kTypes = {
      {"Mixtral", "mixtral"},       {"Qwen3Moe", "qwen3_moe"}, {"Olmoe", "olmoe"},          {"Qwen2Moe", "qwen2_moe"},
      {"GraniteMoe", "granitemoe"}, {"Phimoe", "phimoe"},      {"MiniMaxM2", "minimax_m2"},
      {"SwitchTransformers", "switch_transformers"}, {"Doge", "doge"}, {"KimiLinear", "kimi_linear"}, {"HYV4", "hy_v4"},
      {"Kimi_K25", "deepseek_v3"},  {"NemotronH", "nemotron_h"}, {"BailingHybrid", "bailing_hybrid"}};
  json facts = {{"versions.transformers", row.at("transformers")}, {"model.type", "mixtral"},
                {"balance.aux_flag", true}, {"balance.aux_added_to_loss", true}, {"balance.aux_coefficient", 0.5},
                {"training.router_trains", true}, {"training.trainer", "SFTTrainer"}, {"training.method", "full"}};
  const std::string advisory = row.at("advisory");
  if (advisory == "AV007") facts["model.type"] = "dbrx";
  if (advisory == "AV008") facts["model.type"] = "qwen3_moe";
  if (row.contains("model")) facts["model.type"] = kTypes.at(row.at("model").get<std::string>());
  if (facts["model.type"] == "switch_transformers") facts["training.trainer"] = "Trainer";
  if (facts["model.type"] == "doge") facts["model.has_moe"] = true;
  if (advisory == "AV019" || advisory == "AV100" || advisory == "AV101") {
    facts["model.family"] = advisory == "AV101" ? "kimi_k25" : advisory == "AV100" ? "nemotron_h" : facts["model.type"];
    facts["training.trust_remote_code"] = false;
  }
  if (row.contains("expert_capacity")) facts["router.expert_capacity"] = row.at("expert_capacity");
  if (row.contains("tokens")) facts["training.sequence_length"] = row.at("tokens");
  if (advisory == "AV041") {
    facts["training.framework"] = "llama-factory";
    facts["versions.llamafactory"] = "0.9.3";
    facts["training.block_diagonal_mask"] = true;
    facts["balance.aux_added_to_loss"] = row.at("output_router_logits");
  }
  if (row.contains("top_k")) facts["router.top_k"] = row.at("top_k");
  if (row.contains("trl")) facts["versions.trl"] = row.at("trl");
  if (row.contains("dense_layers")) facts["model.num_dense_layers"] = row.at("dense_layers");
  if (row.contains("mlp_only_layers")) facts["model.num_dense_layers"] = row.at("mlp_only_layers").size();
  if (row.contains("use_reentrant")) {
    facts["training.gradient_checkpointing"] = true;
    facts["training.checkpointing_reentrant"] = row.at("use_reentrant");
  }
  return facts;
}

/// Did the library show the fault? Nothing where the row cannot say.
std::optional<bool> faulty(const json& row) {
  const std::string advisory = row.at("advisory");
  if (advisory == "AV003, AV012") return row.contains("error") ? std::nullopt : std::optional(row.at("gradient_of_aux") == 0.0);
  if (advisory == "AV004") return row.at("largest_gradient").get<double>() < 1e-6;
  if (advisory == "AV006") return row.contains("error") || row.at("loss").get<double>() > 1.5 * row.at("top_k").get<double>();
  if (advisory == "AV007") return row.at("collapsed_weights").get<double>() < 15;  // all on 4 of 16: the loss is 16
  if (advisory == "AV008") return row.contains("error");
  if (advisory == "AV041") return row.contains("error");
  if (advisory == "AV014") return row.at("loss_of_aux") == 0.0;
  if (advisory == "AV016") return row.contains("error") ? std::nullopt : std::optional(row.at("collapsed").get<double>() < 7);
  if (advisory == "AV017, AV018") {  // rows with the router at zero show where it comes from
    if (row.contains("error")) return true;
    return row.at("router") == "zero" ? std::nullopt : std::optional(row.at("by_later_tokens").get<double>() > 0);
  }
  if (advisory == "AV019") return row.at("saved_by_other_names") > 0;
  if (advisory == "AV101") return row.at("layers") == 0;
  if (advisory == "AV100") return row.at("saved") == "backbone.embedding.weight";
  if (advisory == "AV020") return row.at("times_added").get<double>() > 1.5;
  return std::nullopt;
}

TEST(AdvisoriesMeasured, FireWhereTheRealLibraryHadTheFaultAndNowhereElse) {
  std::ifstream in(MOE_AUDIT_SOURCE_DIR "/fixtures/oracle/advisories.jsonl");
  int faults = 0, healthy = 0;
  for (std::string line; std::getline(in, line);) {
    const json row = json::parse(line);
    const std::optional<bool> fault = faulty(row);
    if (!fault) continue;
    ++(*fault ? faults : healthy);
    const FactSheet sheet = testing::facts_from_json(facts_of(row));
    bool fired = false;
    const std::string ids = row.at("advisory");
    for (std::size_t at = 0; at < ids.size(); at += 7) {  // "AV003, AV012"
      const Rule* rule = find_rule(ids.substr(at, 5));
      ASSERT_NE(rule, nullptr) << ids;
      Facts facts(sheet);
      const Outcome o = rule->check(facts);
      EXPECT_NE(o.kind, Outcome::Kind::kCannotTell) << rule->id << " " << line;
      fired |= o.kind == Outcome::Kind::kFinding;
    }
    EXPECT_EQ(fired, *fault) << line;
  }
  EXPECT_GE(faults, 30);
  EXPECT_GE(healthy, 30);
}

/// fixtures/oracle/seq2seq.json: experts that NLLB-MoE runs (AV013) and tokens that Switch drops at capacity 2 (AV015).
TEST(AdvisoriesMeasured, AgreeWithWhatTheEncoderDecoderFamiliesDid) {
  std::ifstream in(MOE_AUDIT_SOURCE_DIR "/fixtures/oracle/seq2seq.json");
  const json table = json::parse(in);
  std::map<std::string, int> fired, silent;
  for (const json& row : table.at("rows")) {
    const bool nllb = row.at("model_type") == "nllb_moe";
    if (row.at("transformers") == "4.51.3" && !nllb) continue;  // what it drops goes on unchanged, which the row does not see
    const std::string id = nllb ? "AV013" : "AV015";
    const bool fault = nllb ? row.at("right") != row.at("tokens") : row.at("dropped") == 0;
    const FactSheet sheet = testing::facts_from_json({{"versions.transformers", row.at("transformers")},
                                                      {"model.type", nllb ? "nllb-moe" : "switch_transformers"},
                                                      {"router.num_experts", 8},
                                                      {"router.expert_capacity", 64},
                                                      {"training.sequence_length", 512}});
    Facts facts(sheet);
    const Outcome::Kind kind = find_rule(id)->check(facts).kind;
    EXPECT_EQ(kind, fault ? Outcome::Kind::kFinding : Outcome::Kind::kPass) << row;
    ++(fault ? fired : silent)[id];
  }
  EXPECT_GE(std::min(fired["AV013"], fired["AV015"]), 5);
  EXPECT_GE(std::min(silent["AV013"], silent["AV015"]), 2);
}

std::string test_name(const ::testing::TestParamInfo<int>& info) { return std::string(kAdvisories[info.param].id); }
INSTANTIATE_TEST_SUITE_P(Rows, Advisories, ::testing::Range(0, kNumAdvisories), test_name);

}  // namespace
}  // namespace moeaudit
