// What a router's choices say beside the load of expert_load.h: margins, agreement of two sets of choices, dependence
// on token, position or domain, scopes of MaxVio, load of ranks; each with what chance alone would show. Host kernels.
//
// Symbols: T tokens, E experts, k choices a token, n_e how often expert e was chosen. Gate mass is the `importance` of
// router_regularisers.h: of the chosen alone, or of all probabilities.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host/expert_load.h"

namespace moeaudit::kernels {

// ---- margins
// -------------------------------------------------------------------------------------------------------------

/// margin_t = least chosen - largest other `choice` of token t: how far its set of experts is from another one.
template <class T>
struct MarginArgs {
  const T* choice = nullptr;  // [tokens, experts], what the selection compared: with the correction bias, after the
                              // group mask (so the margin is that within the kept groups)
  const std::int32_t* chosen = nullptr;  // [tokens, top_k]; negative: dropped, counts neither as chosen nor as other
  const std::uint8_t* valid = nullptr;   // [tokens], 0 for padding; null: all are valid
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  /// A near tie has a margin of at most one place of this dtype at the larger of the two values, either way: rounding
  /// the scores to it may make them equal, and so swap the experts; a larger margin survives. The dtype that the
  /// router's scores have, or would have.
  Float dtype = Float::kBF16;
};
/// Over the valid tokens.
struct MarginCounts {
  std::int64_t tokens = 0;
  std::int64_t near_ties = 0;  // ties included
  std::int64_t ties = 0;       // margin 0: the order of equals decides
  std::int64_t inverted = 0;   // margin below 0: the choice is not the top-k of these values
  std::int64_t nan = 0;        // no margin: NaN among the values, or nothing chosen
};
struct MarginResult {
  double* margin = nullptr;        // [tokens], or null; of padding, too. +inf where every expert is chosen
  MarginCounts* counts = nullptr;  // [1]
};
/// A dropped slot hides which expert it was, so a token with one has the margin of the others against all that it does
/// not name. kBadShape also for an id beyond the experts; kBadTopK, kNullPointer.
Status routing_margins(const MarginArgs<float>& args, const MarginResult& result);
Status routing_margins(const MarginArgs<double>& args, const MarginResult& result);

template <class T>
Status check_margins(const MarginArgs<T>& a, const MarginResult& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  const bool some = a.tokens > 0 && (a.choice == nullptr || a.chosen == nullptr);
  return r.counts == nullptr || some ? Status::kNullPointer : Status::kOk;
}

struct TokenMargin {
  double margin = 0;
  bool near = false;
};
template <class T>
MOE_AUDIT_HOST_DEVICE inline TokenMargin token_margin(const MarginArgs<T>& a, std::int64_t t) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::int32_t* chosen = a.chosen + t * a.top_k;
  double least = kInfinity, most = -kInfinity;
  bool any = false, nan = false;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    const double v = static_cast<double>(a.choice[t * a.experts + e]);
    bool in = false;
    for (std::int64_t j = 0; j < a.top_k; ++j) in = in || chosen[j] == e;
    nan = nan || v != v;
    any = any || in;
    if (in && v < least) least = v;
    if (!in && v > most) most = v;
  }
  if (nan || !any) return {std::numeric_limits<double>::quiet_NaN(), false};
  // The infinities that both may be: -inf against -inf is a tie of experts that the mask took out.
  const double margin = least == most ? 0.0 : least - most;
  if (!(margin - margin == 0.0)) return {margin, false};
  const double a_size = std::fabs(least), b_size = std::fabs(most), larger = a_size > b_size ? a_size : b_size;
  return {margin, larger - larger != 0.0 ? margin == 0.0 : std::fabs(margin) <= spacing(larger, a.dtype)};
}

/// Value at rank floor(share (n - 1)) of the n values that are no NaN, ascending; NaN if there are none. shares [count]
/// within 0..1. kBadShape, kBadOption for a share outside, kNullPointer.
Status order_statistics(const double* values, const std::uint8_t* valid, std::int64_t n, const double* shares,
                        std::int64_t count, double* out);

