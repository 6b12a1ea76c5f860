// Balance losses, the z-loss and the bias step in float64 on LibTorch: the truth that kernels/host/balance_loss.h,
// z_loss.h and bias_update.h answer to. Written by the definitions of the papers: masks and one-hot matrices, no loops
// over tokens.
//
// Symbols: T tokens, E experts, k choices, D devices, S averaging sets.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace moeaudit::reference {

enum class Balanced { kExperts, kDevices, kCommunication };

struct BalanceLossOptions {
  bool first_choice_only = false;  // GShard, arXiv 2006.16668 algorithm 1
  bool over_k = true;              // false: transformers' load_balancing_loss_func
  Balanced balanced = Balanced::kExperts;
  std::int64_t devices = 1;
  std::int64_t most_devices = 1;
  bool divide_by_all_tokens = false;  // instead of the valid ones
  bool sum_over_sets = false;         // instead of their mean
  bool over_sum = false;              // probabilities over the sum of their token's plus sum_eps: arXiv 2412.19437 eq. 19
  double sum_eps = 0;
  std::int64_t top_k = 1;             // where counts are given without choices
};

/// probabilities [T, E], chosen int64 [T, k] (negative: dropped), valid bool [T] or undefined, offsets S + 1 ascending
/// from 0 to T (empty: one set), counts int64 [S, E] with counted_tokens int64 [S] or undefined. Returns a scalar,
/// differentiable through the probabilities; f is a constant. A set without valid tokens is worth 0.
at::Tensor balance_loss(const at::Tensor& probabilities, const at::Tensor& chosen, const BalanceLossOptions& options,
                        const at::Tensor& valid = {}, const std::vector<std::int64_t>& offsets = {},
                        const at::Tensor& counts = {}, const at::Tensor& counted_tokens = {});

/// Mean over the valid of T tokens of logsumexp(logits [T, E])^2: ST-MoE, arXiv 2202.08906 equation 5. Differentiable.
at::Tensor z_loss(const at::Tensor& logits, const at::Tensor& valid = {}, bool divide_by_all_tokens = false);

/// What counters [L, E] of that dtype hold of counts int64 [ranks, micro-batches, L, E]: each rank's after its
/// micro-batches, then added up over the ranks.
at::Tensor counted(const at::Tensor& counts, at::ScalarType dtype);

/// bias + rate sign(mean(counts) - counts) or, proportional, bias + rate (mean(counts) - counts), over the last
/// dimension: arXiv 2408.15664 algorithm 1 and table 3. centre_step: minus the mean of the step; centre_bias: minus the
/// mean of the result. Counts of bfloat16 have their mean and distances in bfloat16, as Megatron-LM (moe_utils.py,
/// get_updated_expert_bias) computes them; all else is float64.
at::Tensor bias_update(const at::Tensor& bias, const at::Tensor& counts, double rate, bool proportional = false,
                       bool centre_step = false, bool centre_bias = false);

}  // namespace moeaudit::reference
