// What a config.json means for the model, family by family: MoE layers, nested keys, the order that measures replay.
#include <gtest/gtest.h>

#include <limits>

#include "audit/inputs/inputs.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using Layers = std::vector<std::int64_t>;

FactSheet facts_of(const std::string& config, const std::string& transformers = "5.23.0") {
  test::TempTree tree;
  tree.write("config.json", config);
  RunOptions options;
  options.models = {tree.path()};
  if (!transformers.empty()) options.assume = {{"transformers", transformers}};
  std::vector<LoadedRun> runs = load_runs(options);
  EXPECT_EQ(runs.size(), 1u);
  return std::move(runs.at(0).facts);
}

Layers moe_layers(const std::string& config) {
  const FactSheet f = facts_of(config);
  return f.moe_layers.known() ? f.moe_layers.value() : Layers{-1};
}

TEST(ResolveModel, MoeLayersByTheRuleOfTheFamily) {
  EXPECT_EQ(moe_layers(R"({"model_type": "deepseek_v3", "num_hidden_layers": 5})"), (Layers{3, 4}));
  EXPECT_EQ(moe_layers(R"({"model_type": "glm4_moe", "num_hidden_layers": 3})"), (Layers{1, 2}));
  EXPECT_EQ(moe_layers(R"({"model_type": "dots1", "num_hidden_layers": 2})"), (Layers{0, 1}));
  EXPECT_EQ(moe_layers(R"({"model_type": "deepseek_v2", "num_hidden_layers": 3, "first_k_dense_replace": 2})"),
            (Layers{2}));
  EXPECT_EQ(moe_layers(R"({"model_type": "jamba", "num_hidden_layers": 6})"), (Layers{1, 3, 5}));
  EXPECT_EQ(moe_layers(R"({"model_type": "jamba", "num_hidden_layers": 6, "expert_layer_period": 3,
                           "expert_layer_offset": 0})"),
            (Layers{0, 3}));
  EXPECT_EQ(moe_layers(R"({"model_type": "llama4_text", "num_hidden_layers": 4, "interleave_moe_layer_step": 2})"),
            (Layers{1, 3}));
  EXPECT_EQ(moe_layers(R"({"model_type": "llama4_text", "num_hidden_layers": 4, "moe_layers": [0, 2, 3]})"),
            (Layers{0, 2, 3}));
  EXPECT_EQ(moe_layers(R"({"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2,
                           "mlp_only_layers": [3]})"),
            (Layers{1, 5}));
  EXPECT_EQ(moe_layers(R"({"model_type": "dbrx", "n_layers": 2})"), (Layers{0, 1}));
  EXPECT_EQ(moe_layers(R"({"model_type": "exaone_moe", "num_hidden_layers": 4, "first_k_dense_replace": 2})"), (Layers{2, 3}));
  EXPECT_EQ(moe_layers(R"({"model_type": "exaone_moe", "num_hidden_layers": 4, "first_k_dense_replace": 2,
                           "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]})"),
            (Layers{0, 2, 3}));
  EXPECT_EQ(moe_layers(R"({"model_type": "glm4_moe_lite", "num_hidden_layers": 3, "mlp_layer_types": null})"), (Layers{1, 2}));
  EXPECT_EQ(moe_layers(R"({"model_type": "minimax_m3_vl", "text_config": {"num_hidden_layers": 3, "moe_layer_freq": [0, 1, 1]}})"), (Layers{1, 2}));
  EXPECT_EQ(moe_layers(R"({"model_type": "minimax_m3_vl", "text_config": {"num_hidden_layers": 3, "moe_layer_freq": [0, 1, 1],
                           "mlp_layer_types": ["sparse", "dense", "dense"]}})"),
            (Layers{0}));
  EXPECT_EQ(moe_layers(R"({"model_type": "minimax_m3_vl", "text_config": {"num_hidden_layers": 2}})"), (Layers{0, 1}));
  EXPECT_EQ(moe_layers(R"({"model_type": "step3p7", "text_config": {"num_hidden_layers": 5, "moe_layers_enum": "1, 4"}})"), (Layers{1, 4}));
  EXPECT_EQ(moe_layers(R"({"model_type": "step3p7", "text_config": {"num_hidden_layers": 5, "moe_layers_enum": "1, x"}})"), (Layers{3, 4}));  // no list
  EXPECT_EQ(moe_layers(R"({"model_type": "step3p7", "text_config": {"num_hidden_layers": 5, "moe_layers_enum": [2, 3]}})"), (Layers{2, 3}));
  EXPECT_EQ(moe_layers(R"({"model_type": "step3p7", "text_config": {"num_hidden_layers": 5}})"), (Layers{3, 4}));
}

