// Regularisers of the router beside the balance losses: importance and smooth load, entropy, orthogonality of the
// gate's rows, overlap of the experts' outputs, variance of the scores. Each with its gradient. Host kernels.
//
// Symbols: T tokens, E experts, k choices a token, d hidden. Every loss is multiplied by its `weight`; 1 gives the bare
// value. Padding counts nowhere, and its gradient is 0.
//
// Sums over tokens: stretches of kBalanceRun tokens (padding included in the stretch, left out of the sum), each from 0
// in the order of the tokens, then the stretches in their order, from 0. Sums over experts run in their order. All of
// it float64, whatever T; gradients are rounded to T once. So the bits are the same on every backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host/balance_loss.h"
#include "kernels/host/normal.h"
#include "kernels/host/z_loss.h"

namespace moeaudit::kernels {

// ---- squared coefficient of variation
// ------------------------------------------------------------------------------------

/// What the variance divides by: E (tensor2tensor, expert_utils.py CVSquared at 01787ca8; V-MoE, numpy's std), or E - 1
/// (torch's var(): fastmoe's NoisyGate at 8622adfd, the port davidmrau/mixture-of-experts at f6629997), which is larger
/// by E / (E - 1).
enum class Variance { kPopulation, kSample };

struct CvConvention {
  Variance variance = Variance::kPopulation;
  double eps = 0;  // added to the squared mean; 1e-10 in all three of the above, 0 in the paper and in V-MoE
};

/// CV^2 = variance(v) / (mean(v)^2 + eps). slope [n], or null: its derivative by each value,
/// 2 (v_i - mean) / (n' (mean^2 + eps)) - CV^2 2 mean / (n (mean^2 + eps)), n' = n or n - 1. kSample of one value: 0,
/// as the ports have it. 0 / 0 (all values 0, no eps): NaN.
MOE_AUDIT_HOST_DEVICE inline double cv_squared(const double* v, std::int64_t n, const CvConvention& c, double* slope) {
  const bool sample = c.variance == Variance::kSample;
  const double count = static_cast<double>(n), by = sample ? count - 1.0 : count;
  double sum = 0, squares = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += v[i];
  const double mean = sum / count, below = mean * mean + c.eps;
  for (std::int64_t i = 0; i < n; ++i) squares += (v[i] - mean) * (v[i] - mean);
  const bool alone = sample && n == 1;
  const double cv = alone ? 0.0 : squares / by / below;
  for (std::int64_t i = 0; slope != nullptr && i < n; ++i)
    slope[i] = alone ? 0.0 : 2.0 * (v[i] - mean) / (by * below) - cv * (2.0 * mean) / (count * below);
  return cv;
}

// ---- importance
// ----------------------------------------------------------------------------------------------------------

/// weight CV^2(importance), importance_e = sum_t gate of e: Shazeer et al., arXiv 1701.06538 eq. 6 and 7, where the
/// gates are those after the top-k, the others 0; V-MoE (arXiv 2106.05974) sums the whole softmax.
template <class T>
struct ImportanceLossArgs {
  const T* gates = nullptr;  // [tokens, width]
  /// [tokens, width], the expert of each gate, negative: dropped, counts nowhere. Null: width is experts and gate e is
  /// that of expert e.
  const std::int32_t* chosen = nullptr;
  const std::uint8_t* valid = nullptr;  // [tokens], 0 for padding; null: all are valid
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t width = 0;
  CvConvention cv;
  double weight = 1;
};
template <class T>
struct ImportanceLossResult {
  double* loss = nullptr;        // [1]
  double* importance = nullptr;  // [experts], or null
  T* gradient = nullptr;         // [tokens, width], or null: d loss / d gates, for route_backward(); 0 where dropped
};
/// kBadShape: sizes, width beyond the experts, an id beyond them; kBadTopK: width that is not experts without chosen.
Status importance_loss(const ImportanceLossArgs<float>& args, const ImportanceLossResult<float>& result);
Status importance_loss(const ImportanceLossArgs<double>& args, const ImportanceLossResult<double>& result);

template <class T>
Status check_importance_loss(const ImportanceLossArgs<T>& a, const ImportanceLossResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.width < 1 || a.width > a.experts || (a.chosen == nullptr && a.width != a.experts)) return Status::kBadTopK;
  return r.loss == nullptr || (a.tokens > 0 && a.gates == nullptr) ? Status::kNullPointer : Status::kOk;
}

