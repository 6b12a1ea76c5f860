// How evenly experts are loaded: counts from choices, and what to say of counts. Host kernels.
//
// Symbols: T tokens, E experts, k choices a token, n_e how often expert e was chosen, n = sum_e n_e / E the fair share,
// q_e = n_e / sum n, u_e = n_e / n. One window of tokens is one averaging set; nothing here averages over layers.
#pragma once

#include <cstdint>

#include "kernels/host/balance_loss.h"
#include "kernels/host/elementary.h"
#include "kernels/host/router.h"

namespace moeaudit::kernels {

// ---- counts
// --------------------------------------------------------------------------------------------------------------

template <class Id>
struct CountArgs {
  const Id* chosen = nullptr;           // [tokens, top_k]
  const std::uint8_t* valid = nullptr;  // [tokens], 0 for padding; null: all are valid
  std::int64_t tokens = 0;
  std::int64_t top_k = 0;
  std::int64_t experts = 0;
};

/// counts [experts] = how often each expert is among the choices of the valid tokens; `outside`: choices that are no
/// expert (negative: dropped; or beyond the last). Exact. kBadShape, kBadTopK, kNullPointer.
Status count_choices(const CountArgs<std::int16_t>& args, std::int64_t* counts, std::int64_t* outside);
Status count_choices(const CountArgs<std::int32_t>& args, std::int64_t* counts, std::int64_t* outside);

template <class Id>
Status check_count(const CountArgs<Id>& a, const std::int64_t* counts, const std::int64_t* outside) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.top_k < 1) return Status::kBadTopK;
  return counts == nullptr || outside == nullptr || (a.tokens > 0 && a.chosen == nullptr) ? Status::kNullPointer
                                                                                          : Status::kOk;
}

// ---- statistics of counts
// ------------------------------------------------------------------------------------------------

/// All of one window. 0 / 0 (no choice at all) is NaN throughout.
struct LoadStatistics {
  std::int64_t choices = 0;       // sum_e n_e
  double fair_share = 0;          // n
  double max_violation = 0;       // MaxVio = (max_e n_e - n) / n; Loss-Free Balancing, arXiv 2408.15664 eq. 4
  double min_violation = 0;       // (n - min_e n_e) / n: 1 where an expert got nothing
  double cv_population = 0;       // standard deviation over E experts / n; arXiv 1701.06538 as tensor2tensor has it
  double cv_sample = 0;           // the same over E - 1: the common PyTorch port, NeMo Automodel. NaN for one expert
  double entropy = 0;             // H = -sum_e q_e ln q_e, in nats
  double normalised_entropy = 0;  // H / ln E; 1 for one expert
  double effective_experts = 0;   // exp(H); over E: NeMo Automodel's diversity
  double kl_to_uniform = 0;       // ln E - H
  double gini = 0;                // sum_i (2 i - E - 1) q_(i) / E, q ascending: 0 even, (E - 1) / E all on one
  std::int64_t idle = 0;          // experts with n_e = 0
  std::int64_t below_tenth = 0;   // experts with u_e < 0.1, the idle included
  std::int64_t below_permille = 0,
               below_half_percent = 0;  // q_e < 0.001 and < 0.005: MoEWatch's dead and cold, whatever
                                        // E; beyond 200 experts an even load is below the second
  // What independent tokens of a perfectly even router would show, so that the rest is excess:
  double max_violation_floor = 0;  // sqrt(2 ln E (E / k) (1 - k / E) / T)
  double cv_floor = 0;             // sqrt((E / k) (1 - k / E) / T)
  bool can_judge = false;          // n >= 100; below it the floor is what one sees
  bool idle_is_dead =
      false;  // 0.1 n > 6.9: an expert with a tenth of the fair share would be idle less often than 1e-3
};

/// counts [experts] over `tokens` tokens of top_k choices each; tokens tell the floor alone. Sums in the order of the
/// experts, ascending for the Gini. kBadShape also for negative counts and where they sum to more than 2^63 - 1;
/// kBadTopK beyond 1..experts.
Status load_statistics(const std::int64_t* counts, std::int64_t experts, std::int64_t top_k, std::int64_t tokens,
                       LoadStatistics* out);

struct Interval {
  double low = 0, high = 0;
};
/// 95 % intervals by resampling blocks (documents, micro-batches), since the tokens of one are alike: counts [blocks,
/// experts]; `draws` times as many blocks are drawn with replacement, and the 2.5 and 97.5 % order statistics of each
/// statistic of their sum taken (as load_statistics() defines it; draws without any choice are left out, NaN if none
/// has one). Philox numbers of `seed` alone decide. kBadShape for fewer than 2 blocks or 40 draws, 2^31 blocks,
/// negative counts, or a block that drawn `blocks` times would sum to more than 2^63 - 1.
struct LoadIntervals {
  Interval max_violation, min_violation, cv_population, normalised_entropy, gini;
};
Status load_intervals(const std::int64_t* counts, std::int64_t blocks, std::int64_t experts, std::int64_t draws,
                      std::uint64_t seed, LoadIntervals* out);

