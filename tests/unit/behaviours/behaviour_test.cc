// Answers about version sets, and every answer that rests on a fixture compared with that fixture by a second reading.
#include "audit/behaviours/behaviour.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

namespace moeaudit {
namespace {

using Json = nlohmann::json;
using Subject = std::vector<std::pair<std::string_view, std::string>>;

Json read_json(const std::string& path) {
  std::ifstream in(std::string(MOE_AUDIT_SOURCE_DIR) + "/" + path);
  return Json::parse(in);
}

BehaviourAnswer ask_at(std::string_view package, std::string_view topic, const Subject& subject,
                       const std::string& versions) {
  const std::optional<VersionSet> set = VersionSet::parse(versions);
  EXPECT_TRUE(set.has_value()) << versions;
  return ask({package, topic, subject}, &*set);
}

const Subject kMixtral = {{"family", "mixtral"},
                          {"model_type", "mixtral"},
                          {"trainer", "Trainer"},
                          {"framework", "transformers"},
                          {"peft_wrapped", "false"}};

TEST(Ask, OneReleaseInsideAWindow) {
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, "4.57.6").value, "true");
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, "5.0.0").value, "false");
}

TEST(Ask, CitesAreWrittenOut) {
  EXPECT_EQ(ask_at("peft", "has_target_parameters", {}, "0.17.0").cite,
            "peft src/peft/tuners/lora/config.py@v0.17.0 target_parameters (pull request 2638)");
  EXPECT_EQ(ask_at("peft", "default.r", {}, "0.17.0").cite,
            "peft src/peft/tuners/lora/config.py@v0.10.0:117; peft src/peft/tuners/lora/config.py@v0.21.2:632");
}

TEST(Ask, ARangeHoldsOnlyIfAllOfItAgrees) {
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, ">=4.40,<5").value, "true");
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, ">=5.1").value, "false");
  const BehaviourAnswer across = ask_at("transformers", "router_is_linear", kMixtral, ">=4.40");
  EXPECT_FALSE(across.value);
  EXPECT_TRUE(across.rows.empty());
  EXPECT_EQ(across.why, "depends on the version: transformers before 5.0.0 gives true, 5.0.0 on gives false");
}

TEST(Ask, OneBadReleaseInsideARangeSpoilsIt) {
  EXPECT_EQ(ask_at("transformers", "loss_factor", kMixtral, ">=4.48.1,<4.52").value, "1");
  EXPECT_FALSE(ask_at("transformers", "loss_factor", kMixtral, ">=4.47.1,<4.52").value);  // 4.48.0 lies inside
}

/// fixtures/oracle/advisories.jsonl; between 5.2.0 and 5.5.3 Trainer divided once more, which hid it.
TEST(Ask, TheThinkerOfQwen3Omni) {
  const std::vector<std::pair<std::string_view, std::string>> thinker = {
      {"family", "qwen3_omni_moe_thinker"}, {"framework", "transformers"}, {"trainer", "Trainer"}};
  for (const auto& [version, factor] : {std::pair{"4.57.6", "GA"}, {"5.1.0", "GA"}, {"5.2.0", "1"}, {"5.5.3", "1"}, {"5.5.4", "GA"},
                                        {"5.16.1", "GA"}, {"5.17.0", "1"}, {"5.23.0", "1"}}) {
    const BehaviourAnswer answer = ask_at("transformers", "loss_factor", thinker, version);
    EXPECT_EQ(answer.value, factor) << version;
    EXPECT_TRUE(answer.measured) << version;
  }
  EXPECT_FALSE(ask_at("transformers", "loss_factor", thinker, ">=5.16.1,<5.18").value);
}

TEST(Ask, ARangeOverReleasesMeasuredOnBothSidesOfARewrite) {
  const BehaviourAnswer answer = ask_at("transformers", "autocast_lowers_router", kMixtral, ">=4.56,<5.20");
  EXPECT_EQ(answer.value, "true") << answer.why;
  EXPECT_TRUE(answer.measured);
}

TEST(Ask, AnUncoveredReleaseHasNoAnswer) {
  const BehaviourAnswer before = ask_at("transformers", "loss_factor", kMixtral, "4.36.0");
  EXPECT_FALSE(before.value);
  EXPECT_EQ(before.why, "nothing is recorded about loss_factor in transformers 4.36.0");
  EXPECT_FALSE(ask_at("transformers", "loss_factor", kMixtral, ">=5.20").value);  // the future was not measured
  EXPECT_FALSE(ask_at("transformers", "no_such_topic", kMixtral, "5.0.0").value);
  EXPECT_FALSE(ask_at("no_such_package", "loss_factor", kMixtral, "5.0.0").value);
}