// ---- smooth load
// ---------------------------------------------------------------------------------------------------------

/// What a token's expert would have to exceed to be chosen, if its own noise were drawn again.
enum class LoadThreshold {
  kWithoutSelf,  // the k-th largest noisy logit of the other experts; arXiv 1701.06538 appendix A, eq. 8 and 9
  kLastChosen,   // the k-th largest of all, its own included; V-MoE (vmoe/nn/routing.py _load_auxiliary_loss)
};

/// noisy = clean + noise stddev, stddev = softplus(raw) + added (eq. 4); P(t, e) = Phi((clean - threshold) / stddev)
/// (eq. 9); load_e = sum_t P(t, e) (eq. 10); loss = weight CV^2(load) (eq. 11). The gradient goes through the
/// threshold, too, to the expert that set it: no framework detaches it. Equals are ranked by the lower index.
///
/// davidmrau/mixture-of-experts at f6629997 takes its thresholds from softmax(noisy), but compares them with clean
/// logits: not this loss, whatever the convention.
template <class T>
struct LoadLossArgs {
  const T* clean = nullptr;  // [tokens, experts], logits before the noise
  const T* noise = nullptr;  // [tokens, experts], standard normal numbers
  const T* raw = nullptr;    // [tokens, experts], x W_noise; null: stddev is `added` everywhere (V-MoE: 1 / E)
  const std::uint8_t* valid = nullptr;
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  double added = 0;  // noise_epsilon, 1e-2 in tensor2tensor and the ports
  LoadThreshold threshold = LoadThreshold::kWithoutSelf;
  CvConvention cv;
  double weight = 1;
};
template <class T>
struct LoadLossResult {
  double* loss = nullptr;         // [1]
  double* load = nullptr;         // [experts], or null
  double* probability = nullptr;  // [tokens, experts], or null: P; of padding, too
  T* d_clean = nullptr;           // [tokens, experts], or null
  T* d_raw = nullptr;             // [tokens, experts], or null; needs raw
};
/// top_k = E with kWithoutSelf: no expert can be left out, P is 1 and the gradient 0. A stddev of 0 makes P 0 or 1, NaN
/// at the threshold itself, and the gradients NaN. NaN logits rank as the largest, as in route().
/// kBadShape, kBadTopK, kNullPointer; kBadOption: d_raw without raw.
Status load_loss(const LoadLossArgs<float>& args, const LoadLossResult<float>& result);
Status load_loss(const LoadLossArgs<double>& args, const LoadLossResult<double>& result);

template <class T>
Status check_load_loss(const LoadLossArgs<T>& a, const LoadLossResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if (r.d_raw != nullptr && a.raw == nullptr) return Status::kBadOption;
  const bool some = a.tokens > 0 && (a.clean == nullptr || a.noise == nullptr);
  return r.loss == nullptr || some ? Status::kNullPointer : Status::kOk;
}

template <class T>
MOE_AUDIT_HOST_DEVICE inline double load_stddev(const LoadLossArgs<T>& a, std::int64_t at) {
  return a.raw == nullptr ? a.added : softplus_exact_order(static_cast<double>(a.raw[at])) + a.added;
}

/// The experts with the k-th and the (k + 1)-th largest of `values`, -1 where there is none: k + 1 passes, each for the
/// best after the one before.
struct LastChosen {
  std::int64_t kth = -1, after = -1;
};
MOE_AUDIT_HOST_DEVICE inline LastChosen last_chosen(const double* values, std::int64_t experts, std::int64_t top_k) {
  const auto better = [&](std::int64_t a, std::int64_t b) {
    const double x = values[a], y = values[b];
    if (x > y || (x != x && y == y)) return true;
    return (x == y || (x != x && y != y)) && a < b;
  };
  LastChosen last;
  for (std::int64_t rank = 0; rank <= top_k && rank < experts; ++rank) {
    std::int64_t best = -1;
    for (std::int64_t e = 0; e < experts; ++e) {
      if ((last.after < 0 || better(last.after, e)) && (best < 0 || better(e, best))) best = e;
    }
    last.kth = last.after;
    last.after = best;
  }
  if (top_k == experts) last = {last.after, -1};
  return last;
}

