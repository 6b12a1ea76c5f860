// What LoRA configurations reach, against the real library: fixtures/peft/targets.json holds what get_peft_model of eleven
// pairs of PEFT and transformers did to tiny models of six families, more_families.json two pairs and further families
// (fixtures/make/peft_targets.py).
#include "audit/measures/peft_targets.h"

#include <set>

#include "audit/measures/peft_regimes.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
namespace {

using namespace test;
using Paths = std::set<std::string>;

/// The models of fixtures/make/peft_targets.py: two layers, few experts.
FamilyShape golden_shape(const std::string& family) {
  FamilyShape s;
  s.layers = family == "glm5_next" ? 3 : 2;
  s.hidden = 64;
  const std::set<std::string> four = {"deepseek_v3", "deepseek_v2", "glm5_next", "bailing_hybrid", "kolibri1"};
  s.experts = four.count(family) ? 4 : 2;
  s.expert_width = family == "mixtral" || family == "olmoe" || family == "gpt_oss" ? 32 : 16;
  const std::set<std::string> dense_first = {"deepseek_v3", "deepseek_v2", "glm4_moe", "dots1", "llama4_text", "jamba", "glm5_next", "bailing_hybrid"};
  s.moe_layers = family == "glm5_next" ? std::vector<std::int64_t>{1, 2} : dense_first.count(family) ? std::vector<std::int64_t>{1} : std::vector<std::int64_t>{0, 1};
  return s;
}

LoraTargets given(const nlohmann::json& row) {
  const nlohmann::json& g = row["given"];
  LoraTargets t;
  t.model_type = row["family"];
  t.rank = 4;
  auto strings = [&](const char* key, bool* is_string) {
    std::vector<std::string> out;
    if (!g.contains(key)) return out;
    if (is_string) *is_string = g[key].is_string();
    if (g[key].is_string()) out.push_back(g[key]);
    else out = g[key].get<std::vector<std::string>>();
    return out;
  };
  if (g.contains("target_modules")) t.modules = strings("target_modules", &t.modules_is_string);
  t.parameters = strings("target_parameters", nullptr);
  t.exclude = strings("exclude_modules", &t.exclude_is_string);
  t.save = strings("modules_to_save", nullptr);
  if (g.contains("layers_to_transform")) t.layers = g["layers_to_transform"].get<std::vector<std::int64_t>>();
  if (g.contains("rank_pattern")) {
    for (const auto& [key, rank] : g["rank_pattern"].items()) t.rank_pattern.emplace_back(key, rank);
  }
  if (g.contains("lora_dropout")) t.dropout = g["lora_dropout"];
  return t;
}

PeftRegime regime(const std::string& family, const std::string& transformers, const std::string& peft) {
  const auto tf = VersionSet::parse("==" + transformers), pf = VersionSet::parse("==" + peft);
  std::string why;
  const std::vector<PeftRegime> regimes = peft_regimes(family, &*tf, &*pf, &why);
  EXPECT_EQ(regimes.size(), 1u) << why;
  return regimes.empty() ? PeftRegime{} : regimes.front();
}

struct Reached {
  Paths modules, parameters, saved;
  std::map<std::string, std::int64_t> other_ranks;
};

Reached reached(const ModuleTree& tree, const TargetResolution& r, std::int64_t rank) {
  Reached out;
  for (const TargetHit& hit : r.hits) {
    const std::string& path = hit.parameter >= 0 ? tree.parameters[hit.parameter].path : tree.modules[hit.module].path;
    (hit.rank == 0 ? out.saved : hit.parameter >= 0 ? out.parameters : out.modules).insert(path);
    if (hit.rank != 0 && hit.rank != rank) out.other_ranks[path] = hit.rank;
  }
  return out;
}

TEST(PeftTargets, EveryRowOfTheRealLibrary) {
  nlohmann::json rows = read_json(fixture("peft/targets.json"));
  const nlohmann::json more = read_json(fixture("peft/more_families.json"));
  rows.insert(rows.end(), more.begin(), more.end());
  std::map<std::string, std::size_t> count;
  for (const auto& row : rows) {
    if (row["family"].is_null()) {  // this PEFT could not be imported beside this transformers
      ++count["no import"];
      continue;
    }
    const std::string family = row["family"], tf = row["transformers"], pf = row["peft"];
    SCOPED_TRACE(family + " " + std::string(row["setting"]) + " transformers " + tf + " peft " + pf);
    const PeftRegime stack = regime(family, tf, pf);
    const TensorStore store = open_weights(fixture("models/" + family + (tf[0] == '4' ? "-tf4" : "-tf5")));
    const ModuleTree tree = build_module_tree(*find_family(family), golden_shape(family), stack.layout, store);
    const TargetResolution r = resolve_targets(tree, given(row), stack.rules);
    ASSERT_EQ(r.cannot_tell, "");
    if (!row["error"].is_null()) {
      EXPECT_NE(r.refused, "") << row["error"];
      ++count["refused"];
      continue;
    }
    ASSERT_EQ(r.refused, "");
    const Reached got = reached(tree, r, 4);
    EXPECT_EQ(got.modules, row["adapted_modules"].get<Paths>());
    EXPECT_EQ(got.parameters, row["adapted_parameters"].get<Paths>());
    EXPECT_EQ(got.saved, row["modules_to_save_hits"].get<Paths>());
    EXPECT_EQ(got.other_ranks, (row["ranks_not_r"].get<std::map<std::string, std::int64_t>>()));
    ++count["reached"];
  }
  EXPECT_EQ(count["no import"], 2u);
  EXPECT_GT(count["refused"], 500u);
  EXPECT_GT(count["reached"], 1200u);
}

/// Layer 0 of this Kimi Linear has linear attention, layer 1 has latent attention; neither has a bias, both have a dense or a shared MLP.
TEST(PeftTargets, ModulesOfTheLayersThatHaveThem) {
  FamilyShape shape = golden_shape("qwen2_moe");
  shape.moe_layers = {1};
  const ModuleTree tree = build_module_tree(*find_family("kimi_linear"), shape, MemoryLayout{.router_is_linear = false, .experts_fused = true},
                                            open_weights(fixture("models/kimi_linear-tf5")));
  Paths attention;
  for (const ModelModule& m : tree.modules) {
    if (m.part == Part::kAttention && m.kind != ModelModule::Kind::kContainer) attention.insert(m.path.substr(std::string_view("model.layers.").size()));
  }
  EXPECT_EQ(attention, (Paths{"0.self_attn.b_proj", "0.self_attn.conv1d", "0.self_attn.forget_gate", "0.self_attn.forget_gate.f_a_proj",
                              "0.self_attn.forget_gate.f_b_proj", "0.self_attn.g_a_proj", "0.self_attn.g_b_proj", "0.self_attn.k_proj",
                              "0.self_attn.o_proj", "0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.kv_a_proj_with_mqa",
                              "1.self_attn.kv_b_proj", "1.self_attn.o_proj", "1.self_attn.q_proj"}));
}

// ---- details the golden table does not have ------------------------------------------------------------------------

/// A layer with linear attention has no projections of the other kind, neither their weights nor their biases.
TEST(PeftTargets, LayersOfTwoKinds) {
  for (const std::string family : {"qwen3_5_moe_text", "qwen4_exp_text"}) {
    SCOPED_TRACE(family);
    const TensorStore store = open_weights(fixture("models/" + family + "-tf5"));
    const FamilyShape shape = {3, 8, 64, 16, 32, 128, {0, 1, 2}};
    std::map<std::string, ModelModule::Kind> modules;
    for (const ModelModule& m : build_module_tree(*find_family(family), shape, regime(family, "5.23.0", "0.21.2").layout, store).modules) {
      modules[m.path] = m.kind;
    }
    for (const std::string layer : {"0", "1"}) {
      for (const auto& [path, kind] : modules) EXPECT_FALSE(path.starts_with("model.layers." + layer + ".self_attn")) << path;
      EXPECT_EQ(modules.at("model.layers." + layer + ".linear_attn.out_proj"), ModelModule::Kind::kLinear);
    }
    EXPECT_EQ(modules.at("model.layers.2.self_attn.q_proj"), ModelModule::Kind::kLinear);
    EXPECT_FALSE(modules.count("model.layers.2.linear_attn"));
    std::set<std::string> ngrams;
    for (const auto& [path, kind] : modules) {
      if (path.ends_with(".ple.key_proj") && kind == ModelModule::Kind::kLinear) ngrams.insert(path);
    }
    EXPECT_EQ(ngrams, family == "qwen4_exp_text" ? Paths{"model.layers.1.ple.key_proj"} : Paths{});
  }
}

class OnMixtral : public ::testing::Test {
 protected:
  TargetResolution resolve(const LoraTargets& t, const std::string& tf = "4.57.6", const std::string& pf = "0.18.1") {
    const PeftRegime stack = regime("mixtral", tf, pf);
    tree_ = build_module_tree(*find_family("mixtral"), golden_shape("mixtral"), stack.layout, TensorStore());
    return resolve_targets(tree_, t, stack.rules);
  }
  static LoraTargets list(std::vector<std::string> modules) {
    LoraTargets t;
    t.model_type = "mixtral";
    t.modules = std::move(modules);
    return t;
  }
  static LoraTargets text(std::string modules) {
    LoraTargets t = list({std::move(modules)});
    t.modules_is_string = true;
    return t;
  }
  ModuleTree tree_;
};

TEST_F(OnMixtral, EntriesAreCountedOneByOne) {
  LoraTargets t = list({"q_proj", "self_attn.q_proj", "w1", "gate", "gate_proj"});
  t.exclude = {"w1", "nothing"};
  t.save = {"norm"};
  const TargetResolution r = resolve(t);
  ASSERT_EQ(r.refused, "");
  const std::vector<std::int64_t> hits = {2, 2, 0, 2, 0, /* excluded */ 4, 0, /* model.norm, and *layernorm twice a layer */ 5};
  ASSERT_EQ(r.entries.size(), hits.size());
  for (std::size_t i = 0; i < hits.size(); ++i) EXPECT_EQ(r.entries[i].hits, hits[i]) << r.entries[i].text;
  EXPECT_EQ(r.entries[3].parts, (std::map<Part, std::int64_t>{{Part::kRouter, 2}}));
  EXPECT_NE(r.entries[2].why.find("excluded"), std::string::npos);
}

TEST_F(OnMixtral, ARefusalNamesTheEntryAndTheReason) {
  const TargetResolution on_5 = resolve(list({"q_proj", "gate"}), "5.2.0", "0.18.1");
  EXPECT_NE(on_5.refused.find("model.layers.0.mlp.gate"), std::string::npos);
  EXPECT_EQ(on_5.entries[0].hits, 2);
  EXPECT_EQ(on_5.entries[1].hits, 0);
  EXPECT_EQ(on_5.entries[1].why, on_5.refused);
  const TargetResolution pair = resolve(list({"w1", "w2"}), "5.2.0", "0.19.1");
  EXPECT_NE(pair.entries[0].why.find("'w1' cannot be adapted without 'w3'"), std::string::npos);
  EXPECT_EQ(pair.entries[0].fault, TargetFault::kLacksPartner);
  EXPECT_EQ(pair.entries[0].partner, "w3");
  EXPECT_EQ(pair.entries[1].hits, 2);
  EXPECT_EQ(pair.entries[1].fault, TargetFault::kNone);
  LoraTargets dropped = list({"q_proj"});
  dropped.parameters = {"mlp.experts.down_proj"};
  dropped.dropout = 0.05;
  const TargetResolution dropout = resolve(dropped, "5.2.0", "0.18.1");
  EXPECT_EQ(dropout.entries[0].fault, TargetFault::kNone);
  EXPECT_EQ(dropout.entries[1].fault, TargetFault::kDropout);
  EXPECT_EQ(dropout.entries[1].hits, 0);
  const TargetResolution letters = resolve(text("all-linear"), "5.2.0", "0.19.1");
  EXPECT_NE(letters.entries[0].why.find("letters"), std::string::npos);
  EXPECT_EQ(letters.entries[0].fault, TargetFault::kSplitString);
  EXPECT_EQ(on_5.entries[1].fault, TargetFault::kRefused);
  EXPECT_EQ(resolve(list({"nothing"})).refused.find("PEFT stops: no module"), 0u);
}

TEST_F(OnMixtral, ABareNameAsAStringIsExplained) {
  const TargetResolution r = resolve(text("q_proj"));
  EXPECT_NE(r.refused, "");
  EXPECT_NE(r.entries[0].why.find("write a list: [q_proj]"), std::string::npos);
}

TEST_F(OnMixtral, PatternsThatCannotBeRead) {
  EXPECT_NE(resolve(text(R"(.*(?<!gate)\.w1)")).cannot_tell.find("lookbehind"), std::string::npos)
      << resolve(text(R"(.*(?<!gate)\.w1)")).cannot_tell;
  const TargetResolution broken = resolve(text("*.experts"));
  EXPECT_EQ(broken.cannot_tell, "");
  EXPECT_NE(broken.refused.find("nothing to repeat"), std::string::npos);
  EXPECT_EQ(broken.entries[0].why, broken.refused);
}

TEST_F(OnMixtral, EmbeddingsAndHeadAreLayersToo) {
  const TargetResolution r = resolve(list({"embed_tokens", "lm_head"}));
  ASSERT_EQ(r.refused, "");
  ASSERT_EQ(r.hits.size(), 2u);
  EXPECT_EQ(resolve(text("all-linear")).entries[0].parts.count(Part::kHead), 0u);
}

// Axolotl lists the last names of linear layers, so PEFT's trouble with strings does not touch it: on transformers 5 it gets
// the attention, whatever the PEFT.
TEST_F(OnMixtral, AxolotlListsLeafNames) {
  LoraTargets t = text("all-linear");
  t.linear_leaf_names = true;
  const std::map<Part, std::int64_t> everything = {{Part::kRouter, 2}, {Part::kRoutedExpert, 12}, {Part::kAttention, 8}};
  EXPECT_EQ(resolve(t).entries[0].parts, everything);
  for (const char* peft : {"0.18.1", "0.19.1", "0.21.2"}) {
    const TargetResolution r = resolve(t, "5.2.0", peft);
    EXPECT_EQ(r.refused, "") << peft;
    EXPECT_EQ(r.entries[0].parts, (std::map<Part, std::int64_t>{{Part::kAttention, 8}})) << peft;
  }
}

TEST_F(OnMixtral, LongPatternsOverManyModulesEnd) {
  const PeftRegime stack = regime("mixtral", "4.57.6", "0.18.1");
  FamilyShape big = golden_shape("mixtral");
  big.layers = 60;
  big.experts = 256;
  for (std::int64_t l = 0; l < 60; ++l) big.moe_layers.push_back(l);
  const ModuleTree tree = build_module_tree(*find_family("mixtral"), big, stack.layout, TensorStore());
  EXPECT_GT(tree.modules.size(), 46'000u);
  const TargetResolution quick = resolve_targets(tree, text(R"(.*\.(q_proj|k_proj|v_proj|o_proj|w1|w2|w3))"), stack.rules);
  EXPECT_EQ(quick.cannot_tell, "");
  const TargetResolution hostile = resolve_targets(tree, text("((.*)*(.*)*){300}x"), stack.rules);
  EXPECT_NE(hostile.cannot_tell + hostile.refused, "");
}

// ---- stacks ----------------------------------------------------------------------------------------------------------

TEST(PeftRegimes, AnUnknownVersionGivesEveryKindOfStack) {
  std::string why;
  const std::vector<PeftRegime> all = peft_regimes("mixtral", nullptr, nullptr, &why);
  EXPECT_EQ(why, "");
  std::set<std::pair<bool, std::string>> kinds;
  for (const PeftRegime& r : all) kinds.insert({r.layout.experts_fused, r.rules.conversion + (r.rules.strings_become_letters ? " letters" : "")});
  EXPECT_EQ(kinds, (std::set<std::pair<bool, std::string>>{{false, ""}, {true, ""}, {true, "mixtral letters"}, {true, "mixtral"}}));

  const auto five = VersionSet::parse(">=5.0,<6"), peft = VersionSet::parse(">=0.20");
  const std::vector<PeftRegime> narrow = peft_regimes("mixtral", &*five, &*peft, &why);
  ASSERT_EQ(narrow.size(), 1u);
  EXPECT_EQ(narrow[0].rules.conversion, "mixtral");
}

// transformers 5.5.2 dropped the entry through which PEFT finds Qwen2-MoE's table (pull request 45340).
TEST(PeftRegimes, Qwen2MoeLosesItsTable) {
  EXPECT_EQ(regime("qwen2_moe", "5.5.1", "0.19.1").rules.conversion, "qwen2_moe");
  EXPECT_EQ(regime("qwen2_moe", "5.5.2", "0.19.1").rules.conversion, "");
  EXPECT_EQ(regime("qwen3_moe", "5.5.2", "0.19.1").rules.conversion, "qwen2_moe");
  EXPECT_EQ(regime("gpt_oss", "5.5.2", "0.19.1").rules.conversion, "");
}

TEST(PeftRegimes, AFamilyWithoutRowsSaysSo) {
  std::string why;
  EXPECT_TRUE(peft_regimes("no_such_family", nullptr, nullptr, &why).empty());
  EXPECT_NE(why, "");
}

}  // namespace
}  // namespace moeaudit
