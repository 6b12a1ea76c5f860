// SparseMixer: two experts a token, each drawn among those close to the best and weighed by a softmax over these, and
// the gradient estimator that goes with it. Host kernels. The draws belong to the framework; given them, everything
// here is exact.
//
// Symbols: T tokens, E experts, j = 0, 1 the pick. Liu et al., arXiv 2310.00811 (SparseMixer-v2: 2409.12136); PhiMoE's
// sparsemixer() and its autograd function (modeling_phimoe.py: MultiplierProcessor in transformers 4, PhimoeMultiplier
// in 5, the same formulas in 4.51.3 to 5.24.0; 4 refuses another top_k than 2, 5 takes 2 whatever top_k says).
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/host/elementary.h"
#include "kernels/host/router_backward.h"

namespace moeaudit::kernels {

inline constexpr int kMixerPicks = 2;
/// The float32 tensor that a drawn expert's weight is multiplied by where the third-order method takes the midpoint.
inline constexpr float kMixerMidpoint = 0.3333f;

/// For each token and pick j, m the largest of the logits (of pick 1: without the expert of pick 0):
///   kept[e]   = not (m - logits[e]) / max(|logits[e]|, m) > 2 jitter; a NaN quotient (0 / 0, an infinite m) keeps
///   p         = softmax of the kept logits, pick 1 without the expert of pick 0; 0 elsewhere
///   chosen    = the expert of m, the lowest index among equals, a NaN above all (evaluation)
///             | given[t, j]                                                        (training)
///   weight[j] = p[chosen], never renormalised; in training times 1 where chosen is the first of the largest p, or
///               draws[t, j] > 0.75, else times kMixerMidpoint
/// A softmax whose largest logit is infinite, or that meets a NaN, is NaN throughout, as in the frameworks.
template <class T>
struct SparseMixerArgs {
  const T* logits = nullptr;  // [tokens, experts]
  std::int64_t tokens = 0;
  std::int64_t experts = 0;             // of one expert, pick 1 is NaN
  double jitter = 0;                    // router_jitter_noise
  const std::int32_t* given = nullptr;  // [tokens, 2], or null: each within the experts
  const T* draws = nullptr;             // [tokens, 2] of uniform(0, 1), or null: all 1; only with `given`
  /// What difference and quotient are rounded to, and the number that they are compared with. kF64: nothing beyond T.
  Float logits_dtype = Float::kF64;
  /// What p and the weights are rounded to: the dtype of the logits, or float32 where autocast runs softmax in that (on
  /// a GPU).
  Float tensor_dtype = Float::kF64;
};

template <class T>
struct SparseMixerResult {
  std::int32_t* chosen = nullptr;  // [tokens, 2]
  T* weights = nullptr;            // [tokens, 2], or null
  std::uint8_t* kept = nullptr;    // [tokens, 2, experts], or null: 1 where the pick can fall
  T* probabilities = nullptr;      // [tokens, 2, experts], or null: p
};

/// kBadShape also for a given expert that is none; kBadOption for draws without given experts; kNullPointer.
Status sparse_mixer(const SparseMixerArgs<float>& args, const SparseMixerResult<float>& result);
Status sparse_mixer(const SparseMixerArgs<double>& args, const SparseMixerResult<double>& result);

/// d_logits[t, e] = sum over j of d_weights[t, j] p_j[chosen] ([e = chosen] - p_j[e]). In training that is the rule of
/// the autograd function, which is told neither the draws nor what they made of the weight; at evaluation it is what
/// autograd finds. The two differ in what a tensor_dtype narrower than T rounds:
///   training    u = g p[chosen]; -u p[e], then + u at the chosen: each rounded
///   evaluation  (g - g p[chosen]) p[e] rounded once (derivatives.yaml of softmax), g rounded before
/// and each pick's is rounded to a narrow logits_dtype before their sum is. Otherwise everything is float64 but what
/// keeps an expert, which is computed as sparse_mixer() does.
template <class T>
struct SparseMixerBackwardArgs {
  SparseMixerArgs<T> forward;            // as sparse_mixer() had them: `given` or not says which rule
  const std::int32_t* chosen = nullptr;  // [tokens, 2], of sparse_mixer()
  const double* weights = nullptr;       // [tokens, 2], d loss / d weights of sparse_mixer()
};
Status sparse_mixer_backward(const SparseMixerBackwardArgs<float>& args, double* d_logits);
Status sparse_mixer_backward(const SparseMixerBackwardArgs<double>& args, double* d_logits);

/// One pick of one token.
template <class T>
struct MixerPick {
  const T* logits;
  std::int64_t experts;
  std::int64_t out;  // the expert that takes no part; -1: none
  std::int64_t best = 0;
  T largest{}, limit{};
  Float dtype;

