// How evenly experts are loaded: counts from choices, and what to say of counts. Host kernels.
//
// Symbols: T tokens, E experts, k choices a token, n_e how often expert e was chosen, n = sum_e n_e / E the fair share,
// q_e = n_e / sum n, u_e = n_e / n. One window of tokens is one averaging set; nothing here averages over layers.
#pragma once

#include <cstdint>

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
  double effective_experts = 0;   // exp(H)
  double kl_to_uniform = 0;       // ln E - H
  double gini = 0;                // sum_i (2 i - E - 1) q_(i) / E, q ascending: 0 even, (E - 1) / E all on one
  std::int64_t idle = 0;          // experts with n_e = 0
  std::int64_t below_tenth = 0;   // experts with u_e < 0.1, the idle included
  // What independent tokens of a perfectly even router would show, so that the rest is excess:
  double max_violation_floor = 0;  // sqrt(2 ln E (E / k) (1 - k / E) / T)
  double cv_floor = 0;             // sqrt((E / k) (1 - k / E) / T)
  bool can_judge = false;          // n >= 100; below it the floor is what one sees
  bool idle_is_dead =
      false;  // 0.1 n > 6.9: an expert with a tenth of the fair share would be idle less often than 1e-3
};

/// counts [experts] over `tokens` tokens of top_k choices each; tokens tell the floor alone. Sums in the order of the
/// experts, ascending for the Gini. kBadShape also for negative counts; kBadTopK beyond 1..experts.
Status load_statistics(const std::int64_t* counts, std::int64_t experts, std::int64_t top_k, std::int64_t tokens,
                       LoadStatistics* out);

struct Interval {
  double low = 0, high = 0;
};
/// 95 % intervals by resampling blocks (documents, micro-batches), since the tokens of one are alike: counts [blocks,
/// experts]; `draws` times as many blocks are drawn with replacement, and the 2.5 and 97.5 % order statistics of each
/// statistic of their sum taken (as load_statistics() defines it; draws without any choice are left out, NaN if none
/// has one). Philox numbers of `seed` alone decide. kBadShape for fewer than 2 blocks or 40 draws, 2^31 blocks, or
/// negative counts.
struct LoadIntervals {
  Interval max_violation, min_violation, cv_population, normalised_entropy, gini;
};
Status load_intervals(const std::int64_t* counts, std::int64_t blocks, std::int64_t experts, std::int64_t draws,
                      std::uint64_t seed, LoadIntervals* out);

// ---- statistics of probabilities
// ------------------------------------------------------------------------------------------

struct RoutingStatistics {
  double token_entropy = 0;       // mean_t H(p_t) / ln E: how undecided the router is about a token
  double mean_entropy = 0;        // H(mean_t p_t) / ln E: how even the mean is
  double mutual_information = 0;  // H(mean p) - mean H(p), in nats: near 0 for a collapsed and for an undecided router
  double confidence = 0;          // mean_t sum of the chosen probabilities
};
/// probabilities [tokens, experts], rows that sum to 1; chosen [tokens, top_k]; valid [tokens] or null. Token sums in
/// the order of the tokens, float64. NaN without valid tokens. kBadShape also for an id that is no expert.
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

/// together [experts, experts]: tokens that chose both, the diagonal holds n_e. Rows over the diagonal are the
/// co-activation of OLMoE (arXiv 2409.02060), from all pairs of a token's choices.
Status co_activation(const CountArgs<std::int32_t>& args, std::int64_t* together);

}  // namespace moeaudit::kernels
