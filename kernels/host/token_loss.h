// Cross-entropy per token, and what becomes of it over micro-batches and ranks. Host kernels.
//
// Symbols: T tokens, V words, M micro-batches of an optimizer step, W ranks, s the sum of token losses of one
// micro-batch on one rank, n its number of labels.
#pragma once

#include <cstdint>

#include "kernels/host/z_loss.h"

namespace moeaudit::kernels {

/// Labels that count nowhere, as in transformers and PyTorch.
inline constexpr std::int64_t kIgnored = -100;

template <class T>
struct CrossEntropyArgs {
  const T* logits = nullptr;             // [tokens, vocabulary]
  const std::int64_t* labels = nullptr;  // [tokens], shifted already; kIgnored: no label
  std::int64_t tokens = 0;
  std::int64_t vocabulary = 0;
  double weight = 1;  // of every label in the gradient: 1 / (labels of the whole step), where it is right
};

template <class T>
struct CrossEntropyResult {
  double* sum = nullptr;           // [1], sum over labels of logsumexp(logits) - logits[label]
  std::int64_t* labels = nullptr;  // [1], how many there are
  double* token_loss = nullptr;    // [tokens], or null; 0 without a label
  T* gradient = nullptr;           // [tokens, vocabulary], or null: weight d sum / d logits = weight (softmax - onehot)
};

/// Float64 sums whatever T; tokens in stretches of kZLossRun as in z_loss(). kBadShape for sizes, and for a label that
/// is neither kIgnored nor a word; kNullPointer.
Status cross_entropy(const CrossEntropyArgs<float>& args, const CrossEntropyResult<float>& result);
Status cross_entropy(const CrossEntropyArgs<double>& args, const CrossEntropyResult<double>& result);

template <class T>
Status check_cross_entropy(const CrossEntropyArgs<T>& a, const CrossEntropyResult<T>& r) {
  if (a.tokens < 0 || a.vocabulary < 1) return Status::kBadShape;
  if (r.sum == nullptr || r.labels == nullptr) return Status::kNullPointer;
  return a.tokens > 0 && (a.logits == nullptr || a.labels == nullptr) ? Status::kNullPointer : Status::kOk;
}

/// From s and n of every micro-batch and rank to the loss of the step. Only kTokens is the loss of the whole batch; the
/// others are what trainers have computed instead, and equal it where all n are equal, times the factor given.
enum class Normalisation {
  kTokens,              // sum s / sum n
  kMeanOfMeans,         // mean over micro-batches and ranks of s / n; G1: transformers before 4.46, Megatron-LM without
                        // per-token loss. Factor 1
  kMeansSummed,         // sum over micro-batches, mean over ranks, of s / n: the division by M is missing. Factor M
  kMeansDividedTwice,   // kMeanOfMeans / M. Factor 1 / M
  kTokensTimesSteps,    // M sum s / sum n: tokens counted over the step and scaled back by nobody. Factor M
  kTokensDividedTwice,  // sum s / sum n / M. Factor 1 / M
  kTokensOfRank,  // mean over ranks of (sum over m of s / sum over m of n): ranks weigh the same whatever they hold.
                  // Factor 1
  kTokensTimesRanks,  // W sum s / sum n: sums of gradients where a mean was expected. Factor W
  kTokensOverRanks,   // sum s / sum n / W: the labels of all ranks, and a mean over ranks on top; transformers with
                      // average_tokens_across_devices off on one side. Factor 1 / W
  kSum,               // sum s: the divisor is missing, or 0 and clamped to 1; G12, verl #6609. Factor sum n
};

/// sums, labels [ranks, micro_batches]. loss [1]; weight [ranks, micro_batches] or null: d loss / d s of each. A
/// micro-batch without labels is worth 0 and counts among the M (0 / 0 would be NaN in some trainers). kBadShape,
/// kNullPointer.
Status normalise(Normalisation how, const double* sums, const std::int64_t* labels, std::int64_t ranks,
                 std::int64_t micro_batches, double* loss, double* weight);

/// What becomes of a loss that every micro-batch has by itself (a balance loss, a z-loss): its weight in the step, d
/// loss / d term. Right is the mean. Where every micro-batch has t tokens, all of them labels, the others are off by
/// the factor given; N = sum n. G1 and G12 are above; G13, a coefficient that nobody meant, has no weight that is
/// right.
enum class TermWeight {
  kMean,                // 1 / (M W)
  kSummed,              // 1 / W; G2: transformers with num_items_in_batch, NeMo Automodel #3359. Factor M
  kOverTokens,          // 1 / (M N); G3: divided as the sum of token losses is, Megatron-LM to 0.11. Factor 1 / (M t)
  kTokensOfShard,       // t / (tp cp N); G4: Megatron-LM #1652, #5047. Factor 1 / (tp cp)
  kTokensOfSequence,    // t / (S N); G5: Megatron-LM #5798. Factor 1 / S
  kTokensReducedTwice,  // tp cp t / N; G6: Megatron-LM #7452. Factor tp cp
  kWithoutContext,      // 1 / (cp M W); G7: the cross-entropy is multiplied by cp, this is not. Factor 1 / cp
  kAllTokens,           // t / N; G8: weighted by all tokens, divided by labels. Factor 1, or tokens over labels
  kDividedTwice,        // 1 / (M M W); G9: huggingface/trl #6083. Factor 1 / M
  kScaleOfLast,      // n of the rank's last micro-batch / N; G10: the scale is a global that the last one set. Factor 1
  kOverExpertRanks,  // ep / (M W); G11: gradients of experts averaged over the ranks that share them alone. Factor ep
};
struct StepShape {
  std::int64_t ranks = 1, micro_batches = 1;                                    // W (data-parallel), M
  std::int64_t tensor_parallel = 1, context_parallel = 1, expert_parallel = 1;  // tp, cp, ep
  std::int64_t sequences = 1;                                                   // S of a micro-batch
};
/// tokens, labels, weight [ranks, micro_batches]: t, n and the weight of each. kBadShape, without any label, too;
/// kNullPointer.
Status term_weights(TermWeight how, const StepShape& step, const std::int64_t* tokens, const std::int64_t* labels,
                    double* weight);

}  // namespace moeaudit::kernels
