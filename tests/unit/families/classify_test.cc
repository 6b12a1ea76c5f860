// Which part of the network a name belongs to: checkpoint names, module paths, adapter tensors, entries of
// target_modules.
#include <gtest/gtest.h>

#include <ostream>
#include <utility>

#include "audit/families/family.h"

namespace moeaudit {
namespace {

struct Case {
  const char* family;  // "" for none
  const char* name;
  Part part;
  int layer = -1;
  int expert = -1;
  bool fused = false;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.family << " " << c.name; }

class Classify : public testing::TestWithParam<Case> {};

TEST_P(Classify, NamesThePart) {
  const Case& c = GetParam();
  const Family* family = *c.family ? find_family(c.family) : nullptr;
  ASSERT_EQ(family != nullptr, *c.family != '\0');
  const NamedPart got = classify(family, c.name);
  EXPECT_STREQ(name_of(got.part), name_of(c.part));
  EXPECT_EQ(got.layer, c.layer);
  EXPECT_EQ(got.expert, c.expert);
  EXPECT_EQ(got.fused, c.fused);
}

constexpr Part kExpert = Part::kRoutedExpert;

INSTANTIATE_TEST_SUITE_P(
    Checkpoint, Classify,
    testing::Values(Case{"mixtral", "model.layers.12.block_sparse_moe.experts.7.w2.weight", kExpert, 12, 7},
                    Case{"mixtral", "model.layers.12.block_sparse_moe.gate.weight", Part::kRouter, 12},
                    Case{"mixtral", "model.layers.0.mlp.experts.gate_up_proj", kExpert, 0, -1, true},
                    Case{"mixtral", "model.layers.0.mlp.gate.weight", Part::kRouter, 0},
                    Case{"mixtral", "model.norm.weight", Part::kNorm}, Case{"mixtral", "lm_head.weight", Part::kHead},
                    Case{"mixtral", "model.embed_tokens.weight", Part::kEmbedding},
                    Case{"qwen2_moe", "model.layers.3.mlp.shared_expert_gate.weight", Part::kSharedExpertGate, 3},
                    Case{"qwen2_moe", "model.layers.3.mlp.shared_expert.up_proj.weight", Part::kSharedExpert, 3},
                    Case{"qwen3_moe", "model.layers.3.mlp.gate_proj.weight", Part::kDenseMlp, 3},
                    Case{"qwen3_moe", "model.layers.3.self_attn.q_norm.weight", Part::kNorm, 3},
                    Case{"deepseek_v3", "model.layers.5.mlp.gate.e_score_correction_bias", Part::kRouter, 5},
                    Case{"deepseek_v3", "model.layers.5.mlp.experts.255.down_proj.weight_scale_inv", kExpert, 5, 255},
                    Case{"deepseek_v3", "model.layers.5.mlp.shared_experts.down_proj.weight", Part::kSharedExpert, 5},
                    Case{"deepseek_v3", "model.layers.61.eh_proj.weight", Part::kOther, 61},
                    Case{"deepseek_v2", "model.layers.5.mlp.experts.63.up_proj.weight", kExpert, 5, 63},
                    Case{"deepseek_v2", "model.layers.5.mlp.shared_experts.gate_proj.weight", Part::kSharedExpert, 5},
                    Case{"deepseek_v2", "model.layers.0.mlp.gate_proj.weight", Part::kDenseMlp, 0},
                    Case{"glm4_moe", "model.layers.46.mlp.gate.e_score_correction_bias", Part::kRouter, 46},
                    Case{"glm4_moe", "model.layers.3.mlp.experts.gate_up_proj", kExpert, 3, -1, true},
                    Case{"dots1", "model.layers.3.mlp.gate.weight", Part::kRouter, 3},
                    Case{"granitemoe", "model.layers.7.block_sparse_moe.router.layer.weight", Part::kRouter, 7},
                    Case{"granitemoe_swa", "model.layers.7.self_attn.sinks", Part::kAttention, 7},
                    Case{"qwen3_omni_moe", "thinker.model.layers.7.mlp.experts.3.up_proj.weight", kExpert, 7, 3},
                    Case{"qwen3_omni_moe", "thinker.lm_head.weight", Part::kHead},
                    Case{"qwen3_omni_moe", "talker.model.layers.7.mlp.gate.weight", Part::kOther},
                    Case{"jetmoe", "model.layers.7.mlp.router.layer.weight", Part::kRouter, 7},
                    Case{"jetmoe", "model.layers.7.mlp.input_linear.weight", kExpert, 7, -1, true},
                    Case{"jetmoe", "model.layers.7.self_attention.experts.router.layer.weight", Part::kAttention, 7},
                    Case{"jetmoe", "model.layers.7.self_attention.experts.input_linear.weight", Part::kAttention, 7},
                    Case{"qwen3_vl_moe", "model.language_model.layers.7.mlp.experts.gate_up_proj", kExpert, 7, -1, true},
                    Case{"granitemoe", "model.layers.7.block_sparse_moe.input_linear.weight", kExpert, 7, -1, true},
                    Case{"granitemoe", "model.layers.7.block_sparse_moe.experts.down_proj", kExpert, 7, -1, true},
                    Case{"llama4_text", "model.layers.1.feed_forward.router.weight", Part::kRouter, 1},
                    Case{"llama4_text", "model.layers.1.feed_forward.shared_expert.up_proj.weight", Part::kSharedExpert, 1},
                    Case{"llama4_text", "model.layers.0.feed_forward.gate_proj.weight", Part::kDenseMlp, 0},
                    Case{"dbrx", "transformer.blocks.9.ffn.router.layer.weight", Part::kRouter, 9},
                    Case{"dbrx", "transformer.blocks.9.ffn.experts.mlp.v1", kExpert, 9, -1, true},
                    Case{"dbrx", "transformer.norm_f.weight", Part::kNorm},
                    Case{"phimoe", "model.layers.2.block_sparse_moe.gate.weight", Part::kRouter, 2},
                    Case{"phimoe", "model.layers.2.mlp.router.weight", Part::kRouter, 2},
                    Case{"phimoe", "model.layers.2.block_sparse_moe.experts.11.w3.weight", kExpert, 2, 11},
                    Case{"jamba", "model.layers.1.feed_forward.experts.3.down_proj.weight", kExpert, 1, 3},
                    Case{"jamba", "model.layers.2.feed_forward.up_proj.weight", Part::kDenseMlp, 2},
                    Case{"jamba", "model.layers.2.mamba.in_proj.weight", Part::kOther, 2},
                    Case{"qwen3_next", "model.layers.3.linear_attn.A_log", Part::kAttention, 3},
                    Case{"qwen3_next", "model.layers.3.linear_attn.norm.weight", Part::kNorm, 3},
                    Case{"qwen3_5_moe_text", "model.layers.0.mlp.experts.gate_up_proj", kExpert, 0, -1, true},
                    Case{"qwen3_5_moe", "model.language_model.layers.2.mlp.gate.weight", Part::kRouter, 2},
                    Case{"qwen3_5_moe", "model.language_model.layers.2.mlp.experts.1.up_proj.weight", kExpert, 2, 1},
                    Case{"qwen3_5_moe", "model.language_model.embed_tokens.weight", Part::kEmbedding},
                    Case{"qwen3_5_moe", "model.language_model.norm.weight", Part::kNorm},
                    Case{"qwen3_5_moe", "model.visual.blocks.0.mlp.linear_fc1.weight", Part::kOther},
                    Case{"minimax_m2", "model.layers.4.block_sparse_moe.e_score_correction_bias", Part::kRouter, 4},
                    Case{"minimax_m2", "model.layers.4.mlp.e_score_correction_bias", Part::kRouter, 4},
                    Case{"minimax_m2", "model.layers.4.block_sparse_moe.experts.7.w1.weight_scale_inv", kExpert, 4, 7},
                    Case{"ernie4_5_moe", "model.layers.4.mlp.moe_statics.e_score_correction_bias", Part::kRouter, 4},
                    Case{"ernie4_5_moe", "model.layers.4.mlp.gate.moe_statics.e_score_correction_bias", Part::kRouter, 4},
                    Case{"ernie4_5_moe", "model.layers.0.mlp.up_proj.weight", Part::kDenseMlp, 0},
                    Case{"switch_transformers", "encoder.block.3.layer.1.mlp.router.classifier.weight", Part::kRouter, 3},
                    Case{"switch_transformers", "decoder.block.3.layer.2.mlp.experts.expert_6.wo.weight", kExpert, 3, 6},
                    Case{"switch_transformers", "decoder.block.0.layer.2.mlp.wi.weight", Part::kDenseMlp, 0},
                    Case{"switch_transformers", "decoder.block.0.layer.1.EncDecAttention.q.weight", Part::kAttention, 0},
                    Case{"nllb_moe", "model.encoder.layers.3.ffn.experts.expert_127.fc1.bias", kExpert, 3, 127},
                    Case{"nllb_moe", "model.decoder.layers.3.cross_attention.q_proj.bias", Part::kAttention, 3},
                    Case{"hunyuan_v1_moe", "model.layers.4.mlp.gate.wg.weight", Part::kRouter, 4},
                    Case{"hunyuan_v1_moe", "model.layers.4.mlp.shared_mlp.up_proj.weight", Part::kSharedExpert, 4},
                    Case{"aria", "language_model.model.layers.3.mlp.experts.fc1.weight", kExpert, 3, -1, true},
                    Case{"aria", "model.language_model.layers.3.mlp.router.weight", Part::kRouter, 3},
                    Case{"aria", "vision_tower.encoder.layers.3.mlp.fc1.weight", Part::kOther},
                    Case{"minimax_m3_vl", "language_model.model.layers.3.block_sparse_moe.e_score_correction_bias", Part::kRouter, 3},
                    Case{"minimax_m3_vl", "language_model.model.layers.3.self_attn.index_k_proj.weight", Part::kAttention, 3},
                    Case{"minimax_m3_vl", "model.language_model.layers.3.mlp.shared_experts.gate_up_proj.weight", Part::kSharedExpert, 3},
                    Case{"openai_privacy_filter", "score.weight", Part::kHead},
                    Case{"laguna", "model.layers.4.mlp.experts.e_score_correction_bias", Part::kRouter, 4},
                    Case{"step3p7", "model.layers.4.moe.gate_proj.weight", kExpert, 4, -1, true},
                    Case{"step3p7", "model.layers.4.moe.gate.weight", Part::kRouter, 4},
                    Case{"step3p7", "model.layers.4.moe.router_bias", Part::kRouter, 4},
                    Case{"step3p7", "model.layers.4.share_expert.up_proj.weight", Part::kSharedExpert, 4},
                    Case{"step3p7", "model.layers.4.self_attn.g_proj.weight", Part::kAttention, 4},
                    Case{"gemma4", "model.language_model.layers.4.router.per_expert_scale", Part::kRouter, 4},
                    Case{"gemma4", "model.language_model.layers.4.router.proj", Part::kRouter, 4},
                    Case{"gemma4", "model.language_model.layers.4.experts.gate_up_proj", kExpert, 4, -1, true},
                    Case{"gemma4", "model.language_model.layers.4.mlp.up_proj.weight", Part::kDenseMlp, 4},
                    Case{"diffusion_gemma", "model.encoder.language_model.layers.4.router.proj.weight", Part::kRouter, 4},
                    Case{"inkling", "model.llm.layers.4.mlp.experts.w13_weight", kExpert, 4, -1, true},
                    Case{"inkling", "model.llm.layers.4.mlp.shared_experts.shared_w2_weight", Part::kSharedExpert, 4},
                    Case{"inkling", "model.llm.layers.4.mlp.gate.bias", Part::kRouter, 4},
                    Case{"inkling", "model.language_model.layers.4.mlp.gate.e_score_correction_bias", Part::kRouter, 4},
                    Case{"inkling", "model.llm.layers.0.mlp.w13_dn.weight", Part::kDenseMlp, 0},
                    Case{"inkling", "model.llm.unembed.weight", Part::kHead},
                    Case{"inkling", "model.audio.final_norm.weight", Part::kOther},
                    Case{"deepseek_v4", "layers.4.ffn.gate.tid2eid", Part::kRouter, 4},
                    Case{"deepseek_v4", "model.layers.4.mlp.gate.e_score_correction_bias", Part::kRouter, 4},
                    Case{"deepseek_v4", "layers.4.ffn.experts.9.w1.weight", kExpert, 4, 9},
                    Case{"deepseek_v4", "model.layers.4.ffn.shared_experts.w2.weight", Part::kSharedExpert, 4},
                    Case{"deepseek_v4", "model.layers.4.self_attn.compressor.gate_proj.weight", Part::kAttention, 4},
                    Case{"deepseek_v4", "model.layers.4.attn_hc.fn", Part::kOther, 4},
                    Case{"deepseek_v4", "head.weight", Part::kHead},
                    Case{"doge", "model.layers.4.mlp.router_gate", Part::kRouter, 4},
                    Case{"doge", "model.layers.4.mlp.down_embed.weight", kExpert, 4, -1, true},
                    Case{"doge", "model.layers.4.mlp.down_proj.weight", Part::kDenseMlp, 4},
                    Case{"kimi_linear", "model.layers.4.self_attn.A_log", Part::kAttention, 4},
                    Case{"kimi_linear", "model.layers.4.self_attn.forget_gate.f_a_proj", Part::kAttention, 4},
                    Case{"kimi_linear", "model.layers.0.block_sparse_moe.gate_proj.weight", Part::kDenseMlp, 0},
                    Case{"kimi_linear", "model.layers.4.block_sparse_moe.shared_experts.gate_proj.weight", Part::kSharedExpert, 4},
                    Case{"kimi_linear", "model.layers.4.block_sparse_moe.experts.9.w2.weight", kExpert, 4, 9},
                    Case{"glm5_next", "model.language_model.layers.4.hc_ffn_base", Part::kOther, 4},
                    Case{"glm5_next", "model.language_model.layers.4.ffn_hc.base", Part::kOther, 4},
                    Case{"glm5_next", "model.language_model.layers.4.self_attn.forget_gate.f_a_proj", Part::kAttention, 4},
                    Case{"glm5_next", "base_model.model.model.language_model.layers.4.mlp.experts.lora_A.weight", kExpert, 4, -1, true},
                    Case{"glm5_next", "model.language_model.layers.0.mlp.gate_proj.weight", Part::kDenseMlp, 0},
                    Case{"glm5_next", "model.visual.blocks.0.mlp.gate_proj.weight", Part::kOther},
                    Case{"bailing_hybrid", "model.word_embeddings.weight", Part::kEmbedding},
                    Case{"bailing_hybrid", "model.layers.4.attention.dense.weight", Part::kAttention, 4},
                    Case{"bailing_hybrid", "model.layers.4.self_attn.forget_gate.f_proj", Part::kAttention, 4},
                    Case{"bailing_hybrid", "model.layers.4.mlp.gate.expert_bias", Part::kRouter, 4},
                    Case{"bailing_hybrid", "base_model.model.model.layers.4.mlp.experts.base_layer.lora_B.weight", kExpert, 4, -1, true},
                    Case{"kolibri1", "model.layers.4.moe.router.expert_bias", Part::kRouter, 4},
                    Case{"kolibri1", "model.layers.4.post_ffn_norm.weight", Part::kNorm, 4},
                    Case{"kolibri1", "model.layers.4.mlp.shared_experts.up_proj", Part::kSharedExpert, 4},
                    Case{"hy_v4", "model.layers.0.mlp.linear_gate.weight", Part::kDenseMlp, 0},
                    Case{"hy_v4", "model.layers.4.self_attn.linear_gate.weight", Part::kAttention, 4},
                    Case{"hy_v4", "model.layers.4.self_attn.learnable_sink_param", Part::kAttention, 4},
                    Case{"hy_v4", "model.layers.4.hc_attn_layer.hc_pre.hc_fn", Part::kOther, 4},
                    Case{"hy_v4", "model.layers.4.ffn_hc.scale", Part::kOther, 4},
                    Case{"axk2", "model.layers.4.post_attention_layernorm.W_up.weight", Part::kNorm, 4},
                    Case{"axk2", "model.layers.4.post_attention_layernorm.mlp.fc2", Part::kNorm, 4},
                    Case{"axk2", "model.layers.4.self_attn.q_gate_proj.weight", Part::kAttention, 4},
                    Case{"longcat_flash", "model.layers.4.mlp.router.classifier", Part::kRouter, 4},
                    Case{"longcat_flash", "model.layers.4.mlps.1.down_proj.weight", Part::kDenseMlp, 4},
                    Case{"longcat_flash", "model.layers.4.self_attn.1.o_proj.weight", Part::kAttention, 4},
                    Case{"longcat_flash", "model.layers.4.input_layernorm.1.weight", Part::kNorm, 4},
                    Case{"longcat_flash", "model.layers.4.mlp.experts.9.gate_proj.weight", kExpert, 4, 9},
                    Case{"nemotron_h", "backbone.layers.4.mixer.gate.e_score_correction_bias", Part::kRouter, 4},
                    Case{"nemotron_h", "model.layers.4.mixer.experts.up_proj", kExpert, 4, -1, true},
                    Case{"nemotron_h", "backbone.layers.4.mixer.experts.9.down_proj.weight", kExpert, 4, 9},
                    Case{"nemotron_h", "backbone.layers.4.mixer.fc1_latent_proj.weight", Part::kOther, 4},
                    Case{"nemotron_h", "backbone.layers.5.mixer.up_proj.weight", Part::kDenseMlp, 5},
                    Case{"nemotron_h", "backbone.layers.6.mixer.q_proj.weight", Part::kAttention, 6},
                    Case{"nemotron_h", "backbone.layers.7.mixer.in_proj.weight", Part::kOther, 7},
                    Case{"nemotron_h", "backbone.embeddings.weight", Part::kEmbedding},
                    Case{"kimi_k25", "language_model.model.layers.4.mlp.experts.9.gate_proj.weight_packed", kExpert, 4, 9},
                    Case{"kimi_k25", "language_model.model.blocks.4.mlp.gate.weight", Part::kRouter, 4},
                    Case{"kimi_k25", "mm_projector.pre_norm.weight", Part::kOther},
                    Case{"qwen4_exp_text", "model.layers.4.mlp_hyper_connection.block_inject_weight.weight", Part::kOther, 4},
                    Case{"qwen4_exp_text", "model.layers.4.mlp.shared_expert_gate.weight", Part::kSharedExpertGate, 4},
                    Case{"qwen4_exp_text", "model.layers.1.ple.key_proj.weight", Part::kOther, 1},
                    Case{"qwen4_exp_text", "model.layers.1.ple.ple_embedding.ngram_embedding.weight", Part::kEmbedding, 1},
                    Case{"qwen4_exp_text", "model.layers.1.ple.ple_embedding.ngram_embedding.shard_7.weight", Part::kOther, 1},
                    Case{"qwen4_exp_text", "model.layers.3.self_attn.indexer.index_qk_proj", Part::kAttention, 3},
                    Case{"qwen4_exp_text", "model.language_model.layers.3.mlp.gate.weight", Part::kRouter, 3},
                    Case{"qwen4_exp", "model.language_model.layers.2.mlp.experts.1.up_proj.weight", kExpert, 2, 1},
                    Case{"qwen4_exp", "model.language_model.layers.2.mlp.experts.down_proj", kExpert, 2, -1, true},
                    Case{"qwen4_exp", "model.visual.blocks.0.mlp.linear_fc1.weight", Part::kOther},
                    Case{"mistral_large4", "layers.4.gate.weight", Part::kRouter, 4},
                    Case{"mistral_large4", "layers.4.experts.9.w2.weight", kExpert, 4, 9},
                    Case{"mistral_large4", "layers.4.shared_experts.w1.weight", Part::kSharedExpert, 4},
                    Case{"mistral_large4", "layers.0.feed_forward.w3.weight", Part::kDenseMlp, 0},
                    Case{"mistral_large4", "layers.4.attention.indexer.ssmax_scaling.s", Part::kAttention, 4},
                    Case{"mistral_large4", "layers.4.ffn_norm.weight", Part::kNorm, 4},
                    Case{"mistral_large4", "output.weight", Part::kHead},
                    Case{"mistral_large4", "model.language_model.layers.4.mlp.experts.gate_up_proj", kExpert, 4, -1, true},
                    Case{"mistral_large4", "model.language_model.layers.4.mlp.gate", Part::kRouter, 4},
                    Case{"mistral_large4", "vision_encoder.transformer.layers.0.feed_forward.w1.weight", Part::kOther},
                    Case{"mistral_large4", "model.vision_tower.transformer.layers.0.attention.k_proj.weight", Part::kOther},
                    Case{"zaya", "model.layers.4.mlp.gate.down_proj", Part::kRouter, 4},
                    Case{"zaya", "model.layers.4.mlp.gate.router_mlp.out_proj.weight", Part::kRouter, 4},
                    Case{"zaya", "model.layers.4.mlp.experts.down_proj", kExpert, 4, -1, true},
                    Case{"ernie4_5_vl_moe", "model.layers.4.mlp.gate.weight", Part::kRouter, 4},
                    Case{"ernie4_5_vl_moe", "model.layers.4.mlp.gate.weight_1", Part::kOther, 4},
                    Case{"ernie4_5_vl_moe", "model.language_model.layers.4.mlp.text_moe.experts.gate_up_proj", kExpert, 4, -1, true},
                    Case{"ernie4_5_vl_moe", "model.language_model.layers.4.mlp.vision_moe.experts.gate_up_proj", Part::kOther, 4},
                    Case{"ernie4_5_vl_moe", "model.language_model.layers.4.mlp.vision_moe.gate.moe_statics.e_score_correction_bias", Part::kOther, 4},
                    Case{"ernie4_5_vl_moe", "model.language_model.layers.4.mlp.shared_experts.up_proj.weight", Part::kSharedExpert, 4},
                    Case{"ernie4_5_vl_moe", "model.vision_model.blocks.4.mlp.fc1.weight", Part::kOther},
                    Case{"gpt_oss", "model.layers.1.mlp.router.bias", Part::kRouter, 1},
                    Case{"gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_blocks", kExpert, 1, -1, true},
                    Case{"gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", kExpert, 1, -1, true},
                    Case{"gpt_oss", "model.layers.1.self_attn.sinks", Part::kAttention, 1}));

INSTANTIATE_TEST_SUITE_P(
    Adapter, Classify,
    testing::Values(
        Case{"qwen3_moe", "base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight", kExpert, 0, 3},
        Case{"ernie4_5_vl_moe", "base_model.model.model.language_model.layers.1.mlp.text_moe.experts.base_layer.lora_A.weight", kExpert, 1, -1, true},
        Case{"ernie4_5_vl_moe", "base_model.model.model.language_model.layers.1.mlp.vision_moe.experts.lora_B.weight", Part::kOther, 1},
        Case{"ernie4_5_vl_moe", "mlp.gate", Part::kRouter}, Case{"ernie4_5_vl_moe", "experts", kExpert, -1, -1, true},
        Case{"mixtral", "base_model.model.model.layers.9.block_sparse_moe.gate.lora_B.weight", Part::kRouter, 9},
        Case{"mixtral", "base_model.model.model.layers.9.block_sparse_moe.gate.lora_B.default.weight", Part::kRouter,
             9},
        Case{"mixtral", "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", kExpert, 0, -1, true},
        Case{"mixtral", "base_model.model.model.layers.0.mlp.experts.lora_B.weight", kExpert, 0, -1, true},
        Case{"mixtral", "base_model.model.model.layers.0.mlp.gate.modules_to_save.default.weight", Part::kRouter, 0},
        Case{"mixtral", "base_model.model.model.layers.0.mlp.gate.original_module.weight", Part::kRouter, 0},
        Case{"qwen2_moe", "base_model.model.model.layers.2.mlp.shared_expert_gate.lora_A.weight",
             Part::kSharedExpertGate, 2},
        Case{"qwen2_moe", "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight", Part::kAttention,
             2},
        Case{"mixtral", "base_model.model.model.layers.2.self_attn.q_proj.lora_magnitude_vector.weight",
             Part::kAttention, 2},
        Case{"deepseek_v3", "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight", Part::kDenseMlp, 0},
        Case{"glm4_moe", "base_model.model.model.layers.2.mlp.experts.7.down_proj.lora_B.weight", kExpert, 2, 7},
        Case{"dots1", "base_model.model.model.layers.2.mlp.gate.modules_to_save.weight", Part::kRouter, 2},
        Case{"granitemoe", "base_model.model.model.layers.0.block_sparse_moe.input_linear.lora_A.weight", kExpert, 0, -1,
             true},
        Case{"jamba", "base_model.model.model.layers.1.feed_forward.router.lora_A.weight", Part::kRouter, 1},
        Case{"mixtral", "base_model.model.model.embed_tokens.lora_embedding_A", Part::kEmbedding},
        Case{"mixtral", "base_model.model.lm_head.lora_A.weight", Part::kHead}));

INSTANTIATE_TEST_SUITE_P(
    Modules, Classify,
    testing::Values(
        Case{"mixtral", "model.layers.4.block_sparse_moe.experts", kExpert, 4, -1, true},
        Case{"mixtral", "model.layers.4.block_sparse_moe.experts.6", kExpert, 4, 6},
        Case{"mixtral", "model.layers.4.block_sparse_moe", Part::kOther, 4},  // router and experts
        Case{"mixtral", "model.layers.4", Part::kOther, 4},
        Case{"mixtral", "model.layers.4.self_attn", Part::kAttention, 4}, Case{"mixtral", "", Part::kOther},
        Case{"mixtral", "w1", kExpert}, Case{"mixtral", "gate", Part::kRouter},
        Case{"mixtral", "mlp.experts.down_proj", kExpert, -1, -1, true},
        Case{"mixtral", "experts", kExpert, -1, -1, true},
        Case{"olmoe", "gate_proj", kExpert},           // OLMoE has no dense MLP
        Case{"qwen3_moe", "gate_proj", Part::kOther},  // routed expert or dense MLP: the name alone does not say
        Case{"qwen3_moe", "mlp.gate_proj", Part::kDenseMlp}, Case{"deepseek_v3", "mlp.gate_proj", Part::kDenseMlp},
        Case{"deepseek_v3", "q_a_proj", Part::kAttention}, Case{"hunyuan_v1_moe", "wg", Part::kRouter},
        Case{"hunyuan_v1_moe", "mlp.gate", Part::kRouter}, Case{"qwen3_5_moe", "mlp.experts", kExpert, -1, -1, true},
        Case{"minimax_m2", "w2", kExpert},
        Case{"qwen2_moe", "mlp.shared_expert_gate", Part::kSharedExpertGate}, Case{"gpt_oss", "router", Part::kRouter},
        Case{"mixtral", "model.layers.99999999999.mlp.gate", Part::kRouter},  // not an index: no layer, no overflow
        Case{"mixtral", "model.layers.-1.mlp.gate", Part::kRouter},
        Case{"mixtral", "_orig_mod.model.layers.4._fsdp_wrapped_module.mlp.gate.weight", Part::kRouter, 4},
        Case{"mixtral", "module.model.layers.4._checkpoint_wrapped_module.self_attn.v_proj", Part::kAttention, 4}));

INSTANTIATE_TEST_SUITE_P(
    NoFamily, Classify,
    testing::Values(
        Case{"", "model.language_model.layers.0.mlp.experts.gate_up_proj", kExpert, 0, -1, true},
        Case{"", "model.language_model.layers.0.mlp.gate.weight", Part::kRouter, 0},
        Case{"", "model.visual.blocks.0.mlp.linear_fc1.weight", Part::kOther},
        Case{"", "transformer.blocks.3.ffn.router.layer.weight", Part::kRouter, 3},             // dbrx
        Case{"", "transformer.blocks.3.ffn.experts.mlp.w1", kExpert, 3, -1, true},              // dbrx
        Case{"", "transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", Part::kAttention, 3},  // dbrx
        Case{"", "model.layers.1.feed_forward.router.weight", Part::kRouter, 1},                // llama4, jamba
        Case{"", "model.layers.1.feed_forward.experts.3.gate_proj.weight", kExpert, 1, 3},      // jamba
        Case{"", "model.layers.1.feed_forward.shared_expert.gate_proj.weight", Part::kSharedExpert, 1},  // llama4
        Case{"", "encoder.block.1.layer.1.mlp.router.classifier.weight", Part::kRouter, 1},              // switch
        Case{"", "encoder.block.1.layer.1.mlp.experts.expert_5.wi.weight", kExpert, 1, 5},               // switch
        Case{"", "model.layers.0.block_sparse_moe.input_linear.weight", kExpert, 0, -1, true},           // granitemoe
        Case{"", "model.layers.0.block_sparse_moe.router.layer.weight", Part::kRouter, 0},               // granitemoe
        Case{"", "model.layers.0.mlp.gate_proj.weight", Part::kDenseMlp, 0},
        Case{"", "model.layers.0.mlp.gate_up_proj.weight", Part::kDenseMlp, 0},  // phi3
        Case{"", "model.layers.0.self_attn.gate.weight", Part::kAttention, 0},   // a gate that routes nothing
        Case{"", "model.layers.0.linear_attn.in_proj.weight", Part::kAttention, 0},
        Case{"", "model.layers.0.mlp.gate.wg.weight", Part::kRouter, 0},  // hunyuan
        Case{"", "model.layers.0.input_layernorm.weight", Part::kNorm, 0},
        Case{"", "base_model.model.model.layers.7.mlp.shared_experts.up_proj.lora_A.weight", Part::kSharedExpert, 7},
        Case{"", "output.weight", Part::kHead}, Case{"", "encoder.layer.3.output.weight", Part::kOther, 3},
        Case{"", "gate_proj", Part::kOther}, Case{"", "conv1d.weight", Part::kOther}));

TEST(Classify, NumbersLayersThroughBothStacks) {
  const Family* family = find_family("switch_transformers");
  EXPECT_EQ(classify(family, "encoder.block.3.layer.1.mlp.router.classifier.weight", 12).layer, 3);
  EXPECT_EQ(classify(family, "decoder.block.3.layer.2.mlp.router.classifier.weight", 12).layer, 15);
  EXPECT_EQ(classify(nullptr, "model.decoder.layers.0.ffn.fc1.weight", 12).layer, 12);
}

TEST(MatchPattern, FindsLayerAndExpert) {
  const auto match = [](const char* pattern, const char* name) {
    const auto m = match_pattern(pattern, name, 12);
    return m ? std::make_pair(m->layer, m->expert) : std::make_pair(-9, -9);
  };
  using Pair = std::pair<int, int>;
  const char* decoder = "decoder.block.{D}.layer.2.mlp.experts.expert_{e}.wi.weight";
  EXPECT_EQ(match(decoder, "decoder.block.1.layer.2.mlp.experts.expert_7.wi.weight"), Pair(13, 7));
  EXPECT_EQ(match(decoder, "decoder.block.1.layer.1.mlp.experts.expert_7.wi.weight"), Pair(-9, -9));
  EXPECT_EQ(match(decoder, "decoder.block.1.layer.2.mlp.experts.expert_x.wi.weight"), Pair(-9, -9));
  EXPECT_EQ(match(decoder, "decoder.block.-1.layer.2.mlp.experts.expert_7.wi.weight"), Pair(-9, -9));
  EXPECT_EQ(match(decoder, "decoder.block.1.layer.2.mlp.experts.expert_7.wi"), Pair(-9, -9));
  EXPECT_EQ(match("model.layers.{L}.mlp.experts.{e}.w1.weight", "model.layers.4.mlp.experts.0.w1.weight"), Pair(4, 0));
  EXPECT_EQ(match("model.norm.weight", "model.norm.weight"), Pair(-1, -1));
}

/// Behind the experts that the config counts come those of a second set, where the family has one.
TEST(ClassifySecondSet, BeginsAtTheNumberOfExperts) {
  const std::string name = "model.layers.4.mlp.experts.64.up_proj.weight";
  const Family* two = find_family("ernie4_5_vl_moe");
  ASSERT_TRUE(has_second_set(*two));
  EXPECT_EQ(classify(two, name, 0, 64).part, Part::kOther);
  EXPECT_EQ(classify(two, name, 0, 65).part, Part::kRoutedExpert);
  EXPECT_EQ(classify(two, name).part, Part::kRoutedExpert) << "how many experts there are is not known";
  ASSERT_FALSE(has_second_set(*find_family("qwen3_moe")));
  EXPECT_EQ(classify(find_family("qwen3_moe"), name, 0, 64).part, Part::kRoutedExpert) << "one too many";
}

}  // namespace
}  // namespace moeaudit