TEST(ResolveModel, NonsenseInALayerRuleEndsWell) {
  EXPECT_EQ(moe_layers(R"({"model_type": "jamba", "num_hidden_layers": 2, "expert_layer_period": 0,
                           "expert_layer_offset": 0})"),
            (Layers{0, 1}));
  EXPECT_EQ(moe_layers(R"({"model_type": "jamba", "num_hidden_layers": 2, "expert_layer_period": -7,
                           "expert_layer_offset": 9223372036854775807})"),
            (Layers{}));
  EXPECT_EQ(moe_layers(R"({"model_type": "llama4_text", "num_hidden_layers": 2, "moe_layers": ["a", -1, 1e99]})"),
            (Layers{}));
  EXPECT_EQ(moe_layers(R"({"model_type": "exaone_moe", "num_hidden_layers": 3, "mlp_layer_types": [null, "sparse"]})"), (Layers{1}));
}

TEST(ResolveModel, TheListOfLayersCountsThem) {
  const FactSheet words = facts_of(R"({"model_type": "nemotron_h", "num_hidden_layers": 7, "hybrid_override_pattern": "EEE",
                                       "layers_block_type": ["mamba", "moe", "attention", "mlp", "moe"]})");
  EXPECT_EQ(words.num_layers.value(), 5);  // the class ignores num_hidden_layers, and the letters where there are words
  EXPECT_EQ(words.num_layers.source().cite, "the length of layers_block_type");
  EXPECT_EQ(words.moe_layers.value(), (Layers{1, 4}));
  EXPECT_EQ(words.num_dense_layers.value(), 3);
  const FactSheet letters = facts_of(R"({"model_type": "nemotron_h", "num_hidden_layers": 6, "layers_block_type": null, "hybrid_override_pattern": "MEM*-E"})");
  EXPECT_EQ(letters.num_layers.value(), 6);
  EXPECT_EQ(letters.moe_layers.value(), (Layers{1, 5}));
  const FactSheet neither = facts_of(R"({"model_type": "nemotron_h", "num_hidden_layers": 6})");
  EXPECT_TRUE(neither.has_moe.value());
  EXPECT_FALSE(neither.num_layers.known());
  EXPECT_EQ(neither.num_layers.why_unknown(), "the configuration has no list layers_block_type or hybrid_override_pattern");
  EXPECT_FALSE(neither.moe_layers.known());
}

/// More files of the same model would settle nothing: the reason says so, and no hint asks for them.
TEST(ResolveModel, AFamilyWithoutATableIsNamedAsTheReason) {
  const FactSheet stranger = facts_of(R"({"model_type": "moe_of_tomorrow", "num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": true})");
  EXPECT_TRUE(stranger.has_moe.value());
  EXPECT_EQ(stranger.num_experts.value(), 8);
  for (const std::string& why : {stranger.top_k.why_unknown(), stranger.balance.why_unknown(), stranger.routing.why_unknown()})
    EXPECT_EQ(why, "nothing is recorded about model_type moe_of_tomorrow");
  const FactSheet dense = facts_of(R"({"model_type": "dense_of_tomorrow", "hidden_size": 8})");
  EXPECT_FALSE(dense.has_moe.value());
  EXPECT_EQ(dense.top_k.why_unknown(), "");
}

TEST(ResolveModel, AnotherClassOfTheSameModelTypeIsNotTheFamily) {
  const auto family = [](const std::string& rest) { return facts_of(R"({"num_experts": 8, "num_local_experts": 8, )" + rest + "}").family.value(); };
  const std::string own = R"(, "auto_map": {"AutoModelForCausalLM": "modeling.Own"})";
  EXPECT_EQ(family(R"("model_type": "bailing_hybrid", "architectures": ["BailingMoeV2_5ForCausalLM"])" + own), "unknown");
  EXPECT_EQ(family(R"("model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"])" + own), "bailing_hybrid");
  EXPECT_EQ(family(R"("model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"])" + own), "phimoe");
  EXPECT_EQ(family(R"("model_type": "bailing_hybrid", "architectures": ["SomethingElse"])"), "bailing_hybrid");
}

