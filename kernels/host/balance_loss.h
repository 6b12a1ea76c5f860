// Balance losses: what keeps experts evenly loaded, from choices and probabilities. Host kernels.
//
// Symbols: T tokens of one set, E experts, k choices a token, D devices, c_e how often expert e was chosen in the set,
// P_e the mean of probability e over the set.
#pragma once

#include <cstdint>

#include "kernels/host/router.h"

namespace moeaudit::kernels {

/// Whose choices c_e counts.
enum class Counted {
  kAllChoices,   // every one of the k; Switch with k = 1 (arXiv 2101.03961 eq. 4 to 6), Megatron-LM, MegaBlocks,
                 // transformers
  kFirstChoice,  // the first alone, and no k; GShard (arXiv 2006.16668 algorithm 1, printed without E and as a mean
                 // over experts: this over E^2), DeepSpeed top-1 and top-2, Tutel
};

/// What the loss balances.
enum class Balanced {
  kExperts,  // E sum_e f_e P_e
  kDevices,  // sum_d (mean of E f_e over the experts of d) (sum of P_e over them); DeepSeekMoE, arXiv 2401.06066 eq. 15
             // to 17
  kCommunication,  // sum_d D / (M T) #(tokens with a choice on d) (sum of P_e); DeepSeek-V2, arXiv 2405.04434 eq. 29 to
                   // 31
};

/// What P_e averages.
enum class Averaged {
  kAsGiven,  // `probabilities` themselves
  kOverSum,  // each over the sum of its token's, in the order of the experts, plus sum_eps: where scores do not add up
             // to 1. Sigmoid routers: DeepSeek-V3, arXiv 2412.19437 eq. 19; OLMo-core; Megatron-LM with 1e-20
};

/// Tokens that a mean divides by where a mask takes some out. The masked never count in the sums.
enum class Divisor { kValidTokens, kAllTokens };

/// From the sets (sequences, layers, micro-batches) to one number.
enum class OverSets { kMean, kSum };

struct BalanceConvention {
  Counted counted = Counted::kAllChoices;
  /// f_e = c_e / (k T): balanced routing gives 1. false: c_e / T and k; transformers' load_balancing_loss_func,
  /// MaxText, Megatron-LM before core 0.5. Goes with kAllChoices.
  bool over_k = true;
  Balanced balanced = Balanced::kExperts;
  std::int64_t devices = 1;       // D equal runs of experts; must divide E
  std::int64_t most_devices = 1;  // M, devices that one token may reach; kCommunication alone
  Divisor divisor = Divisor::kValidTokens;
  OverSets over_sets = OverSets::kMean;
  Averaged averaged = Averaged::kAsGiven;
  double sum_eps = 0;
};

template <class T>
struct BalanceLossArgs {
  const T* probabilities = nullptr;  // [tokens, experts]; whatever the family averages, a softmax or other scores
  const std::int32_t* chosen =
      nullptr;  // [tokens, top_k], best first; negative: the slot was dropped, and counts nowhere
  const std::uint8_t* valid = nullptr;  // [tokens], 0 for padding; null: all are valid
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  /// [num_sets + 1] ascending offsets of the averaging sets, from 0 to tokens; null: all tokens are one set. One set a
  /// sequence is DeepSeek-V3's and Megatron's seq_aux_loss; one a layer its mean over layers; layers one after the
  /// other in one set is transformers' form.
  const std::int64_t* sets = nullptr;
  std::int64_t num_sets = 1;
  /// [num_sets, experts] with [num_sets] tokens they were counted over: f comes from these instead of `chosen`, which
  /// may be null. So the global-batch loss (arXiv 2501.11873: f over ranks and micro-batches, P local), counts before
  /// or after dropping, a running mean. OLMo-core divides by the labelled tokens of the whole batch and sums: those as
  /// counted_tokens, and OverSets::kSum. kExperts and kDevices alone.
  const std::int64_t* counts = nullptr;
  const std::int64_t* counted_tokens = nullptr;
  BalanceConvention convention;
};

template <class T>
struct BalanceLossResult {
  double* loss = nullptr;      // [1]
  double* set_loss = nullptr;  // [num_sets], or null
  std::int64_t* counts =
      nullptr;  // [num_sets, experts], or null: c_e of each set (of the first choice, if that is counted)
  double* mean_probability = nullptr;  // [num_sets, experts], or null: P_e of each set
  T* gradient = nullptr;  // [tokens, experts], or null: d loss / d probabilities. f is a constant of the loss
};

/// Stretch of tokens within a set whose probabilities are added up from 0 in their order; the stretch sums are then
/// added up in their order, from 0. The same on every backend, so that the bits are, too.
inline constexpr std::int64_t kBalanceRun = 256;

/// All sums are float64, whatever T; counts are exact. A set without valid tokens is worth 0, and counts among the
/// sets. NaN probabilities give NaN, and so does a sum of 0 without sum_eps. kBadShape: sizes, offsets that do not
/// ascend from 0 to tokens, devices that do not divide the experts; kBadTopK: top_k beyond 1..experts; kBadOption:
/// counts with kCommunication, over_k false with kFirstChoice; kNullPointer: no probabilities (of more than 0 tokens),
/// neither chosen nor counts, no place for the loss. An id beyond the experts is kBadShape.
Status balance_loss(const BalanceLossArgs<float>& args, const BalanceLossResult<float>& result);
Status balance_loss(const BalanceLossArgs<double>& args, const BalanceLossResult<double>& result);

/// What is wrong with the arguments, ids in `chosen` and the values of `sets` apart.
template <class T>
Status check_balance_loss(const BalanceLossArgs<T>& a, const BalanceLossResult<T>& r) {
  const BalanceConvention& c = a.convention;
  if (a.tokens < 0 || a.experts < 1 || a.num_sets < 1 || (a.sets == nullptr && a.num_sets != 1))
    return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if (c.devices < 1 || a.experts % c.devices != 0 || c.most_devices < 1) return Status::kBadShape;
  if (c.balanced == Balanced::kCommunication && a.counts != nullptr) return Status::kBadOption;
  if (c.counted == Counted::kFirstChoice && !c.over_k) return Status::kBadOption;
  if (r.loss == nullptr || (a.counts != nullptr) != (a.counted_tokens != nullptr)) return Status::kNullPointer;
  if (a.tokens > 0 && (a.probabilities == nullptr || (a.chosen == nullptr && a.counts == nullptr)))
    return Status::kNullPointer;
  if (a.chosen == nullptr && c.balanced == Balanced::kCommunication) return Status::kNullPointer;
  return Status::kOk;
}

/// What the probabilities of a token are divided by; and, given the weight[e] of P_e in the loss, what that takes from
/// all of its gradients.
struct BalanceToken {
  double sum = 1, along = 0;
};
template <class T>
MOE_AUDIT_HOST_DEVICE inline BalanceToken balance_token(const BalanceLossArgs<T>& a, std::int64_t t,
                                                        const double* weight) {
  BalanceToken token;
  if (a.convention.averaged == Averaged::kAsGiven) return token;
  const T* row = a.probabilities + t * a.experts;
  double sum = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) sum += static_cast<double>(row[e]);
  token.sum = sum + a.convention.sum_eps;
  for (std::int64_t e = 0; weight != nullptr && e < a.experts; ++e)
    token.along += weight[e] * (static_cast<double>(row[e]) / token.sum);
  return token;
}
/// A probability over that sum; most are as given, and a division an element is what they would feel.
template <class T>
MOE_AUDIT_HOST_DEVICE inline double share_of(T probability, double sum) {
  return sum == 1.0 ? static_cast<double>(probability) : static_cast<double>(probability) / sum;
}
MOE_AUDIT_HOST_DEVICE inline double balance_gradient(const BalanceToken& token, double share, double weight,
                                                     double divisor) {
  return share * (weight - token.along) / (token.sum * divisor);
}