  MOE_AUDIT_HOST_DEVICE MixerPick(const SparseMixerArgs<T>& a, std::int64_t t, std::int64_t without)
      : logits(a.logits + t * a.experts), experts(a.experts), out(without), dtype(a.logits_dtype) {
    largest = logit(0);
    for (std::int64_t e = 1; e < experts; ++e) {
      const T l = logit(e);
      if (l > largest || (l != l && largest == largest)) largest = l, best = e;
    }
    // A Python number becomes one of the tensor's dtype, by way of float32 where that is narrower.
    limit = static_cast<T>(2 * a.jitter);
    if (dtype != Float::kF64)
      limit = static_cast<T>(round_to(static_cast<double>(static_cast<float>(2 * a.jitter)), dtype));
  }
  MOE_AUDIT_HOST_DEVICE T rounded(T v) const { return static_cast<T>(round_to(static_cast<double>(v), dtype)); }
  MOE_AUDIT_HOST_DEVICE T logit(std::int64_t e) const {
    return e == out ? -std::numeric_limits<T>::infinity() : logits[e];
  }
  MOE_AUDIT_HOST_DEVICE bool keeps(std::int64_t e) const {
    if (e == out) return false;
    const T size = logits[e] < T(0) ? -logits[e] : logits[e];
    const T over = size < largest || largest != largest ? largest : size;
    return !(rounded(rounded(largest - logits[e]) / over) > limit);
  }
  /// exp(logit - largest), which is 0 outside; A: the arithmetic.
  template <class A>
  MOE_AUDIT_HOST_DEVICE A exponential(std::int64_t e) const {
    return keeps(e) ? exp_shifted(static_cast<A>(logits[e]) - static_cast<A>(largest)) : A(0);
  }
  /// Their sum in kLanes lanes (elementary.h).
  template <class A>
  MOE_AUDIT_HOST_DEVICE A sum() const {
    A lane[kLanes] = {};
    for (std::int64_t e = 0; e < experts; ++e) lane[e % kLanes] += exponential<A>(e);
    return add_lanes(lane);
  }
};

/// One token, both picks.
template <class T>
MOE_AUDIT_HOST_DEVICE inline void sparse_mixer_token(const SparseMixerArgs<T>& a, const SparseMixerResult<T>& r,
                                                     std::int64_t t) {
  const auto rounded = [&](T v) { return static_cast<T>(round_to(static_cast<double>(v), a.tensor_dtype)); };
  std::int64_t before = -1;
  for (std::int64_t j = 0; j < kMixerPicks; ++j) {
    const std::int64_t at = t * kMixerPicks + j;
    const MixerPick<T> pick(a, t, before);
    const std::int64_t chosen = a.given != nullptr ? a.given[at] : pick.best;
    r.chosen[at] = static_cast<std::int32_t>(chosen);
    before = chosen;
    if (r.kept != nullptr) {
      for (std::int64_t e = 0; e < a.experts; ++e) r.kept[at * a.experts + e] = pick.keeps(e) ? 1 : 0;
    }
    if (r.weights == nullptr && r.probabilities == nullptr) continue;
    const T sum = pick.template sum<T>();
    std::int64_t best = 0;
    T largest = 0, own = 0;
    for (std::int64_t e = 0; e < a.experts; ++e) {
      const T p = rounded(pick.template exponential<T>(e) / sum);
      if (e == 0 || p > largest || (p != p && largest == largest)) largest = p, best = e;
      if (e == chosen) own = p;
      if (r.probabilities != nullptr) r.probabilities[at * a.experts + e] = p;
    }
    const bool whole = a.given == nullptr || a.draws == nullptr || chosen == best || a.draws[at] > T(0.75);
    if (r.weights != nullptr) r.weights[at] = whole ? own : rounded(own * rounded(static_cast<T>(kMixerMidpoint)));
  }
}

/// One token; A: the arithmetic, T where the tensors are narrow and double where they are not.
template <class A, class T>
MOE_AUDIT_HOST_DEVICE inline void sparse_mixer_backward_in(const SparseMixerBackwardArgs<T>& a, std::int64_t t,
                                                           double* d_logits) {
  const SparseMixerArgs<T>& f = a.forward;
  const auto to = [](A v, Float dtype) {
    return is_narrow(dtype) ? static_cast<A>(round_to(static_cast<double>(v), dtype)) : v;
  };
  const auto rounded = [&](A v) { return to(v, f.tensor_dtype); };
  std::int64_t before = -1;
  for (std::int64_t j = 0; j < kMixerPicks; ++j) {
    const MixerPick<T> pick(f, t, before);
    const std::int64_t chosen = a.chosen[t * kMixerPicks + j];
    before = chosen;
    const A sum = pick.template sum<A>();
    const auto p = [&](std::int64_t e) { return rounded(pick.template exponential<A>(e) / sum); };
    const A upstream = rounded(static_cast<A>(a.weights[t * kMixerPicks + j])), own = p(chosen);
    const A along = f.given != nullptr ? rounded(upstream * own) : upstream * own;
    for (std::int64_t e = 0; e < f.experts; ++e) {
      A g;
      if (f.given != nullptr) {
        g = rounded(p(e) * -along);
        if (e == chosen) g = rounded(g + along);
      } else {  // what was masked gets no gradient, whatever the softmax
        g = pick.keeps(e) ? rounded(((e == chosen ? upstream : A(0)) - along) * p(e)) : A(0);
      }
      g = to(g, f.logits_dtype);
      d_logits[e] = static_cast<double>(j == 0 ? g : to(static_cast<A>(d_logits[e]) + g, f.logits_dtype));
    }
  }
}
template <class T>
MOE_AUDIT_HOST_DEVICE inline void sparse_mixer_backward_token(const SparseMixerBackwardArgs<T>& a, std::int64_t t,
                                                              double* d_logits) {
  if (is_narrow(a.forward.tensor_dtype))
    sparse_mixer_backward_in<T>(a, t, d_logits);
  else
    sparse_mixer_backward_in<double>(a, t, d_logits);
}

template <class T>
Status check_sparse_mixer(const SparseMixerArgs<T>& a, const SparseMixerResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.draws != nullptr && a.given == nullptr) return Status::kBadOption;
  return a.tokens > 0 && (a.logits == nullptr || r.chosen == nullptr) ? Status::kNullPointer : Status::kOk;
}
template <class T>
Status check_sparse_mixer_backward(const SparseMixerBackwardArgs<T>& a, const double* d_logits) {
  if (a.forward.tokens < 0 || a.forward.experts < 1) return Status::kBadShape;
  return a.forward.tokens > 0 &&
                 (a.forward.logits == nullptr || a.chosen == nullptr || a.weights == nullptr || d_logits == nullptr)
             ? Status::kNullPointer
             : Status::kOk;
}
/// Whether each of `ids` [tokens, 2] is an expert; null fits.
inline bool mixer_ids_fit(const std::int32_t* ids, std::int64_t tokens, std::int64_t experts) {
  for (std::int64_t i = 0; ids != nullptr && i < tokens * kMixerPicks; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) return false;
  }
  return true;
}

}  // namespace moeaudit::kernels