/// (clean - threshold) / stddev of expert e; *above: the threshold is the noisy logit of last.after, not of last.kth.
template <class T>
MOE_AUDIT_HOST_DEVICE inline double load_margin(const LoadLossArgs<T>& a, std::int64_t row, std::int64_t e,
                                                const double* noisy, const LastChosen& last, double stddev,
                                                bool* above) {
  const double v = noisy[e], kth = noisy[last.kth];
  const bool chosen = v > kth || v != v || (v == kth && e <= last.kth);
  *above = chosen && a.threshold == LoadThreshold::kWithoutSelf;
  return (static_cast<double>(a.clean[row + e]) - (*above ? noisy[last.after] : kth)) / stddev;
}

/// No expert can be left out.
template <class T>
MOE_AUDIT_HOST_DEVICE inline bool load_is_certain(const LoadLossArgs<T>& a) {
  return a.threshold == LoadThreshold::kWithoutSelf && a.top_k == a.experts;
}

/// One token: probability [experts] of it; noisy [experts] is room, and holds its noisy logits afterwards.
template <class T>
MOE_AUDIT_HOST_DEVICE inline LastChosen load_token(const LoadLossArgs<T>& a, std::int64_t t, double* noisy,
                                                   double* probability) {
  const std::int64_t row = t * a.experts;
  for (std::int64_t e = 0; e < a.experts; ++e)
    noisy[e] = static_cast<double>(a.clean[row + e]) + static_cast<double>(a.noise[row + e]) * load_stddev(a, row + e);
  const LastChosen last = last_chosen(noisy, a.experts, a.top_k);
  bool above = false;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    probability[e] = load_is_certain(a)
                         ? 1.0
                         : normal_cdf_exact_order(load_margin(a, row, e, noisy, last, load_stddev(a, row + e), &above));
  }
  return last;
}

/// Its gradients, from slope [experts] = d loss / d load and the noisy logits; `room` [experts]. d P / d clean is the
/// density over stddev; what the thresholds get goes to the clean logit and the stddev of the experts that set them.
template <class T>
MOE_AUDIT_HOST_DEVICE inline void load_token_backward(const LoadLossArgs<T>& a, std::int64_t t, const double* noisy,
                                                      const LastChosen& last, const double* slope, double* room,
                                                      T* d_clean, T* d_raw) {
  const std::int64_t row = t * a.experts;
  const bool certain = load_is_certain(a);
  double to_kth = 0, to_after = 0;
  bool above = false;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    room[e] = 0.0;
    if (certain) continue;
    const double stddev = load_stddev(a, row + e);
    const double u = load_margin(a, row, e, noisy, last, stddev, &above);
    room[e] = slope[e] * (normal_density_exact_order(u) / stddev);
    (above ? to_after : to_kth) -= room[e];
  }
  for (std::int64_t e = 0; e < a.experts; ++e) {
    const double through = e == last.kth ? to_kth : (e == last.after ? to_after : 0.0);
    if (d_clean != nullptr) d_clean[row + e] = static_cast<T>(room[e] + through);
    if (d_raw == nullptr) continue;
    double d_stddev = 0.0;
    if (!certain) {
      const double u = load_margin(a, row, e, noisy, last, load_stddev(a, row + e), &above);
      d_stddev = through * static_cast<double>(a.noise[row + e]) - room[e] * u;
    }
    d_raw[row + e] = static_cast<T>(d_stddev * softplus_slope_exact_order(static_cast<double>(a.raw[row + e])));
  }
}

// ---- entropy
// -------------------------------------------------------------------------------------------------------------