TEST(Ask, UnknownVersionsMeanAllOfThem) {
  EXPECT_EQ(ask({"transformers", "default.gradient_accumulation_steps", {}}, nullptr).value, "1");
  EXPECT_EQ(ask({"transformers", "router_is_linear", {{"family", "gpt_oss"}}}, nullptr).value, "false");
  EXPECT_FALSE(ask({"transformers", "router_is_linear", {{"family", "mixtral"}}}, nullptr).value);
  EXPECT_FALSE(ask({"transformers", "loss_factor", kMixtral}, nullptr).value);
}

TEST(Ask, AnUnknownSubjectIsNotGuessed) {
  const BehaviourAnswer answer = ask_at("trl", "overrides_aux_flag", {}, "1.7.1");
  EXPECT_FALSE(answer.value);
  EXPECT_EQ(answer.why.substr(0, 21), "depends on trainer, w") << answer.why;
  // All rows that could apply agree, but none is known to apply.
  EXPECT_FALSE(ask_at("transformers", "router_is_linear", {}, "5.2.0").value);
  EXPECT_FALSE(
      ask_at("transformers", "loss_factor",
             {{"family", "mixtral"}, {"trainer", "RewardTrainer"}, {"framework", "trl"}, {"peft_wrapped", "false"}},
             "5.6.2")
          .value);
}

TEST(Ask, ReleaseCandidatesAndDevelopmentBuilds) {
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, "5.0.0rc1").value, "false");
  EXPECT_FALSE(ask_at("transformers", "router_is_linear", kMixtral, "5.0.0.dev0").value);  // before or after the change
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, "5.7.0.dev0").value, "false");
  EXPECT_EQ(ask_at("transformers", "router_is_linear", kMixtral, "4.57.6+cu124").value, "true");
}

TEST(Ask, WhatRunsTrainerInItsOwnWayIsMeasuredOnItsOwn) {
  Subject subject = kMixtral;
  subject[3].second = "axolotl";
  EXPECT_EQ(ask_at("transformers", "loss_factor", subject, "4.48.0").value, "GA");  // fixtures/oracle/axolotl.json
  EXPECT_FALSE(ask_at("transformers", "loss_factor", subject, "4.57.6").value);
  subject[3].second = "llama-factory";
  EXPECT_FALSE(ask_at("transformers", "loss_factor", subject, "4.48.0").value);
  const Subject sft = {{"family", "mixtral"}, {"trainer", "SFTTrainer"}, {"framework", "trl"}, {"peft_wrapped", "false"}};
  EXPECT_EQ(ask_at("trl", "aux_multiplier", sft, "1.14.2").value, "transformers");
  EXPECT_EQ(ask_at("transformers", "aux_multiplier", sft, "5.15.1").value, "GA*W");
  EXPECT_EQ(ask_at("trl", "aux_multiplier", sft, "1.16.0").value, "1");
}

TEST(Ask, SaysWhatTheAnswerRestsOn) {
  const BehaviourAnswer measured = ask_at("transformers", "loss_factor", kMixtral, "4.48.0");
  EXPECT_TRUE(measured.measured);
  EXPECT_NE(measured.cite.find("fixtures/oracle/accumulation.json"), std::string::npos);
  const BehaviourAnswer read = ask_at("peft", "default.r", {}, "0.17.0");
  EXPECT_FALSE(read.measured);
  EXPECT_FALSE(read.cite.empty());
}

TEST(Rows, AreSortedCitedAndParsable) {
  for (int i = 0; i < kNumBehaviours; ++i) {
    const BehaviourRow& r = kBehaviours[i];
    EXPECT_FALSE(r.cite.empty()) << r.topic;
    EXPECT_TRUE(r.from.empty() || Version::parse(r.from)) << r.from;
    EXPECT_TRUE(r.until.empty() || Version::parse(r.until)) << r.until;
    if (i == 0) continue;
    EXPECT_LE(std::tie(kBehaviours[i - 1].package, kBehaviours[i - 1].topic), std::tie(r.package, r.topic));
  }
  EXPECT_GT(kNumBehaviours, 1000);
}

// ---- against the fixtures ------------------------------------------------------------------------------------------

/// What a formula of the closed set comes to; nullopt for an answer without one.
std::optional<double> evaluate(const BehaviourAnswer& answer, double ga, double world) {
  if (!answer.value) return std::nullopt;
  if (*answer.value == "1") return 1;
  if (*answer.value == "GA") return ga;
  if (*answer.value == "W") return world;
  if (*answer.value == "GA*W") return ga * world;
  if (*answer.value == "1/GA") return 1 / ga;
  ADD_FAILURE() << *answer.value;
  return std::nullopt;
}

bool is_a_formula(double factor) {
  for (double f : {1.0, 8.0, 0.125}) {
    if (std::abs(factor / f - 1) < 0.02) return true;
  }
  return false;
}

