// Families against the real libraries: tensor names of models that save_pretrained wrote, defaults of the config
// classes.
#include "audit/families/family.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "audit/behaviours/behaviour.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Where = FamilyTensor::Where;
const fs::path kSource = MOE_AUDIT_SOURCE_DIR;

Json read_json(const fs::path& path) {
  std::ifstream in(path);
  return Json::parse(in);
}

/// Tensor names and shapes of every safetensors file of a folder; the header read by hand, not by the code under test.
std::map<std::string, std::vector<std::int64_t>> tensors_of(const fs::path& dir) {
  std::map<std::string, std::vector<std::int64_t>> out;
  for (const auto& entry : fs::directory_iterator(dir)) {
    if (entry.path().extension() != ".safetensors") continue;
    std::ifstream in(entry.path(), std::ios::binary);
    char length[8];
    in.read(length, 8);
    std::uint64_t size = 0;
    std::memcpy(&size, length, 8);
    std::string header(size, '\0');
    in.read(header.data(), static_cast<std::streamsize>(size));
    const Json json = Json::parse(header);
    for (const auto& [name, tensor] : json.items()) {
      if (name != "__metadata__") out[name] = tensor["shape"].get<std::vector<std::int64_t>>();
    }
  }
  return out;
}

std::int64_t number(const Json& config, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    if (config.contains(key)) return (config[key].is_array() ? config[key][0] : config[key]).get<std::int64_t>();
  }
  return 0;
}