/// Whose entropy, p_t = softmax(logits of token t): the mean over tokens of each token's, or that of the mean.
enum class EntropyOf {
  kTokens,  // mean_t H(p_t): how undecided the router is; LIMoE's local loss (arXiv 2206.02770)
  kMean,    // H(mean_t p_t): how evenly it spreads; minus this is LIMoE's global loss
};
/// How the entropy enters the loss: the main source of mistakes, since every sign is of use somewhere.
enum class EntropySense {
  kPenalty,    // H: lower is better. With kTokens it sharpens, LIMoE's local loss
  kReward,     // -H: higher is better. With kMean it balances, LIMoE's global loss
  kShortfall,  // max(0, threshold - H): higher is better up to there; LIMoE's thresholded global loss. At the
               // threshold itself the gradient is 0
};
template <class T>
struct EntropyLossArgs {
  const T* logits = nullptr;            // [tokens, experts]
  const std::uint8_t* valid = nullptr;  // [tokens], 0 for padding (or another modality); null: all are valid
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  EntropyOf of = EntropyOf::kTokens;
  EntropySense sense = EntropySense::kPenalty;
  double threshold = 0;  // in the unit of H
  /// H / ln E, from 0 to 1, instead of nats. One expert: 0.
  bool over_log_experts = false;
  double weight = 1;
};
template <class T>
struct EntropyLossResult {
  double* loss = nullptr;              // [1]
  double* entropy = nullptr;           // [1], or null: H, before sense and weight
  double* token_entropy = nullptr;     // [tokens], or null: H(p_t) in nats; of padding, too
  double* mean_probability = nullptr;  // [experts], or null
  T* gradient = nullptr;               // [tokens, experts], or null: d loss / d logits
};
/// H = ln(1 + sum of the others' e^(l_e - m)) + sum_e p_e (m - l_e), both at least 0, m the largest logit. A logit
/// of -inf has p = 0 and adds nothing; all -inf, +inf or NaN: NaN. No valid token: entropy and loss 0. kBadShape,
/// kNullPointer.
Status entropy_loss(const EntropyLossArgs<float>& args, const EntropyLossResult<float>& result);
Status entropy_loss(const EntropyLossArgs<double>& args, const EntropyLossResult<double>& result);

template <class T>
Status check_entropy_loss(const EntropyLossArgs<T>& a, const EntropyLossResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  return r.loss == nullptr || (a.tokens > 0 && a.logits == nullptr) ? Status::kNullPointer : Status::kOk;
}

/// Entropy in nats; ln sum - H = -falls, so that ln p_e + H = (l_e - largest) + falls without cancellation.
struct TokenEntropy {
  double entropy, falls, largest;
};
/// One token; p [experts]. The sum leaves the largest out and ln(1 + rest) keeps what 1 + rest would lose.
template <class T>
MOE_AUDIT_HOST_DEVICE inline TokenEntropy entropy_token(const T* logits, std::int64_t experts, double* p) {
  std::int64_t at = 0;
  for (std::int64_t e = 1; e < experts; ++e) {
    if (logits[e] > logits[at] || logits[e] != logits[e]) at = e;  // a NaN stays
  }
  const double m = static_cast<double>(logits[at]);
  double rest = 0, falls = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    p[e] = exp_exact_order(static_cast<double>(logits[e]) - m);
    rest += e == at ? 0.0 : p[e];
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    p[e] = p[e] / (1.0 + rest);
    if (p[e] != 0.0) falls += p[e] * (m - static_cast<double>(logits[e]));
  }
  return {log1p_exact_order(rest) + falls, falls, m};
}

/// H of the mean, in nats.
MOE_AUDIT_HOST_DEVICE inline double entropy_of(const double* p, std::int64_t experts) {
  double sum = 0;
  for (std::int64_t e = 0; e < experts; ++e) sum += p[e] == 0.0 ? 0.0 : -p[e] * log_exact_order(p[e]);
  return sum;
}

/// Loss from H in nats; *slope = d loss / d H.
template <class T>
MOE_AUDIT_HOST_DEVICE inline double entropy_sense(const EntropyLossArgs<T>& a, double nats, double* entropy,
                                                  double* slope) {
  const double unit = !a.over_log_experts ? 1.0
                      : a.experts == 1    ? 0.0
                                          : 1.0 / log_exact_order(static_cast<double>(a.experts));
  const double h = nats * unit;
  const bool short_of = !(h >= a.threshold);
  const double sign = a.sense == EntropySense::kPenalty  ? 1.0
                      : a.sense == EntropySense::kReward ? -1.0
                      : short_of                         ? -1.0
                                                         : 0.0;
  *entropy = h;
  *slope = a.weight * sign * unit;
  return a.weight * (a.sense == EntropySense::kShortfall ? (short_of ? a.threshold - h : 0.0) : sign * h);
}