TEST(Oracle, LossAndAuxFactorsAreTheMeasuredOnes) {
  int judged = 0, silent = 0;
  const Json oracle = read_json("fixtures/oracle/accumulation.json");
  for (const Json& row : oracle["derived"]) {
    static const std::set<std::string> kSix = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"};
    if (row["trainer"] != "Trainer" || !row.value("variant", Json()).is_null() || !kSix.count(row["model_type"]))
      continue;
    const double ga = row["gradient_accumulation_steps"], world = row["world_size"];
    if (ga == 1) continue;
    const std::string version = row["transformers"];
    const Subject subject = {{"family", row["model_type"]},
                             {"trainer", "Trainer"},
                             {"framework", "transformers"},
                             {"peft_wrapped", row["peft_wrapped"].get<bool>() ? "true" : "false"}};
    const double ce = row["ce_factor_vs_reference"];
    const auto loss = evaluate(ask_at("transformers", "loss_factor", subject, version), ga, world);
    ASSERT_EQ(loss.has_value(), is_a_formula(ce)) << version << " " << row["model_type"];
    EXPECT_NEAR(loss.value_or(ce) / ce, 1, 0.02) << version << " " << row["model_type"];

    const std::string formula = row["aux_formula"].is_string() ? row["aux_formula"].get<std::string>() : "";
    const BehaviourAnswer aux = ask_at("transformers", "aux_multiplier", subject, version);
    if (formula != "hf" && formula != "double_softmax") {
      EXPECT_FALSE(aux.value) << version << " " << row["model_type"] << " " << formula;
      ++silent;
      continue;
    }
    const Json& measured = formula == "hf" ? row["aux_multiplier"] : row["aux_multiplier_double_softmax"];
    ASSERT_TRUE(aux.value) << version << " " << row["model_type"] << ": " << aux.why;
    EXPECT_TRUE(aux.measured);
    // W counts only where the Trainer averages over devices.
    const bool averages =
        row["average_tokens_across_devices"].is_boolean() && row["average_tokens_across_devices"].get<bool>();
    const auto factor = evaluate(aux, ga, averages || world == 1 ? world : 1);
    EXPECT_NEAR(*factor / (measured.get<double>() / ce), 1, 0.02)
        << version << " " << row["model_type"] << " W=" << world;
    EXPECT_EQ(ask_at("transformers", "aux_formula", subject, version).value, formula);
    ++judged;
  }
  EXPECT_GT(judged, 150);
  EXPECT_GT(silent, 20);
}

TEST(Oracle, AutocastLowersWhatItWasMeasuredToLower) {
  int judged = 0;
  const Json oracle = read_json("fixtures/oracle/autocast.json");
  for (const Json& row : oracle["rows"]) {
    if (row["mode"] != "bf16_weights+bf16_autocast" || !row.contains("router_logits") ||
        !row["router_logits"].is_string())
      continue;
    const BehaviourAnswer answer =
        ask_at("transformers", "autocast_lowers_router", {{"family", row["model_type"]}}, row["transformers"]);
    if (!answer.value) continue;  // a family without a YAML
    EXPECT_EQ(*answer.value, row["router_logits"] == "bfloat16" ? "true" : "false");
    EXPECT_TRUE(answer.measured);
    ++judged;
  }
  EXPECT_GE(judged, 6);
}

TEST(Oracle, TheFlagDoesWhatItWasMeasuredToDo) {
  std::set<std::string> seen;
  const Json oracle = read_json("fixtures/oracle/aux_flag.json");
  for (const Json& row : oracle["rows"]) {
    const BehaviourAnswer answer =
        ask_at("transformers", "aux_flag_effect", {{"family", row["model_type"]}}, row["transformers"]);
    if (!answer.value) continue;
    const std::string result = row["result"];
    EXPECT_EQ(*answer.value, result == "kwarg_only" ? "keyword_only" : result) << row["model_type"] << row["transformers"];
    seen.insert(row["model_type"].get<std::string>() + " " + *answer.value);
  }
  EXPECT_TRUE(seen.count("mixtral added"));
  EXPECT_TRUE(seen.count("deepseek_v3 no_field"));
}

TEST(RealClasses, RouterAndExpertsInMemory) {
  int judged = 0;
  const Json versions = read_json("fixtures/families/memory.json");
  for (const auto& [version, families] : versions.items()) {
    for (const auto& [family, memory] : families.items()) {
      for (const auto& [topic, key] :
           {std::pair{"router_is_linear", "router_is_linear"}, std::pair{"experts_fused", "experts_fused"}}) {
        const BehaviourAnswer answer = ask_at("transformers", topic, {{"family", family}}, version);
        ASSERT_TRUE(answer.value) << version << family << answer.why;
        EXPECT_EQ(*answer.value == "true", memory[key].get<bool>()) << version << " " << family;
        ++judged;
      }
    }
  }
  EXPECT_GT(judged, 60);
}