TEST(ResolveModel, OtherWordsForTheSameLayersAreNoChange) {
  test::TempTree tree;
  RunOptions options;
  options.bases = {tree.path("base")};
  const std::string head = R"({"model_type": "nemotron_h", "hybrid_override_pattern": )";
  tree.write("base/config.json", head + R"("ME*E"})");
  const auto changed = [&](const std::string& config) {
    tree.write("checkpoint-3/config.json", config);
    tree.write("checkpoint-3/trainer_state.json", R"({"global_step": 3, "log_history": []})");
    options.paths = {tree.path("checkpoint-3")};
    const LoadedRun run = std::move(load_runs(options).at(0));
    EXPECT_TRUE(run.facts.base_config.known()) << run.facts.base_config.why_unknown();
    return run.facts.base_config.known() ? run.facts.base_config.value().key : std::vector<std::string>{"unknown"};
  };
  const std::string words = R"({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "moe", "full_attention", )";
  EXPECT_EQ(changed(words + R"("moe"]})"), std::vector<std::string>{});
  EXPECT_EQ(changed(words + R"("mlp"]})"), std::vector<std::string>{"layers_block_type"});
  EXPECT_EQ(changed(words + R"("moe", "mlp"]})"), std::vector<std::string>{"layers_block_type"});
}

TEST(ResolveModel, DenseIfTheListOfLayersNamesNoExperts) {
  for (const char* layers : {R"("hybrid_override_pattern": "M-M*-")", R"("layers_block_type": ["mamba", "mlp", "attention"])"}) {
    const FactSheet f = facts_of(R"({"model_type": "nemotron_h", "n_routed_experts": 8, )" + std::string(layers) + "}");
    EXPECT_FALSE(f.has_moe.value()) << layers;
    EXPECT_FALSE(f.family.known());
    EXPECT_FALSE(f.num_experts.known());
  }
  EXPECT_TRUE(facts_of(R"({"model_type": "nemotron_h", "layers_block_type": ["moe"]})").has_moe.value());
}

TEST(ResolveModel, WhatAnExpertGets) {
  const std::string head = R"({"model_type": "nemotron_h", "hybrid_override_pattern": "ME", "hidden_size": 8, "n_routed_experts": 4,
                               "moe_intermediate_size": 3, "moe_latent_size": )";
  const FactSheet latent = facts_of(head + "2}"), plain = facts_of(head + "null}");
  EXPECT_EQ(latent.expert_input.value(), 2);
  EXPECT_EQ(latent.expert_parameters.value(), 4 * 2 * 3 * 2);
  EXPECT_FALSE(plain.expert_input.known());
  EXPECT_EQ(plain.expert_parameters.value(), 4 * 2 * 3 * 8);
}

TEST(ResolveModel, AValueOfAnotherKindIsUnknownAndNotTheDefault) {
  const FactSheet f = facts_of(R"({"model_type": "mixtral", "num_local_experts": "eight", "num_experts_per_tok": 2.5,
      "output_router_logits": "maybe", "router_aux_loss_coef": null})");
  EXPECT_FALSE(f.num_experts.known());
  EXPECT_NE(f.num_experts.why_unknown().find("num_local_experts is eight"), std::string::npos) << f.num_experts.why_unknown();
  EXPECT_NE(f.top_k.why_unknown().find("num_experts_per_tok is 2.5"), std::string::npos) << f.top_k.why_unknown();
  EXPECT_NE(f.aux_flag.why_unknown().find("neither true nor false"), std::string::npos) << f.aux_flag.why_unknown();
  EXPECT_EQ(f.aux_coefficient.origin(), Origin::kFrameworkDefault);  // null is as good as absent
  EXPECT_TRUE(f.hidden_size.known());
}

TEST(ResolveModel, KeysOfANestedConfig) {
  const FactSheet f = facts_of(R"({"model_type": "dbrx", "d_model": 6144, "ffn_config":
      {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752, "moe_loss_weight": 0.05}})");
  EXPECT_EQ(f.num_experts.value(), 16);
  EXPECT_EQ(f.top_k.value(), 4);
  EXPECT_EQ(f.expert_width.value(), 10752);
  EXPECT_EQ(f.aux_coefficient.value(), 0.05);
  EXPECT_EQ(f.num_experts.source().key, "ffn_config.moe_num_experts");
  EXPECT_EQ(f.num_experts.source().line, 2);
}

TEST(ResolveModel, GroupsCountOnlyWhereTheConfigSaysSo) {
  const std::string head = R"({"model_type": "deepseek_v2", "n_group": 8, "topk_group": 3, "topk_method": )";
  const FactSheet limited = facts_of(head + R"("group_limited_greedy"})"), greedy = facts_of(head + R"("greedy"})");
  EXPECT_EQ(limited.routing.value().groups, 8);
  EXPECT_EQ(limited.routing.value().top_groups, 3);
  EXPECT_EQ(limited.routing.value().group_score, GroupScore::kMax);
  EXPECT_EQ(greedy.routing.value().groups, 1);
  EXPECT_EQ(greedy.routing.value().group_score, GroupScore::kNone);
  EXPECT_EQ(facts_of(R"({"model_type": "deepseek_v2", "n_group": 8, "topk_group": 3})").routing.value().groups, 1);
}