/// d_logits [experts] of one token; p [experts] is room, `mean` [experts] that of kMean. share = d loss / d H / valid
/// tokens. kTokens: -p_j (ln p_j + H). kMean: p_j (g_j - sum_i p_i g_i), g = -ln mean p; the 1 of its derivative falls
/// out.
template <class T>
MOE_AUDIT_HOST_DEVICE inline void entropy_token_backward(EntropyOf of, const T* logits, const double* mean,
                                                         std::int64_t experts, double share, double* p, T* d_logits) {
  const TokenEntropy h = entropy_token(logits, experts, p);
  double along = 0;
  for (std::int64_t e = 0; of == EntropyOf::kMean && e < experts; ++e)
    along += p[e] == 0.0 ? 0.0 : p[e] * log_exact_order(mean[e]);
  for (std::int64_t e = 0; e < experts; ++e) {
    double d = 0.0;
    if (p[e] != 0.0)
      d = of == EntropyOf::kMean ? along - log_exact_order(mean[e])
                                 : (h.largest - static_cast<double>(logits[e])) - h.falls;
    d_logits[e] = static_cast<T>(share * (p[e] * d));
  }
}

// ---- orthogonality of the gate
// -------------------------------------------------------------------------------------------

/// Norm of the difference between the experts' Gram matrix W W^T [E, E], W's rows the experts, and the identity.
enum class GramNorm {
  kEntrywiseL1,       // sum of magnitudes: SimBal, arXiv 2506.14038, L_orth = |R^T R - I_E|_1 with R = W^T
  kSquaredFrobenius,  // sum of squares
};
template <class T>
struct GateOrthogonalityArgs {
  const T* w = nullptr;  // [experts, hidden]
  std::int64_t experts = 0;
  std::int64_t hidden = 0;
  GramNorm norm = GramNorm::kEntrywiseL1;
  double weight = 1;
};
template <class T>
struct GateOrthogonalityResult {
  double* loss = nullptr;  // [1]
  double* gram = nullptr;  // [experts, experts], or null: W W^T
  T* gradient = nullptr;   // [experts, hidden], or null: 2 sgn(G - I) W, sgn 0 = 0; or 4 (G - I) W
};
/// Needs no data: the same for every batch, micro-batch and rank. E > d cannot reach 0. A dot product runs in kLanes
/// lanes, as z_loss.h has them; the loss adds up rows, each from 0, then the rows. kBadShape, kNullPointer.
Status gate_orthogonality(const GateOrthogonalityArgs<float>& args, const GateOrthogonalityResult<float>& result);
Status gate_orthogonality(const GateOrthogonalityArgs<double>& args, const GateOrthogonalityResult<double>& result);

template <class T>
Status check_gate_orthogonality(const GateOrthogonalityArgs<T>& a, const GateOrthogonalityResult<T>& r) {
  if (a.experts < 1 || a.hidden < 1) return Status::kBadShape;
  return r.loss == nullptr || a.w == nullptr ? Status::kNullPointer : Status::kOk;
}

/// Row e of the loss, and of what multiplies W in the gradient (without weight).
MOE_AUDIT_HOST_DEVICE inline double gram_row(GramNorm norm, const double* gram, std::int64_t e, std::int64_t experts) {
  double sum = 0;
  for (std::int64_t f = 0; f < experts; ++f) {
    const double off = gram[e * experts + f] - (e == f ? 1.0 : 0.0);
    sum += norm == GramNorm::kEntrywiseL1 ? std::fabs(off) : off * off;
  }
  return sum;
}
MOE_AUDIT_HOST_DEVICE inline double gram_slope(GramNorm norm, double gram, bool diagonal) {
  const double off = gram - (diagonal ? 1.0 : 0.0);
  if (norm == GramNorm::kSquaredFrobenius) return 4.0 * off;
  return off > 0.0 ? 2.0 : off < 0.0 ? -2.0 : off;  // 0 and NaN as they are
}