/// weight[e] of P_e in the loss of one set, from counts of `counted` tokens; f, in one order on both sides.
MOE_AUDIT_HOST_DEVICE inline void balance_weights(const BalanceConvention& c, std::int64_t experts, std::int64_t top_k,
                                                  const std::int64_t* counts, const std::int64_t* device_tokens,
                                                  double counted, std::int64_t first, std::int64_t step,
                                                  double* weight) {
  const double per = counted * (c.counted == Counted::kFirstChoice || !c.over_k ? 1.0 : static_cast<double>(top_k));
  const std::int64_t on_device = experts / c.devices;
  for (std::int64_t e = first; e < experts; e += step) {
    const std::int64_t d = e / on_device;
    if (counted == 0.0) {
      weight[e] = 0.0;
    } else if (c.balanced == Balanced::kExperts) {
      weight[e] = static_cast<double>(experts) * static_cast<double>(counts[e]) / per;
    } else if (c.balanced == Balanced::kDevices) {
      std::int64_t sum = 0;
      for (std::int64_t i = d * on_device; i < (d + 1) * on_device; ++i) sum += counts[i];
      weight[e] = static_cast<double>(c.devices) * static_cast<double>(sum) / per;
    } else {
      weight[e] = static_cast<double>(c.devices) * static_cast<double>(device_tokens[d]) /
                  (static_cast<double>(c.most_devices) * counted);
    }
  }
}

}  // namespace moeaudit::kernels