/// 95 % interval of sum above / sum below (a share of near ties, a saturation, a confidence) by resampling blocks as
/// load_intervals() does: `draws` times as many blocks as there are, with replacement. Draws without a divisor are left
/// out. kBadShape for fewer than 2 blocks or 40 draws, or 2^31 blocks; kNullPointer.
Status ratio_interval(const double* above, const double* below, std::int64_t blocks, std::int64_t draws,
                      std::uint64_t seed, Interval* out);

// ---- two sets of choices for the same tokens
// -----------------------------------------------------------------------------

/// The same tokens routed twice: with and without the correction bias (bias-affinity), at two checkpoints (saturation;
/// OLMoE, arXiv 2409.02060), by two dtypes or backends.
struct AgreementArgs {
  const std::int32_t* now = nullptr;  // [tokens, now_k], ids of a token distinct; negative: dropped, not in the set
  const std::int32_t* reference = nullptr;  // [tokens, reference_k]
  const std::uint8_t* valid = nullptr;
  std::int64_t tokens = 0;
  std::int64_t now_k = 0;
  std::int64_t reference_k = 0;
};
/// Integers, so that any order gives the same.
struct AgreementCounts {
  std::int64_t tokens = 0;       // valid
  std::int64_t same_first = 0;   // both have a first choice, and the same
  std::int64_t chosen_now = 0;   // sizes of the sets, added up
  std::int64_t chosen_then = 0;  // of the reference
};
/// table [agreement_rows(args), agreement_columns(args)]: tokens by |A and B| and |A or B|. kBadShape, kBadTopK,
/// kNullPointer.
Status count_agreement(const AgreementArgs& args, std::int64_t* table, AgreementCounts* counts);
inline std::int64_t agreement_rows(const AgreementArgs& a) {
  return (a.now_k < a.reference_k ? a.now_k : a.reference_k) + 1;
}
MOE_AUDIT_HOST_DEVICE inline std::int64_t agreement_columns(const AgreementArgs& a) {
  return a.now_k + a.reference_k + 1;
}
Status check_agreement(const AgreementArgs& args, const std::int64_t* table, const AgreementCounts* counts);

struct TokenAgreement {
  std::int64_t shared = 0, now = 0, then = 0;
  bool same_first = false;
};
MOE_AUDIT_HOST_DEVICE inline TokenAgreement token_agreement(const AgreementArgs& a, std::int64_t t) {
  const std::int32_t *now = a.now + t * a.now_k, *then = a.reference + t * a.reference_k;
  TokenAgreement s;
  s.same_first = now[0] >= 0 && now[0] == then[0];
  for (std::int64_t j = 0; j < a.reference_k; ++j) s.then += then[j] >= 0;
  for (std::int64_t i = 0; i < a.now_k; ++i) {
    if (now[i] < 0) continue;
    ++s.now;
    for (std::int64_t j = 0; j < a.reference_k; ++j) s.shared += now[i] == then[j];
  }
  return s;
}

/// 0 / 0 is NaN throughout.
struct Agreement {
  double saturation = 0;  // sum |A and B| / sum |B|, B the reference: its choices that are still made
  double changed = 0;     // 1 - saturation: the routing change rate
  double jaccard = 0;     // mean of |A and B| / |A or B| over tokens that chose something
  double identical = 0;   // share of tokens with equal sets
  double same_first = 0;  // share of tokens with the same first choice
  // Two independent, even choices of now_k and reference_k out of E:
  double saturation_chance = 0;  // now_k / E
  double jaccard_chance = 0;     // |A and B| is hypergeometric
  double same_first_chance = 0;  // 1 / E
};
/// From what count_agreement() counted. kBadTopK: a k beyond the experts.
Status agreement(const AgreementArgs& args, const std::int64_t* table, const AgreementCounts& counts,
                 std::int64_t experts, Agreement* out);