// ---- overlap of the experts' outputs
// -------------------------------------------------------------------------------------

/// What two outputs x_j and x_k of one token, j != k, have in common.
enum class Overlap {
  kProjection,  // |<x_j, x_k> / (<x_k, x_k> + eps) x_k|, the length of x_j's projection on x_k: the orthogonality
                // loss L_o of arXiv 2505.22323 (its norm is printed without a square)
  kSquaredProjection,  // the same, squared
  kCosine,  // <x_j, x_k> / (max(|x_j|, eps) max(|x_k|, eps)): pairwise expert similarity (PES), arXiv 2506.14038
};
/// From pairs to one number.
enum class OverPairs {
  kSum,   // over tokens and ordered pairs: arXiv 2505.22323. Scales with the batch
  kMean,  // the mean over the valid tokens that have a pair, of the mean over their pairs: PES
};
template <class T>
struct ExpertOverlapArgs {
  const T* outputs = nullptr;            // [tokens, top_k, hidden]: of the chosen experts alone, before the gate weighs
  const std::int32_t* chosen = nullptr;  // [tokens, top_k], negative: dropped, in no pair; null: all are there
  const std::uint8_t* valid = nullptr;
  std::int64_t tokens = 0;
  std::int64_t top_k = 0;
  std::int64_t hidden = 0;
  Overlap overlap = Overlap::kProjection;
  OverPairs over_pairs = OverPairs::kSum;
  double eps = 1e-8;
  double weight = 1;
};
template <class T>
struct ExpertOverlapResult {
  double* loss = nullptr;   // [1]
  double* token = nullptr;  // [tokens], or null: sum over the token's ordered pairs, 0 without one; of padding, too
  T* gradient = nullptr;    // [tokens, top_k, hidden], or null
};
/// Only the experts that a token chose have outputs, so the router gets no gradient from this loss (the paper's d L_o /
/// d s is 0 almost everywhere). An output of 0 overlaps with nothing, and its gradient is 0. No pair at all: 0. Dot
/// products run in kLanes lanes. kBadShape, kBadTopK, kNullPointer; kBadOption: negative eps.
Status expert_overlap(const ExpertOverlapArgs<float>& args, const ExpertOverlapResult<float>& result);
Status expert_overlap(const ExpertOverlapArgs<double>& args, const ExpertOverlapResult<double>& result);

template <class T>
Status check_expert_overlap(const ExpertOverlapArgs<T>& a, const ExpertOverlapResult<T>& r) {
  if (a.tokens < 0 || a.hidden < 1) return Status::kBadShape;
  if (a.top_k < 1) return Status::kBadTopK;
  if (!(a.eps >= 0.0)) return Status::kBadOption;
  return r.loss == nullptr || (a.tokens > 0 && a.outputs == nullptr) ? Status::kNullPointer : Status::kOk;
}

struct PairOverlap {
  double value = 0, d_dot = 0, d_own = 0, d_other = 0;  // and its slopes by <x_j, x_k>, <x_j, x_j>, <x_k, x_k>
};
MOE_AUDIT_HOST_DEVICE inline PairOverlap pair_overlap(Overlap overlap, double eps, double dot, double own,
                                                      double other) {
  PairOverlap p;
  if (own == 0.0 || other == 0.0) return p;
  if (overlap == Overlap::kCosine) {
    const double a = std::sqrt(own), b = std::sqrt(other), x = a > eps ? a : eps, y = b > eps ? b : eps;
    p.d_dot = 1.0 / (x * y);
    p.value = dot * p.d_dot;
    p.d_own = a > eps ? -0.5 * p.value / own : 0.0;
    p.d_other = b > eps ? -0.5 * p.value / other : 0.0;
    return p;
  }
  const double by = other + eps;
  if (overlap == Overlap::kSquaredProjection) {
    const double share = dot / by;
    p.value = share * share * other;
    p.d_dot = 2.0 * share * other / by;
    p.d_other = share * share * ((eps - other) / by);
    return p;
  }
  const double length = std::sqrt(other), size = std::fabs(dot);
  p.value = size / by * length;
  p.d_dot = (dot > 0.0 ? length : dot < 0.0 ? -length : dot) / by;
  p.d_other = size / by * (0.5 / length - length / by);
  return p;
}