FamilyShape shape_of(const Json& root) {
  const Json& outer = root.contains("thinker_config") ? root["thinker_config"] : root;
  const Json& c = outer.contains("text_config") ? outer["text_config"] : outer;
  FamilyShape s;
  s.layers = c.contains("layers_block_type") ? static_cast<std::int64_t>(c["layers_block_type"].size())
                                             : number(c, {"num_layers", "num_hidden_layers", "n_layers"});
  const Json& ffn = c.contains("ffn_config") ? c["ffn_config"] : c;
  s.experts = number(ffn, {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"});
  s.hidden = number(c, {"hidden_size", "d_model"});
  s.expert_width = number(ffn, {"moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size"});
  s.shared_width = number(c, {"shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim", "moe_shared_expert_intermediate_size"});
  if (s.shared_width == 0) s.shared_width = number(c, {"n_shared_experts", "moe_num_shared_experts", "num_shared_experts"}) * s.expert_width;
  if (root["model_type"] == "deepseek_v4") s.shared_width = s.expert_width;
  s.vocabulary = number(c, {"vocab_size"});
  s.expert_input = number(c, {"moe_latent_size"});
  if (const std::string type = root["model_type"]; type == "zaya") s.extra_rows = 1;
  else if (type.starts_with("inkling")) s.extra_rows = number(c, {"n_shared_experts"});
  else s.extra_rows = number(c, {"zero_expert_num"});
  std::set<std::int64_t> dense;  // by what the configs of these fixtures say
  for (std::int64_t l = 0; l < s.layers; ++l) {
    if (c.contains("layers_block_type")) {
      if (c["layers_block_type"][l] != "moe") dense.insert(l);
    } else if (c.contains("mlp_layer_types")) {
      if (c["mlp_layer_types"][l] == "dense") dense.insert(l);
    } else if (l < number(c, {"first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"})) {
      dense.insert(l);
    }
    if (c.contains("mlp_only_layers")) dense.insert(c["mlp_only_layers"].begin(), c["mlp_only_layers"].end());
    if (c.contains("expert_layer_period") && l % c["expert_layer_period"].get<int>() != c["expert_layer_offset"].get<int>())
      dense.insert(l);
    if (const auto listed = c.find("moe_layers"); listed != c.end() && listed->is_array() &&
        std::find(listed->begin(), listed->end(), l) == listed->end())
      dense.insert(l);
    if (!dense.count(l)) s.moe_layers.push_back(l);
  }
  if (c.value("is_encoder_decoder", false)) {  // the second of two layers in each stack
    s.encoder_layers = number(c, {"encoder_layers", "num_layers"});
    s.layers = s.encoder_layers + number(c, {"decoder_layers", "num_decoder_layers"});
    s.expert_width = number(c, {"d_ff", "encoder_ffn_dim"});
    s.moe_layers = {1, 3};
  }
  return s;
}

struct Comparison {
  std::vector<std::string> missing, unexpected, wrong_shape;
};

Comparison compare(const Family& family, const FamilyShape& shape, Where where,
                   const std::map<std::string, std::vector<std::int64_t>>& have) {
  Comparison result;
  std::set<std::string> known;
  for (const ExpandedTensor& t : expand(family, shape, where)) {
    known.insert(t.name);
    const auto found = have.find(t.name);
    if (found == have.end()) {
      const bool replaced = std::any_of(t.alternatives.begin(), t.alternatives.end(), [&](const auto& other) { return have.count(other) != 0; });
      if (t.alternatives.empty() ? !t.optional : !replaced) result.missing.push_back(t.name);
      continue;
    }
    bool same = t.shape.size() == found->second.size();
    for (std::size_t i = 0; same && i < t.shape.size(); ++i) same = t.shape[i] == -1 || t.shape[i] == found->second[i];
    if (!same) result.wrong_shape.push_back(t.name);
  }
  for (const auto& [name, dims] : have) {  // what another tower holds is nobody's business here
    const bool tower = is_known_extra(family, name) && classify(&family, name).part == Part::kOther;
    if (!known.count(name) && !tower) result.unexpected.push_back(name);
  }
  return result;
}

class SavedModel : public testing::TestWithParam<const char*> {};

TEST_P(SavedModel, HasExactlyTheTensorsOfItsFamily) {
  const fs::path dir = kSource / "fixtures/models" / GetParam();
  const Json config = read_json(dir / "config.json");
  const Family* family = find_family_by_model_type(config["model_type"].get<std::string>());
  ASSERT_NE(family, nullptr);
  // As in memory: what was saved so, and what transformers 5 does not turn round when it saves.
  const std::string name = GetParam();
  const bool fused = name.find("fused") != std::string::npos || name == "qwen3_vl_moe-tf5";
  const auto have = tensors_of(dir);
  ASSERT_GT(have.size(), 20u);  // stacked families have few
  const Comparison c = compare(*family, shape_of(config), fused ? Where::kMemory : Where::kHub, have);
  EXPECT_EQ(c.missing, std::vector<std::string>{});
  EXPECT_EQ(c.unexpected, std::vector<std::string>{});
  EXPECT_EQ(c.wrong_shape, std::vector<std::string>{});
}

TEST_P(SavedModel, EveryTensorHasTheSamePartByNameAsByPattern) {
  const fs::path dir = kSource / "fixtures/models" / GetParam();
  const Json config = read_json(dir / "config.json");
  const Family* family = find_family_by_model_type(config["model_type"].get<std::string>());
  ASSERT_NE(family, nullptr);
  const auto have = tensors_of(dir);
  for (Where where : {Where::kHub, Where::kMemory}) {
    for (const ExpandedTensor& t : expand(*family, shape_of(config), where)) {
      if (!have.count(t.name)) continue;
      const NamedPart named = classify(family, t.name, shape_of(config).encoder_layers, shape_of(config).experts);
      EXPECT_STREQ(name_of(named.part), name_of(t.part)) << t.name;
      EXPECT_EQ(named.layer, t.layer) << t.name;
      EXPECT_EQ(named.expert, t.expert) << t.name;
      if (t.part == Part::kOther) continue;  // of a second set of experts, which the family alone knows
      // The names alone lead to the same part, but for norms and biases whose names say nothing of it.
      EXPECT_STREQ(name_of(classify(nullptr, t.name).part), name_of(t.part)) << t.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, SavedModel,
                         testing::Values("mixtral-tf4", "mixtral-tf5", "mixtral-tf5-fused", "mixtral-tf4-sharded",
                                         "qwen2_moe-tf4", "qwen2_moe-tf5", "qwen3_moe-tf4", "qwen3_moe-tf5",
                                         "qwen3_moe-tf5-fused", "olmoe-tf4", "olmoe-tf5", "deepseek_v3-tf4",
                                         "deepseek_v3-tf5", "gpt_oss-tf4", "gpt_oss-tf5", "deepseek_v2-tf4", "deepseek_v2-tf5",
                                         "glm4_moe-tf4", "glm4_moe-tf5", "dots1-tf4", "dots1-tf5", "granitemoe-tf4",
                                         "granitemoe-tf5", "granitemoe-tf5-fused", "llama4_text-tf4", "llama4_text-tf5",
                                         "dbrx-tf4", "dbrx-tf5", "phimoe-tf4", "phimoe-tf5", "phimoe-tf5-fused",
                                         "jamba-tf4", "jamba-tf5", "jamba-tf5-fused", "qwen3_next-tf4", "qwen3_next-tf5",
                                         "qwen3_5_moe_text-tf5", "qwen3_5_moe-tf5", "minimax_m2-tf5", "hunyuan_v1_moe-tf4",
                                         "hunyuan_v1_moe-tf5", "ernie4_5_moe-tf4", "ernie4_5_moe-tf5", "switch_transformers-tf4",
                                         "switch_transformers-tf5", "nllb_moe-tf4", "nllb_moe-tf5", "flex_olmo-tf4",
                                         "flex_olmo-tf5", "granitemoeshared-tf4", "granitemoeshared-tf5", "minimax-tf4",
                                         "minimax-tf5", "glm4_moe_lite-tf5", "deepseek_v32-tf5", "glm_moe_dsa-tf5",
                                         "exaone_moe-tf5", "solar_open-tf5", "mimo_v2_flash-tf5", "granitemoehybrid-tf4",
                                         "granitemoehybrid-tf5", "lfm2_moe-tf5", "glm4v_moe-tf4",
                                         "glm4v_moe-tf5", "mellum-tf5", "granitemoe_swa-tf5", "mistral4-tf5", "qwen3_vl_moe-tf4",
                                         "qwen3_vl_moe-tf5", "qwen3_omni_moe-tf4", "qwen3_omni_moe-tf5",
                                         "qwen3_omni_moe_thinker-tf4", "qwen3_omni_moe_thinker-tf5",
                                         "aria-tf4", "aria-tf5", "aria_text-tf4", "aria_text-tf5", "minimax_m3_vl-tf5",
                                         "minimax_m3_vl_text-tf5", "openai_privacy_filter-tf5", "step3p7-tf5",
                                         "laguna-tf5", "cohere2_moe-tf5", "deepseek_ocr2-tf5", "jetmoe-tf4",
                                         "jetmoe-tf5", "axk1-tf5", "hy_v3-tf5", "afmoe-tf5",
                                         "gemma4_text-tf5", "gemma4-tf5", "inkling_text-tf5", "inkling-tf5", "zaya-tf5", "diffusion_gemma-tf5",
                                         "longcat_flash-tf4", "longcat_flash-tf5", "deepseek_v4-tf5", "doge-tf4", "doge-tf5",
                                         "kimi_linear-tf5", "hy_v4-tf5", "axk2-tf5", "ernie4_5_vl_moe-tf5",
                                         "nemotron_h-tf5", "kimi_k25-tf5", "glm5_next-tf5", "bailing_hybrid-tf5", "kolibri1-tf5",
                                         "qwen4_exp_text-tf5", "qwen4_exp-tf5", "mistral_large4-tf5"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(Family, ComparisonSeesAMissingTensorAndAnExtraOne) {
  const fs::path dir = kSource / "fixtures/models/mixtral-tf4";
  auto have = tensors_of(dir);
  have.erase("model.layers.2.block_sparse_moe.gate.weight");
  have["model.layers.2.block_sparse_moe.gates.weight"] = {8, 64};
  const Comparison c = compare(*find_family("mixtral"), shape_of(read_json(dir / "config.json")), Where::kHub, have);
  EXPECT_EQ(c.missing, std::vector<std::string>{"model.layers.2.block_sparse_moe.gate.weight"});
  EXPECT_EQ(c.unexpected, std::vector<std::string>{"model.layers.2.block_sparse_moe.gates.weight"});
}

/// Counts that the published indices of the released checkpoints have.
TEST(Family, ExpandsToThePublishedTensorCounts) {
  FamilyShape mixtral{32, 8, 4096, 14336, 0, 32000, {}};
  for (int l = 0; l < 32; ++l) mixtral.moe_layers.push_back(l);
  const auto tensors = expand(*find_family("mixtral"), mixtral, Where::kHub);
  EXPECT_EQ(tensors.size(), 995u);  // 32 layers x (2 norms + 4 projections + gate + 8 x 3) + embeddings, norm, head
  std::int64_t parameters = 0;
  for (const ExpandedTensor& t : tensors) {
    std::int64_t n = 1;
    for (std::int64_t d : t.shape) n *= d;
    if (std::find(t.shape.begin(), t.shape.end(), -1) == t.shape.end()) parameters += n;
  }
  // 46.7 B in all, less attention projections ("?"): 32 x (2 x 4096^2 + 2 x 4096 x 1024) = 1,342,177,280.
  EXPECT_EQ(parameters, 46702792704 - 1342177280);
}

TEST(Family, DenseAndMoeLayersAndAlternatives) {
  const Family& f = *find_family("deepseek_v3");
  FamilyShape s{3, 2, 8, 4, 4, 16, {1, 2}};
  auto tensors = expand(f, s, Where::kHub);
  std::map<std::string, const ExpandedTensor*> by_name;
  for (const auto& t : tensors) by_name[t.name] = &t;
  EXPECT_TRUE(by_name.count("model.layers.0.mlp.gate_proj.weight"));
  EXPECT_FALSE(by_name.count("model.layers.1.mlp.gate_proj.weight"));
  EXPECT_FALSE(by_name.count("model.layers.0.mlp.gate.weight"));
  EXPECT_TRUE(by_name.count("model.layers.2.mlp.experts.1.down_proj.weight"));
  EXPECT_FALSE(by_name.count("model.layers.2.mlp.experts.2.down_proj.weight"));
  EXPECT_EQ(by_name.at("model.layers.1.self_attn.q_b_proj.weight")->alternatives,
            std::vector<std::string>{"model.layers.1.self_attn.q_proj.weight"});
  EXPECT_TRUE(by_name.at("model.layers.1.self_attn.q_b_proj.weight")->optional);
  EXPECT_FALSE(by_name.at("model.layers.1.self_attn.kv_b_proj.weight")->optional);
}

/// A layer of Nemotron-H is one of three things, or has experts: without any of the three, all three are missing.
TEST(Family, OneOfSeveralAlternatives) {
  const Family& f = *find_family("nemotron_h");
  FamilyShape s;
  s.layers = 1, s.experts = 2, s.hidden = 8;
  std::map<std::string, std::vector<std::int64_t>> have;
  for (const char* name : {"backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers.0.norm.weight", "lm_head.weight"}) have[name] = {};
  const auto missing = [&] { return compare(f, s, Where::kHub, have).missing; };
  EXPECT_EQ(missing().size(), 13u);  // 7 of Mamba, 4 of attention, 2 of an MLP
  have["backbone.layers.0.mixer.up_proj.weight"] = {};
  EXPECT_EQ(missing(), std::vector<std::string>{"backbone.layers.0.mixer.down_proj.weight"});
  have["backbone.layers.0.mixer.down_proj.weight"] = {};
  EXPECT_EQ(missing(), std::vector<std::string>{});
}

TEST(Family, UnknownAndOverflowingSizesGiveAnyDimension) {
  FamilyShape s{1, 4, 0, std::int64_t{1} << 62, 0, 0, {0}};
  for (const auto& t : expand(*find_family("mixtral"), s, Where::kMemory)) {
    if (t.name.find("gate_up_proj") == std::string::npos) continue;
    EXPECT_EQ(t.shape, (std::vector<std::int64_t>{4, -1, -1}));  // 2 * 2^62 does not fit; hidden is unknown
  }
}

TEST(Family, KnownExtras) {
  const Family& f = *find_family("deepseek_v3");
  EXPECT_TRUE(is_known_extra(f, "model.layers.61.enorm.weight"));
  EXPECT_TRUE(is_known_extra(f, "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv"));
  EXPECT_FALSE(is_known_extra(f, "model.layers.6.enorm.weight"));
  EXPECT_FALSE(is_known_extra(f, "model.layers.3.mlp.gate.weight"));
}

/// A flag that only the call can set is no field of the config class, and its coefficient need not be one.
bool flag_is_no_field(const std::string& family, const std::string& version) {
  const std::optional<VersionSet> set = VersionSet::parse(version);
  return ask({"transformers", "aux_flag_effect", {{"family", family}}}, set ? &*set : nullptr).value == "keyword_only";
}

/// Every default of every family, against the real config classes of several transformers releases.
TEST(Family, DefaultsAreThoseOfTheConfigClasses) {
  const Json versions = read_json(kSource / "fixtures/families/defaults.json");
  ASSERT_GE(versions.size(), 4u);
  int compared = 0;
  for (const auto& [version, families] : versions.items()) {
    for (const auto& [name, config] : families.items()) {
      const Family* family = find_family(name);
      ASSERT_NE(family, nullptr) << name;
      EXPECT_EQ(family, find_family_by_model_type(config["model_type"].get<std::string>()));
      for (const FamilyKey& row : family->keys) {
        if (row.keys.empty()) continue;
        const auto spelling =
            std::find_if(row.keys.begin(), row.keys.end(), [&](auto k) { return config.contains(std::string(k)); });
        if (spelling == row.keys.end() && row.fact.starts_with("balance.") && flag_is_no_field(name, version)) continue;
        ASSERT_NE(spelling, row.keys.end()) << version << " " << name << " has no " << row.keys[0];
        const Json& value = config[std::string(*spelling)];
        if (row.default_value.empty()) continue;
        EXPECT_EQ(Json::parse(row.default_value), value) << version << " " << name << " " << *spelling;
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 300);
}

/// What the rule of the MoE layers falls back to, against the real config classes.
TEST(Family, LayerRulesFallBackToTheDefaultsOfTheConfigClasses) {
  const Json versions = read_json(kSource / "fixtures/families/defaults.json");
  int compared = 0;
  for (const auto& [version, families] : versions.items()) {
    for (const auto& [name, config] : families.items()) {
      const MoeLayerRule& rule = find_family(name)->moe_layer_rule;
      // The class writes out the words that a config may leave out; that of deepseek_ocr2 has none, others have a number.
      const Json words = rule.types.empty() || rule.counts ? Json() : config.value(std::string(rule.types[0].key), Json());
      if (words.is_array()) {
        for (std::size_t l = 0; l < words.size(); ++l)
          EXPECT_EQ(words[l] == rule.types[0].value, static_cast<std::int64_t>(l) >= rule.from.fallback) << version << " " << name << " " << l;
        EXPECT_GT(words.size(), 2u) << version << " " << name;
      }
      for (const LayerKey& key : {rule.from, rule.to, rule.every, rule.offset}) {
        if (key.key.empty()) continue;
        // Before 5.15, the class of glm_moe_dsa has the words alone.
        if (!rule.types.empty() && !config.contains(std::string(key.key))) continue;
        // The class of ernie4_5_moe puts the last layer for the -1 that its signature has.
        const bool last = key.fallback == -1;
        EXPECT_EQ(config.value(std::string(key.key), Json()), last ? config["num_hidden_layers"].get<std::int64_t>() - 1 : key.fallback) << version << " " << name << " " << key.key;
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 30);
}

/// gpt_oss has no default for the coefficient because the releases differ; if they ever agree, the YAML should have it.
TEST(Family, ADefaultIsLeftOutOnlyWhereReleasesDiffer) {
  const Json versions = read_json(kSource / "fixtures/families/defaults.json");
  for (int i = 0; i < kNumFamilies; ++i) {
    for (const FamilyKey& row : kFamilies[i].keys) {
      if (!row.default_value.empty()) continue;
      std::set<std::string> values;
      for (const auto& [version, families] : versions.items()) {
        const std::string name(kFamilies[i].name), key(row.keys[0]);
        if (families.contains(name) && families[name].contains(key)) values.insert(families[name][key].dump());
      }
      if (values == std::set<std::string>{"null"}) continue;  // there is none
      EXPECT_GT(values.size(), 1u) << kFamilies[i].name << " " << row.keys[0];
    }
  }
}

TEST(Family, LookUps) {
  EXPECT_EQ(find_family_by_model_type("mixtral")->name, "mixtral");
  EXPECT_EQ(find_family_by_model_type("llama"), nullptr);
  EXPECT_EQ(find_family(""), nullptr);
  std::set<std::string_view> types;
  for (int i = 0; i < kNumFamilies; ++i) {
    for (std::string_view type : kFamilies[i].model_types) EXPECT_TRUE(types.insert(type).second) << type;
    EXPECT_FALSE(kFamilies[i].cites.empty());
  }
}

TEST(Family, HubIdsAreFoundWhateverTheirCase) {
  const HubModel* m = find_hub_model("mistralai/Mixtral-8x7B-v0.1");
  ASSERT_NE(m, nullptr);
  EXPECT_EQ(m, find_hub_model("MistralAI/mixtral-8x7b-V0.1"));
  EXPECT_EQ(m->family, "mixtral");
  EXPECT_EQ(find_hub_model("mistralai/Mistral-7B-v0.1"), nullptr);
  for (int i = 0; i < kNumHubModels; ++i) {
    const Family* family = find_family(kHubModels[i].family);
    ASSERT_NE(family, nullptr) << kHubModels[i].id;
    EXPECT_FALSE(kHubModels[i].cite.empty());
    // What rules need of a base model that is not on this machine.
    for (std::string_view fact : {"router.num_experts", "router.top_k", "model.num_layers", "model.hidden_size"}) {
      const auto row =
          std::find_if(family->keys.begin(), family->keys.end(), [&](const FamilyKey& k) { return k.fact == fact; });
      ASSERT_NE(row, family->keys.end());
      const bool given = std::any_of(kHubModels[i].config.begin(), kHubModels[i].config.end(), [&](const auto& c) {
        return std::find(row->keys.begin(), row->keys.end(), c.first) != row->keys.end();
      });
      EXPECT_TRUE(given) << kHubModels[i].id << " " << fact;
    }
  }
}

}  // namespace
}  // namespace moeaudit