/// The block that draw i of `seed` takes, of `blocks` < 2^31.
std::int64_t drawn_block(std::uint64_t seed, std::int64_t i, std::int64_t blocks);

// ---- statistics of probabilities
// ------------------------------------------------------------------------------------------

struct RoutingStatistics {
  double token_entropy = 0;       // mean_t H(p_t) / ln E: how undecided the router is about a token
  double mean_entropy = 0;        // H(mean_t p_t) / ln E: how even the mean is
  double mutual_information = 0;  // H(mean p) - mean H(p), in nats: near 0 for a collapsed and for an undecided router
  double confidence = 0;          // mean_t sum of the chosen probabilities
};
/// probabilities [tokens, experts], rows that sum to 1; chosen [tokens, top_k]; valid [tokens] or null. Float64; sums
/// over tokens in stretches of kBalanceRun tokens, each from 0, then the stretches in their order. NaN without valid
/// tokens. What is no probability goes where the formulas take it: NaN and what is below 0 make the token entropy NaN,
/// an infinity makes it -inf; of tokens that are not valid it is not read. kBadShape also for an id that is no expert.
template <class T>
struct RoutingStatisticsArgs {
  const T* probabilities = nullptr;
  const std::int32_t* chosen = nullptr;
  const std::uint8_t* valid = nullptr;
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
};
Status routing_statistics(const RoutingStatisticsArgs<float>& args, RoutingStatistics* out);
Status routing_statistics(const RoutingStatisticsArgs<double>& args, RoutingStatistics* out);

template <class T>
Status check_routing_statistics(const RoutingStatisticsArgs<T>& a, const RoutingStatistics* out) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  const bool some = a.tokens > 0 && (a.probabilities == nullptr || a.chosen == nullptr);
  return out == nullptr || some ? Status::kNullPointer : Status::kOk;
}

MOE_AUDIT_HOST_DEVICE inline double entropy_term(double p) { return p == 0.0 ? 0.0 : -p * log_exact_order(p); }

/// Entropy of a token in nats; its chosen mass.
template <class T>
MOE_AUDIT_HOST_DEVICE inline double token_entropy(const RoutingStatisticsArgs<T>& a, std::int64_t t) {
  double sum = 0;
  for (std::int64_t e = 0; e < a.experts; ++e)
    sum += entropy_term(static_cast<double>(a.probabilities[t * a.experts + e]));
  return sum;
}
template <class T>
MOE_AUDIT_HOST_DEVICE inline double chosen_mass(const RoutingStatisticsArgs<T>& a, std::int64_t t) {
  double sum = 0;
  for (std::int64_t j = 0; j < a.top_k; ++j) {
    const std::int32_t e = a.chosen[t * a.top_k + j];
    if (e >= 0 && e < a.experts) sum += static_cast<double>(a.probabilities[t * a.experts + e]);
  }
  return sum;
}
/// From the sums over tokens of the probabilities [experts], of entropy and of mass.
MOE_AUDIT_HOST_DEVICE inline RoutingStatistics finish_routing_statistics(const double* sums, std::int64_t experts,
                                                                         double entropies, double mass,
                                                                         std::int64_t tokens) {
  const double n = static_cast<double>(tokens);  // 0 / 0 is NaN
  const double most = experts == 1 ? 1.0 : log_exact_order(static_cast<double>(experts));
  double mean_entropy = 0;
  for (std::int64_t e = 0; e < experts; ++e) mean_entropy += entropy_term(sums[e] / n);
  return {entropies / n / most, mean_entropy / most, mean_entropy - entropies / n, mass / n};
}

/// together [experts, experts]: tokens that chose both, the diagonal holds n_e. Rows over the diagonal are the
/// co-activation of OLMoE (arXiv 2409.02060), from all pairs of a token's choices.
Status co_activation(const CountArgs<std::int32_t>& args, std::int64_t* together);

/// Choices i and j of a token are two experts, or one of them by itself.
MOE_AUDIT_HOST_DEVICE inline bool is_pair(const std::int32_t* chosen, std::int64_t i, std::int64_t j,
                                          std::int64_t experts) {
  const bool both = chosen[i] >= 0 && chosen[i] < experts && chosen[j] >= 0 && chosen[j] < experts;
  return both && (i == j || chosen[i] != chosen[j]);
}

}  // namespace moeaudit::kernels
