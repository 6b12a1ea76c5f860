// The router in float64 on LibTorch: the truth that kernels/host/router.h and rounded_gate.h answer to.
//
// Symbols: T tokens, d hidden, E experts, k chosen per token, G groups. Nothing is averaged; every token stands alone.
// Framework code is cited as file at commit decba1d2ea4e of transformers (5.16.0.dev0) unless another one is named.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

enum class Score {
  kSoftmax,       // p_e = exp(l_e - max l) / sum_j exp(l_j - max l); modeling_mixtral.py:96 (MixtralTopKRouter)
  kSigmoid,       // 1 / (1 + exp(-l_e)); DeepSeek-V3 report, arXiv:2412.19437, equation 15; modeling_deepseek_v3.py:212
  kSqrtSoftplus,  // sqrt(softplus(l_e)), softplus(l) = l above 20 (torch.nn.functional.softplus);
                  // modeling_deepseek_v4.py:1024
};

/// How a group of experts is scored in group-limited selection.
enum class GroupScore {
  kNone,     // no groups
  kMax,      // its best expert: device-limited routing; modeling_deepseek_v2.py:120 (group_limited_greedy)
  kTop2Sum,  // the sum of its two best; modeling_deepseek_v3.py:212
  kTopShareSum,  // the sum of its top_k / top_groups best (rounded down, at least one): DeepSeek-V3 report section 2.1.2;
                 // Megatron-LM moe_utils.py, group_limited_topk
};

struct RouteOptions {
  std::int64_t top_k = 1;
  Score score = Score::kSoftmax;
  /// Top-k of the logits themselves, then the score of the k alone: a softmax over them (modeling_gpt_oss.py:117,
  /// GptOssTopKRouter), or their sigmoids (modeling_llama4.py, Llama4Router; modeling_cohere2_moe.py of 5.23.0).
  bool score_after_top_k = false;
  GroupScore group_score = GroupScore::kNone;
  std::int64_t groups = 1;      // equal runs of experts; must divide E
  std::int64_t top_groups = 1;  // groups a token may use
  /// Experts of other groups get choice 0 instead of -inf: transformers before cb0adddc3682 (#45441, 5.6.0.dev0), where
  /// a negative choice inside a kept group loses against them; intended in modeling_deepseek_v2.py.
  bool group_mask_is_zero = false;
  bool bias_multiplies = false;  // choice = scores * correction_bias instead of their sum
  bool renormalise = false;      // divide the k weights by their sum
  /// Or by their p-norm, (sum_j w_j^p)^(1/p), p > 0: 1 the sum, infinity the largest. modeling_dbrx.py:344 of 5.23.0;
  /// MegaBlocks megablocks/layers/router.py at 17fe5a24; OLMo-core src/olmo_core/nn/moe/router.py:460 of 3.0.0.
  double renormalise_norm = 1.0;
  double renormalise_eps = 0.0;  // added to that sum; 1e-20 in modeling_deepseek_v3.py:212
  double renormalise_floor = 0.0;  // and what is less becomes this; moe_norm_min in modeling_ernie4_5_moe.py:345
  double scaling = 1.0;          // routed_scaling_factor
  double sigmoid_offset = 0.0;   // added to every sigmoid; 1e-7 in OLMo-core src/olmo_core/nn/moe/router.py:446 of 3.0.0
  double logit_softcap = 0.0;    // > 0: logits become cap tanh(logit / cap), before all else; modeling_laguna.py:167 of 5.23.0
};

/// What some routers have besides logits and correction bias; each may be undefined.
struct RouteInputs {
  at::Tensor correction_bias;  // [E]
  at::Tensor expert_scale;     // [E]: weights times that of their expert, last; modeling_gemma4.py:1336 of 5.23.0
  at::Tensor given;            // int64 [T, k]: the experts, instead of a choice; modeling_deepseek_v4.py:1124 of 5.23.0
  at::Tensor always_logits;    // [T, S]: experts that every token has; modeling_inkling.py:358 of 5.23.0
};

struct Routed {
  at::Tensor chosen;   // int64 [T, k], best first, the lower index first among equals, NaN before everything
  at::Tensor weights;  // float64 [T, k]
  at::Tensor choice;   // float64 [T, E], what the selection saw: after correction bias and group mask
  at::Tensor always_weights;  // float64 [T, S]; undefined without them
};

/// logits[t, e] = sum_i x[t, i] w[e, i] + bias[e], i in index order. x [T, d], w [E, d], bias [E] or undefined; any
/// floating dtype, computed in float64; differentiable. Throws c10::Error on shapes that do not fit.
at::Tensor gate_logits(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias = {});

/// The gate that kernels/host/rounded_gate.h answers for: `stretch` products at a time are added up in float64, the rest is
/// tensors of `dtype`. bias [E] or undefined.
at::Tensor rounded_gate_logits(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias, at::ScalarType dtype,
                               std::int64_t stretch);

/// Scores of all experts, float64 [T, E]; sums over experts run in index order. Sigmoids have the offset added.
at::Tensor scores(const at::Tensor& logits, Score score, double sigmoid_offset = 0.0);

/// logits capped; choice = scores + correction_bias, or their product (used for the choice only, arXiv:2412.19437 equation 16);
/// group mask; top-k of choice; weights = scores gathered, and of those that every token has; renormalised by the sum of both, or their norm;
/// scaled; times expert_scale (the chosen alone). logits [T, E]. Differentiable through the weights. The k weights are summed in
/// the order of rank, the S others after them. Throws c10::Error on options that do not fit.
Routed route(const at::Tensor& logits, const RouteOptions& options, const RouteInputs& inputs);
Routed route(const at::Tensor& logits, const RouteOptions& options, const at::Tensor& correction_bias = {});

}  // namespace moeaudit::reference