/// The same tokens at several checkpoints of one run, the last one final.
struct SettlingArgs {
  const std::int32_t* first =
      nullptr;  // [checkpoints, tokens], the first choice of each; negative: one of its own kind
  const std::uint8_t* valid = nullptr;
  std::int64_t checkpoints = 0;
  std::int64_t tokens = 0;
};
/// tokens_settled [checkpoints]: valid tokens whose first choice is that of the last checkpoint from checkpoint s on,
/// and no earlier. Checkpoint s - 1 is the last fluctuation of StableMoE (arXiv 2204.08396), where the expert is
/// another one than at the end; its share of the training is the caller's to say. kBadShape, kNullPointer.
Status count_settled(const SettlingArgs& args, std::int64_t* tokens_settled);
inline Status check_settling(const SettlingArgs& a, const std::int64_t* tokens_settled) {
  if (a.checkpoints < 1 || a.tokens < 0) return Status::kBadShape;
  return tokens_settled == nullptr || (a.tokens > 0 && a.first == nullptr) ? Status::kNullPointer : Status::kOk;
}
MOE_AUDIT_HOST_DEVICE inline std::int64_t settled_at(const SettlingArgs& a, std::int64_t t) {
  std::int64_t s = a.checkpoints - 1;
  while (s > 0 && a.first[(s - 1) * a.tokens + t] == a.first[(a.checkpoints - 1) * a.tokens + t]) --s;
  return s;
}

// ---- dependence on a label
// -----------------------------------------------------------------------------------------------

/// table [num_labels, experts]: choices of each expert by tokens of each label (token id, position, domain), of the
/// valid tokens. `outside`: choices that are no expert, or of a label outside 0..num_labels - 1. Exact. kBadShape,
/// kBadTopK, kNullPointer.
Status count_by_label(const CountArgs<std::int32_t>& args, const std::int32_t* labels, std::int64_t num_labels,
                      std::int64_t* table, std::int64_t* outside);
inline Status check_count_by_label(const CountArgs<std::int32_t>& a, const std::int32_t* labels,
                                   std::int64_t num_labels, const std::int64_t* table, const std::int64_t* outside) {
  if (const Status status = check_count(a, table, outside); status != Status::kOk) return status;
  if (num_labels < 1) return Status::kBadShape;
  return a.tokens > 0 && labels == nullptr ? Status::kNullPointer : Status::kOk;
}

struct Dependence {
  std::int64_t choices = 0;       // N
  std::int64_t labels_seen = 0;   // L, rows with a choice
  std::int64_t experts_seen = 0;  // columns
  double mutual_information = 0;  // I(label; expert) = sum n_le / N ln(n_le N / (n_l n_e)), in nats
  double expert_entropy = 0;      // H of the experts, in nats: the most I can be
  double explained = 0;           // I / H: 0 independent, 1 the label decides. NaN where H is 0
  /// What labels that say nothing would show: (L - 1)(E - k) / (2 N), E the experts seen. For k = 1 the first term of
  /// the bias of I (Miller 1955); the k experts of a token are different ones, which makes counts steadier by (E - k) /
  /// (E - 1), as long as none is near a share of 1. Right while the expected counts are not far below 1; with rarer
  /// labels it overstates.
  double chance = 0;
};
/// Sums in the order of the rows, then of the columns. NaN without a choice. kBadShape also for negative counts.
Status dependence(const std::int64_t* table, std::int64_t labels, std::int64_t experts, std::int64_t top_k,
                  Dependence* out);

/// What a row's share of a column is held against.
enum class LiftOver {
  kOverall,  // the column's share of everything: n_rc N / (n_r n_c)
  kEven,     // 1 / columns: n_rc C / n_r; with domains as rows OLMoE's domain specialisation (arXiv 2409.02060) over
             // its line k / E
};
/// out [rows, columns]: 1 is no more than that, 2 twice as often. NaN where a divisor is 0. kBadShape, kNullPointer.
Status lift(const std::int64_t* table, std::int64_t rows, std::int64_t columns, LiftOver over, double* out);