TEST(ResolveModel, SparseMixerHasItsJitterFromTheConfig) {
  const FactSheet plain = facts_of(R"({"model_type": "phimoe"})");
  EXPECT_TRUE(plain.routing.value().sparse_mixer);
  EXPECT_EQ(plain.routing.value().mixer_jitter, 0.01);
  EXPECT_EQ(facts_of(R"({"model_type": "phimoe", "router_jitter_noise": 0.25})").routing.value().mixer_jitter, 0.25);
  EXPECT_TRUE(facts_of(R"({"model_type": "phimoe", "num_experts_per_tok": 2})").routing.known());
  EXPECT_FALSE(facts_of(R"({"model_type": "phimoe", "num_experts_per_tok": 1})").routing.known());
  EXPECT_FALSE(facts_of(R"({"model_type": "mixtral"})").routing.value().sparse_mixer);
}

TEST(ResolveModel, AnOrderThatIsNotKnownIsNotReplayed) {
  const FactSheet zaya = facts_of(R"({"model_type": "zaya"})");
  EXPECT_FALSE(zaya.routing.known());
  EXPECT_NE(zaya.routing.why_unknown().find("MLP"), std::string::npos);

  const std::string head = R"({"model_type": "dbrx", "ffn_config": {"moe_normalize_expert_weights": )";
  EXPECT_TRUE(facts_of(head + "1}}").routing.known());
  EXPECT_TRUE(facts_of(head + "1.0}}").routing.known());
  EXPECT_TRUE(facts_of(R"({"model_type": "dbrx"})").routing.known());
  EXPECT_EQ(facts_of(head + "1.0}}").routing.value().renormalise_norm, 1.0);
  EXPECT_EQ(facts_of(R"({"model_type": "dbrx"})").routing.value().renormalise_norm, 1.0);
  EXPECT_EQ(facts_of(head + "2}}").routing.value().renormalise_norm, 2.0);
  EXPECT_EQ(to_text(facts_of(head + "2}}").routing.value()), "softmax, renormalised by the norm of p = 2");
  EXPECT_EQ(facts_of(head + "Infinity}}").routing.value().renormalise_norm, std::numeric_limits<double>::infinity());
  EXPECT_TRUE(facts_of(head + "2}}").renormalised.value());
  const FactSheet none = facts_of(head + "null}}");
  EXPECT_FALSE(none.routing.value().renormalise);
  EXPECT_FALSE(none.renormalised.value());
  for (const char* other : {"0}}", "-1}}", "NaN}}", "\"one\"}}"}) {
    const FactSheet f = facts_of(head + other);
    EXPECT_FALSE(f.routing.known()) << other;
    EXPECT_NE(f.routing.why_unknown().find("moe_normalize_expert_weights"), std::string::npos);
  }
}

TEST(ResolveModel, DenseUnlessTheConfigSaysThatItHasExperts) {
  const std::string sizes = R"("num_hidden_layers": 2, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 4)";
  const FactSheet moe = facts_of(R"({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "enable_moe_block": true, )" + sizes + "}}");
  EXPECT_TRUE(moe.has_moe.value());
  EXPECT_EQ(moe.family.value(), "gemma4");
  EXPECT_EQ(moe.moe_layers.value(), (Layers{0, 1}));
  EXPECT_EQ(moe.top_k.value(), 2);
  EXPECT_FALSE(moe.extra_rows.known());
  for (const char* dense : {R"("enable_moe_block": false, )", ""}) {
    const FactSheet f = facts_of(R"({"model_type": "gemma4_text", )" + std::string(dense) + R"("num_hidden_layers": 2, "num_experts": null})");
    EXPECT_FALSE(f.has_moe.value());
    EXPECT_FALSE(f.family.known());
  }
}

TEST(ResolveModel, RowsOfTheRouterBeyondOneAnExpert) {
  EXPECT_EQ(facts_of(R"({"model_type": "inkling_text", "num_hidden_layers": 2, "n_shared_experts": 3})").extra_rows.value(), 3);
  EXPECT_EQ(facts_of(R"({"model_type": "zaya", "num_hidden_layers": 2})").extra_rows.value(), 1);
}

TEST(ResolveModel, DtypeOfTheScoresByRelease) {
  const std::string dbrx = R"({"model_type": "dbrx"})";
  EXPECT_EQ(facts_of(dbrx, "4.57.6").routing.value().scores_dtype, DType::kF32);
  EXPECT_EQ(facts_of(dbrx, "5.0.0").routing.value().scores_dtype, DType::kUnknown);  // that of the logits
  const FactSheet any = facts_of(dbrx, "");
  EXPECT_FALSE(any.routing.known());
  EXPECT_NE(any.routing.why_unknown(), "");
}

}  // namespace
}  // namespace moeaudit