/// "1" and 1, "0" and 0.0, "false" and false are the same default.
bool same(const std::string& text, const Json& value) {
  if (value.is_boolean()) return text == (value.get<bool>() ? "true" : "false");
  return value.is_number() && std::stod(text) == value.get<double>();
}

TEST(RealClasses, DefaultsOfTrainingArguments) {
  int judged = 0;
  const Json versions = read_json("fixtures/families/training_arguments.json");
  for (const auto& [version, classes] : versions.items()) {
    for (const auto& [field, value] : classes["TrainingArguments"].items()) {
      const BehaviourAnswer answer = ask_at("transformers", "default." + field, {}, version);
      if (!answer.value) continue;
      EXPECT_TRUE(same(*answer.value, value))
          << version << " " << field << " is " << value << ", not " << *answer.value;
      ++judged;
    }
  }
  EXPECT_GT(judged, 80);
}

TEST(RealClasses, DefaultsThatChangedInConfigClasses) {
  const Json versions = read_json("fixtures/families/defaults.json");
  for (const auto& [version, families] : versions.items()) {
    if (!families.contains("gpt_oss")) continue;
    const BehaviourAnswer answer =
        ask_at("transformers", "config_default.router_aux_loss_coef", {{"family", "gpt_oss"}}, version);
    ASSERT_TRUE(answer.value) << version;
    EXPECT_TRUE(same(*answer.value, families["gpt_oss"]["router_aux_loss_coef"])) << version;
  }
}

// ---- key lists -----------------------------------------------------------------------------------------------------

bool unknown(std::string_view package, std::string_view list, std::string_view key, const std::string& versions) {
  const auto set = VersionSet::parse(versions);
  return key_unknown(package, list, key, &*set);
}

TEST(KnownKeys, AKeyIsUnknownOnlyWhereEveryReleaseOfTheSetWasRead) {
  EXPECT_TRUE(unknown("axolotl", "axolotl", "router_aux_loss_coef", "0.18.0"));
  EXPECT_FALSE(unknown("axolotl", "axolotl", "model_config", "0.18.0"));
  EXPECT_FALSE(unknown("axolotl", "axolotl", "quantize_moe_experts", "0.18.0"));
  EXPECT_TRUE(unknown("axolotl", "axolotl", "quantize_moe_experts", "0.12.0"));
  EXPECT_FALSE(unknown("axolotl", "axolotl", "quantize_moe_experts", ">=0.12,<0.19"));  // some of them know it
  EXPECT_TRUE(unknown("axolotl", "axolotl", "lora_exclude_modules", ">=0.12,<0.19"));
  EXPECT_FALSE(unknown("axolotl", "axolotl", "router_aux_loss_coef", "0.99.0"));  // never read: not judged
  EXPECT_FALSE(unknown("axolotl", "axolotl", "router_aux_loss_coef", ">=0.18"));
}

TEST(KnownKeys, ListsOfTheOtherFrameworks) {
  EXPECT_FALSE(unknown("transformers", "TrainingArguments", "evaluation_strategy", "4.45.2"));
  EXPECT_TRUE(unknown("transformers", "TrainingArguments", "evaluation_strategy", "4.57.6"));
  EXPECT_FALSE(unknown("transformers", "TrainingArguments", "average_tokens_across_devices", "4.46.2"));
  EXPECT_FALSE(unknown("peft", "LoraConfig", "target_parameters", "0.17.0"));
  EXPECT_TRUE(unknown("peft", "LoraConfig", "target_parameters", "0.16.0"));
  EXPECT_FALSE(unknown("trl", "SFTConfig", "router_aux_loss_coef", "1.7.0"));
  EXPECT_TRUE(unknown("trl", "SFTConfig", "router_aux_loss_coef", "1.5.1"));
  EXPECT_FALSE(unknown("trl", "SFTConfig", "bf16", "1.5.1"));  // of TrainingArguments
  EXPECT_FALSE(unknown("trl", "DPOConfig", "beta", "0.12.2"));
}

TEST(KnownKeys, NoListNoJudgement) {
  EXPECT_FALSE(has_key_list("axolotl", "axolotl", nullptr));  // any release, the unread ones included
  EXPECT_FALSE(key_unknown("axolotl", "axolotl", "no_such_key", nullptr));
  const auto set = VersionSet::parse("0.18.0");
  EXPECT_TRUE(has_key_list("axolotl", "axolotl", &*set));
  EXPECT_FALSE(has_key_list("axolotl", "no such list", &*set));
}

}  // namespace
}  // namespace moeaudit
