// Cross-entropy in float64 on LibTorch, and what a step makes of its micro-batches' losses: the truth that
// kernels/host/token_loss.h answers to, and whose enums these are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

/// Sum over the labels that are not -100 of -log softmax(logits [T, V])[label]. Differentiable.
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels);

enum class Normalisation {
  kTokens,
  kMeanOfMeans,
  kMeansSummed,
  kMeansDividedTwice,
  kTokensTimesSteps,
  kTokensDividedTwice,
  kTokensOfRank,
  kTokensTimesRanks,
  kTokensOverRanks,
  kSum,
};
/// The loss of the step from sums and labels [ranks, micro-batches]; 0 / 0 is 0. Differentiable through the sums.
at::Tensor normalised(Normalisation how, const at::Tensor& sums, const at::Tensor& labels);

enum class TermWeight {
  kMean,
  kSummed,
  kOverTokens,
  kTokensOfShard,
  kTokensOfSequence,
  kTokensReducedTwice,
  kWithoutContext,
  kAllTokens,
  kDividedTwice,
  kScaleOfLast,
  kOverExpertRanks,
};
struct StepShape {
  std::int64_t tensor_parallel = 1, context_parallel = 1, expert_parallel = 1, sequences = 1;
};
/// What the step makes of terms [ranks, micro-batches], as the trainer composes it: gradients of the micro-batches added
/// up, then divided, then averaged over the ranks. Differentiable through the terms; the weights are its gradient.
at::Tensor joined_terms(TermWeight how, const StepShape& step, const at::Tensor& terms, const at::Tensor& tokens,
                        const at::Tensor& labels);

}  // namespace moeaudit::reference