struct CoActivation {
  double rate_chance = 0;  // (k - 1) / (E - 1)
  double lift_chance = 0;  // E (k - 1) / (k (E - 1)): below 1, since one expert is not chosen twice
};
/// From the `together` [experts, experts] of co_activation() over `tokens` tokens: rate [experts, experts] = N_ij /
/// N_i, how often j comes with i (row-normalised, all pairs of a token: arXiv 2409.02060), and lift = N_ij T / (N_i
/// N_j); the diagonals are left NaN. Either may be null. NaN where i (or j) was never chosen. kBadShape, kBadTopK,
/// kNullPointer.
Status co_activation_rates(const std::int64_t* together, std::int64_t experts, std::int64_t top_k, std::int64_t tokens,
                           double* rate, double* lift, CoActivation* chance);

// ---- load in its scopes
// --------------------------------------------------------------------------------------------------

/// The same counts, cut three ways. MaxVio is convex in the counts: with windows of equal size micro >= step >= pooled,
/// always; so a number without its scope says little.
struct LoadScopes {
  double micro_max_violation = 0;                   // mean over all micro-batches (MaxVio_batch of arXiv 2408.15664)
  double step_max_violation = 0;                    // mean over steps, the micro-batches of a step added up
  double pooled_max_violation = 0;                  // of everything added up (MaxVio_global)
  double micro_cv = 0, step_cv = 0, pooled_cv = 0;  // population
  std::int64_t empty = 0;  // micro-batches without a choice; left out of the means, as are empty steps
};
/// counts [steps, micro_batches, experts]. NaN where nothing was chosen. kBadShape also for negative counts and where
/// all sum to more than 2^63 - 1; kNullPointer.
Status load_scopes(const std::int64_t* counts, std::int64_t steps, std::int64_t micro_batches, std::int64_t experts,
                   LoadScopes* out);

/// Share of all choices that the `busiest` most chosen experts got; chance, and evenness, is busiest / E.
Status coverage(const std::int64_t* counts, std::int64_t experts, std::int64_t busiest, double* share);

// ---- load of ranks
// -------------------------------------------------------------------------------------------------------

/// What expert parallelism makes of one layer's counts. A slot is an expert's copy on a rank; the choices of an expert
/// with several copies are spread evenly over them. A rank takes load / speed, and all wait for the slowest.
struct PlacementArgs {
  const std::int64_t* counts = nullptr;       // [experts]
  const std::int32_t* slot_expert = nullptr;  // [slots]; every expert at least once
  const std::int32_t* slot_rank = nullptr;    // [slots]
  const double* speed = nullptr;              // [ranks], relative, above 0; null: all alike
  std::int64_t experts = 0;
  std::int64_t slots = 0;
  std::int64_t ranks = 0;
  std::int64_t top_k = 0;   // with tokens, for even_router alone
  std::int64_t tokens = 0;  // 0: unknown, and without end
};
/// Times in choices of a rank of speed 1. NaN without a choice, but even_router.
struct Placement {
  double ideal = 0;          // if the choices were divided as the speeds are: choices / sum of speeds
  double slowest = 0;        // of the rank that takes longest
  double max_over_mean = 0;  // slowest / ideal; of like ranks their largest load over the mean
  std::int64_t slowest_rank = -1;
  std::int64_t idle_ranks = 0;  // without a choice
  /// max_over_mean that independent tokens of an even router would show: the largest over the ranks of m (1 + c sqrt(2
  /// ln R / T)), m the rank's expected share over its share of the speed, c^2 the relative variance of what a token
  /// sends it, (E - k) E^2 s^2 / (k (E - 1) M^2), M and s^2 the sum and the population variance over experts of their
  /// share on the rank (k of E without replacement). Of E / R experts on each of R like ranks c^2 = (R - 1)(E - k) / (k
  /// (E - 1)), and R = E gives the floor of MaxVio.
  double even_router = 0;
};
/// loads [ranks]: choices, or null. Sums in the order of the slots. kBadShape also for a rank or an expert outside, an
/// expert without a slot, a negative count, a speed that is not above 0; kBadTopK, kNullPointer.
Status placement_load(const PlacementArgs& args, double* loads, Placement* out);

}  // namespace moeaudit::kernels