/// One token: the sum over its ordered pairs, their number, and mix [top_k, top_k], or null: gradient of x_j = sum_i
/// mix[j, i] x_i (for kSum, weight 1). gram [top_k, top_k] of the outputs.
template <class T>
MOE_AUDIT_HOST_DEVICE inline double overlap_token(const ExpertOverlapArgs<T>& a, std::int64_t t, const double* gram,
                                                  double* mix, std::int64_t* pairs) {
  const std::int64_t k = a.top_k;
  const auto there = [&](std::int64_t j) { return a.chosen == nullptr || a.chosen[t * k + j] >= 0; };
  for (std::int64_t i = 0; mix != nullptr && i < k * k; ++i) mix[i] = 0.0;
  double sum = 0;
  *pairs = 0;
  for (std::int64_t i = 0; i < k; ++i) {
    for (std::int64_t j = 0; j < k; ++j) {
      if (i == j || !there(i) || !there(j)) continue;
      const PairOverlap p = pair_overlap(a.overlap, a.eps, gram[i * k + j], gram[i * k + i], gram[j * k + j]);
      sum += p.value;
      ++*pairs;
      if (mix == nullptr) continue;
      mix[i * k + j] += p.d_dot;
      mix[j * k + i] += p.d_dot;
      mix[i * k + i] += 2.0 * p.d_own;
      mix[j * k + j] += 2.0 * p.d_other;
    }
  }
  return sum;
}

/// What mix is multiplied with, given the valid tokens that have a pair (1 for kSum).
template <class T>
MOE_AUDIT_HOST_DEVICE inline double overlap_share(const ExpertOverlapArgs<T>& a, std::int64_t t, std::int64_t pairs,
                                                  double with_pairs) {
  if (pairs == 0 || (a.valid != nullptr && a.valid[t] == 0)) return 0.0;
  return a.over_pairs == OverPairs::kSum ? a.weight : a.weight / static_cast<double>(pairs) / with_pairs;
}

// ---- variance of the scores
// ----------------------------------------------------------------------------------------------

/// weight times -(1 / E) sum_e sum_t (s_te - mean_t s_te)^2: the variance loss L_v of arXiv 2505.22323,
/// which grows with the batch; mean_over_tokens divides it by the valid tokens. Its gradient is -(2 / E) (s - mean):
/// the paper prints it times (T - 1) / T, without the terms that come through the mean, which add up to 0.
template <class T>
struct ScoreVarianceArgs {
  const T* scores = nullptr;  // [tokens, experts]; softmax, or whatever the router weighs with
  const std::uint8_t* valid = nullptr;
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  bool mean_over_tokens = false;
  double weight = 1;
};
template <class T>
struct ScoreVarianceResult {
  double* loss = nullptr;  // [1]
  double* mean = nullptr;  // [experts], or null
  T* gradient = nullptr;   // [tokens, experts], or null: d loss / d scores, for route_backward()
};
/// No valid token: 0. kBadShape, kNullPointer.
Status score_variance(const ScoreVarianceArgs<float>& args, const ScoreVarianceResult<float>& result);
Status score_variance(const ScoreVarianceArgs<double>& args, const ScoreVarianceResult<double>& result);

template <class T>
Status check_score_variance(const ScoreVarianceArgs<T>& a, const ScoreVarianceResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  return r.loss == nullptr || (a.tokens > 0 && a.scores == nullptr) ? Status::kNullPointer : Status::kOk;
}

/// What the sum of squares is multiplied with.
template <class T>
MOE_AUDIT_HOST_DEVICE inline double score_variance_share(const ScoreVarianceArgs<T>& a, std::int64_t valid) {
  if (valid == 0) return 0.0;
  return -a.weight / static_cast<double>(a.experts) / (a.mean_over_tokens ? static_cast<double>(valid) : 1.0);
}

}  // namespace moeaudit::kernels
