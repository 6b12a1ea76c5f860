// Gradients of the router: from the weights of the chosen experts to logits, inputs and gate. Host kernels.
//
// Symbols: T tokens, d hidden, E experts, k choices a token. The choice itself has no gradient, and so the correction
// bias none.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host/elementary.h"
#include "kernels/host/router.h"

namespace moeaudit::kernels {

template <class T>
struct RouteBackwardArgs {
  /// As route() had them. With a tensor_dtype narrower than T the gradients are those of a framework whose tensors have
  /// it: every operation computes in T and each of its results, a gradient like a value, is rounded once (PyTorch's
  /// autograd: derivatives.yaml of div, sum, gather, softmax and sigmoid). Otherwise they are those of the exact
  /// formulas.
  RouteArgs<T> forward;
  const std::int32_t* chosen = nullptr;  // [tokens, top_k], of route(); negative: dropped, no gradient from it
  const double* weights = nullptr;       // [tokens, top_k], d loss / d weights of route(); or null
  const double* scores =
      nullptr;  // [tokens, experts], d loss / d scores (a balance loss); or null. Not with score_after_top_k
  /// [tokens, experts], d loss / d logits from elsewhere (a z-loss), added last; or null. With a logit_softcap: to what
  /// the cap leaves of them, which is what such a router gives out as its logits (modeling_laguna.py).
  const double* logits = nullptr;
  const double* always_weights = nullptr;  // [tokens, always], d loss / d always_weights of route(); or null
  double* d_always_logits = nullptr;       // [tokens, always], written where it is given
};

/// d_logits [tokens, experts] = d loss / d logits. Everything is float64, sums over experts in kLanes lanes
/// (elementary.h). kBadShape also for an id beyond the experts; kBadOption for scores with score_after_top_k, and for
/// `always` experts in a narrow tensor_dtype (no router has them there); kNullPointer without chosen where there are
/// weights.
Status route_backward(const RouteBackwardArgs<float>& args, double* d_logits);
Status route_backward(const RouteBackwardArgs<double>& args, double* d_logits);

/// d_w [experts, hidden] = sum_t d_logits[t, e] x[t, i], tokens in their order; d_x [tokens, hidden] = sum_e
/// d_logits[t, e] w[e, i], experts in theirs. Either may be null. In float64. kBadShape, kNullPointer.
template <class T>
struct GateBackwardArgs {
  const double* d_logits = nullptr;  // [tokens, experts]
  const T* x = nullptr;              // [tokens, hidden]; for d_w
  const T* w = nullptr;              // [experts, hidden]; for d_x
  std::int64_t tokens = 0, hidden = 0, experts = 0;
};
Status gate_backward(const GateBackwardArgs<float>& args, double* d_w, double* d_x);
Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x);

/// d_scale [experts] = d loss / d expert_scale of route(): the sum over the choices of an expert of d loss / d weight
/// times what the weight is without the scale. In float64, exact formulas; choice i = t top_k + j belongs to lane i mod
/// kLanes. With one expert that every choice is, it is the gradient of a scale of all (global_scale,
/// modeling_inkling.py). kBadShape also for an id beyond the experts; kBadTopK, kNullPointer.
template <class T>
struct ExpertScaleBackwardArgs {
  const T* unscaled = nullptr;           // [tokens, top_k]: the weights of route() without expert_scale
  const std::int32_t* chosen = nullptr;  // [tokens, top_k], of route(); negative: dropped, no gradient from it
  const double* weights = nullptr;       // [tokens, top_k], d loss / d weights of route()
  std::int64_t tokens = 0, top_k = 0, experts = 0;
};
Status expert_scale_backward(const ExpertScaleBackwardArgs<float>& args, double* d_scale);
Status expert_scale_backward(const ExpertScaleBackwardArgs<double>& args, double* d_scale);

template <class T>
Status check_expert_scale_backward(const ExpertScaleBackwardArgs<T>& a, const double* d_scale) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  if (a.top_k < 1) return Status::kBadTopK;
  if (d_scale == nullptr ||
      (a.tokens > 0 && (a.unscaled == nullptr || a.chosen == nullptr || a.weights == nullptr)))
    return Status::kNullPointer;
  return Status::kOk;
}

MOE_AUDIT_HOST_DEVICE inline bool is_narrow(Float dtype) { return dtype == Float::kBF16 || dtype == Float::kF16; }

template <class T>
Status check_route_backward(const RouteBackwardArgs<T>& a, const double* d_logits) {
  const RouteArgs<T>& f = a.forward;
  if (f.tokens < 0 || f.experts < 1) return Status::kBadShape;
  if (f.top_k < 1 || f.top_k > f.experts) return Status::kBadTopK;
  if (f.always < 0 || f.always > f.experts) return Status::kBadShape;
  if (f.score_after_top_k && a.scores != nullptr) return Status::kBadOption;
  if (f.always > 0 && (is_narrow(f.tensor_dtype) || f.score == Score::kSoftmax)) return Status::kBadOption;
  if (f.tokens > 0 && (f.logits == nullptr || d_logits == nullptr || (a.weights != nullptr && a.chosen == nullptr) ||
                       (f.always > 0 && f.always_logits == nullptr)))
    return Status::kNullPointer;
  return Status::kOk;
}

/// d score / d logit for the scores that stand alone.
MOE_AUDIT_HOST_DEVICE inline double score_slope(Score score, double logit, double value) {
  if (score == Score::kSigmoid) return value * (1.0 - value);
  return logit > 20.0   ? 0.5 / value
         : value == 0.0 ? 0.0
                        : sigmoid_exact_order(logit) / (2.0 * value);  // sqrt of softplus
}

/// g through the root and through the softplus (derivatives.yaml of both), each result a tensor of `dtype`.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T rounded_slope_of_sqrt_softplus(T g, T score, T logit, Float dtype) {
  const auto rounded = [dtype](T v) { return static_cast<T>(round_to(static_cast<double>(v), dtype)); };
  if (!(score > T(0))) return score == T(0) ? T(0) : score;
  const T of_softplus = rounded(g / (T(2) * score));
  if (logit > T(20)) return of_softplus;
  const T e = static_cast<T>(exp_exact_order(static_cast<double>(logit)));
  return rounded(of_softplus * e / (e + T(1)));
}

/// One token with tensors of a narrow dtype. `score` has room for `experts` values; d_logits [experts].
template <class T>
MOE_AUDIT_HOST_DEVICE inline void route_backward_narrow_token(const RouteBackwardArgs<T>& a, std::int64_t t,
                                                              double* score, double* d_logits) {
  const RouteArgs<T>& f = a.forward;
  const T* logits = f.logits + t * f.experts;
  const std::int32_t* chosen = a.chosen == nullptr ? nullptr : a.chosen + t * f.top_k;
  const double* upstream = a.weights == nullptr ? nullptr : a.weights + t * f.top_k;
  const auto rounded = [&](T v) { return static_cast<T>(round_to(static_cast<double>(v), f.tensor_dtype)); };
  const auto is_in = [&](std::int64_t e) {
    if (!f.score_after_top_k) return true;
    for (std::int64_t j = 0; chosen != nullptr && j < f.top_k; ++j) {
      if (chosen[j] == e) return true;
    }
    return false;
  };
  const auto logit = [&](std::int64_t e) { return softcapped(logits[e], f.logit_softcap, f.tensor_dtype); };
  // Forward, as route() has it, but for the lanes of a softmax after top-k.
  const bool softmax = f.score == Score::kSoftmax, sigmoid = f.score == Score::kSigmoid;
  T largest = -std::numeric_limits<T>::infinity(), lane[kLanes] = {};
  for (std::int64_t e = 0; e < f.experts; ++e) {
    if (softmax && is_in(e) && logit(e) > largest) largest = logit(e);
    d_logits[e] = 0;
  }
  for (std::int64_t e = 0; e < f.experts; ++e) {
    const T l = logit(e);
    const T v = sigmoid    ? rounded(sigmoid_of(l))
                : !softmax ? rounded(static_cast<T>(sqrt_softplus_in(static_cast<double>(l), f.tensor_dtype)))
                : is_in(e) ? exp_shifted(l - largest)
                           : T(0);
    lane[e % kLanes] += v;
    score[e] = static_cast<double>(v);
  }
  const T sum = add_lanes(lane);
  for (std::int64_t e = 0; softmax && e < f.experts; ++e)
    score[e] = static_cast<double>(rounded(static_cast<T>(score[e]) / sum));
  // w = gather(score); v = w / max(sum of w + eps, floor); v scaling; v of the expert's scale.
  if (upstream != nullptr) {
    T total = 0;
    for (std::int64_t j = 0; j < f.top_k; ++j) {
      if (chosen[j] >= 0) total += static_cast<T>(score[chosen[j]]);
    }
    const T by = denominator(f, total);
    const bool floored = above_floor(f, total) < f.renormalise_floor;  // then the sum has no gradient
    const auto of_weight = [&](std::int64_t j) {
      T g = rounded(static_cast<T>(upstream[j]));
      if (f.expert_scale != nullptr) g = rounded(g * f.expert_scale[chosen[j]]);
      return f.scaling != T(1) ? rounded(g * f.scaling) : g;
    };
    T of_sum = 0;  // gradient of the denominator: each term a tensor element, their sum another
    for (std::int64_t j = 0; f.renormalise && !floored && j < f.top_k; ++j) {
      if (chosen[j] < 0) continue;
      const T w = static_cast<T>(score[chosen[j]]);
      of_sum += rounded(-of_weight(j) * rounded(rounded(w / by) / by));
    }
    of_sum = rounded(of_sum);
    for (std::int64_t j = 0; j < f.top_k; ++j) {
      if (chosen[j] < 0) continue;
      const T g = of_weight(j);
      d_logits[chosen[j]] = static_cast<double>(f.renormalise ? rounded(rounded(g / by) + of_sum) : g);
    }
  }
  for (T& v : lane) v = 0;
  for (std::int64_t e = 0; e < f.experts; ++e) {
    if (a.scores != nullptr)
      d_logits[e] = static_cast<double>(
          rounded(static_cast<T>(d_logits[e]) + rounded(static_cast<T>(a.scores[t * f.experts + e]))));
    lane[e % kLanes] += static_cast<T>(d_logits[e]) * static_cast<T>(score[e]);
  }
  const T along = add_lanes(lane);
  for (std::int64_t e = 0; e < f.experts; ++e) {
    const T g = static_cast<T>(d_logits[e]), s = static_cast<T>(score[e]);
    T out = !is_in(e) ? T(0)
            : softmax ? rounded((g - along) * s)
            : sigmoid ? rounded(g * (T(1) - s) * s)
                      : rounded_slope_of_sqrt_softplus(g, s, logit(e), f.tensor_dtype);
    if (a.logits != nullptr) out = rounded(out + rounded(static_cast<T>(a.logits[t * f.experts + e])));
    if (f.logit_softcap > T(0)) {  // back through the product, the tanh and the quotient
      const auto r =
          rounded(static_cast<T>(tanh_exact_order(static_cast<double>(rounded(logits[e] / f.logit_softcap)))));
      out = rounded(rounded(rounded(out * f.logit_softcap) * (T(1) - r * r)) / f.logit_softcap);
    }
    d_logits[e] = static_cast<double>(out);
  }
}

/// One token. `score` and `d` have room for `experts` values; d_logits [experts].
template <class T>
MOE_AUDIT_HOST_DEVICE inline void route_backward_token(const RouteBackwardArgs<T>& a, std::int64_t t, double* score,
                                                       double* d_logits) {
  const RouteArgs<T>& f = a.forward;
  if (is_narrow(f.tensor_dtype)) return route_backward_narrow_token(a, t, score, d_logits);
  const T* logits = f.logits + t * f.experts;
  const std::int32_t* chosen = a.chosen == nullptr ? nullptr : a.chosen + t * f.top_k;
  const double* upstream = a.weights == nullptr ? nullptr : a.weights + t * f.top_k;
  const bool softmax = f.score == Score::kSoftmax;
  // Scores; of all experts, or of the chosen alone.
  const auto is_in = [&](std::int64_t e) {
    if (!f.score_after_top_k) return true;
    for (std::int64_t j = 0; chosen != nullptr && j < f.top_k; ++j) {
      if (chosen[j] == e) return true;
    }
    return false;
  };
  const auto softcap = static_cast<double>(f.logit_softcap);
  const auto logit = [&](T l) { return softcapped(static_cast<double>(l), softcap, Float::kF64); };
  const auto alone = [&](double l) {
    return f.score == Score::kSigmoid ? sigmoid_exact_order(l) : sqrt_softplus_exact_order(l);
  };
  double largest = -std::numeric_limits<double>::infinity(), lane[kLanes] = {};
  for (std::int64_t e = 0; softmax && e < f.experts; ++e) {
    const double l = logit(logits[e]);
    if (is_in(e) && l > largest) largest = l;
  }
  for (std::int64_t e = 0; e < f.experts; ++e) {
    const double l = logit(logits[e]);
    if (!softmax) {
      score[e] = alone(l);
    } else {
      score[e] = is_in(e) ? exp_exact_order(l - largest) : 0.0;
      lane[e % kLanes] += score[e];
    }
    d_logits[e] = 0;
  }
  const double sum = add_lanes(lane);
  for (std::int64_t e = 0; softmax && e < f.experts; ++e) score[e] = score[e] / sum;
  // Through scaling and renormalisation to the scores.
  const T* always = f.always_logits + t * f.always;
  const auto of_weight = [&](std::int64_t j) {
    return f.expert_scale == nullptr ? upstream[j] : upstream[j] * static_cast<double>(f.expert_scale[chosen[j]]);
  };
  const auto of_always = [&](std::int64_t s) {
    return a.always_weights == nullptr ? 0.0 : a.always_weights[t * f.always + s];
  };
  double total = 0, product = 0;
  for (std::int64_t j = 0; upstream != nullptr && j < f.top_k; ++j) {
    if (chosen[j] < 0) continue;
    total += score[chosen[j]];
    product += of_weight(j) * score[chosen[j]];
  }
  for (std::int64_t s = 0; s < f.always; ++s) {
    const double own = alone(logit(always[s]));
    total += own;
    product += of_always(s) * own;
  }
  const double eps = static_cast<double>(f.renormalise_eps), floor = static_cast<double>(f.renormalise_floor);
  const bool floored = total + eps < floor;
  const double by = floored ? floor : total + eps, along_sum = floored ? 0.0 : product / by / by;
  const double scaling = static_cast<double>(f.scaling);
  const auto of_score = [&](double u) { return f.renormalise ? scaling * (u / by - along_sum) : scaling * u; };
  for (std::int64_t j = 0; upstream != nullptr && j < f.top_k; ++j) {
    if (chosen[j] >= 0) d_logits[chosen[j]] += of_score(of_weight(j));
  }
  const auto through_cap = [&](double g, double capped) {
    return softcap > 0.0 ? g * (1.0 - capped / softcap * (capped / softcap)) : g;
  };
  for (std::int64_t s = 0; a.d_always_logits != nullptr && s < f.always; ++s) {
    const double l = logit(always[s]);
    a.d_always_logits[t * f.always + s] = through_cap(of_score(of_always(s)) * score_slope(f.score, l, alone(l)), l);
  }
  // From the scores to the logits.
  for (double& v : lane) v = 0;
  for (std::int64_t e = 0; e < f.experts; ++e) {
    if (a.scores != nullptr) d_logits[e] += a.scores[t * f.experts + e];
    lane[e % kLanes] += d_logits[e] * score[e];
  }
  const double along = add_lanes(lane);
  for (std::int64_t e = 0; e < f.experts; ++e) {
    const double l = logit(logits[e]);
    d_logits[e] = !is_in(e) ? 0.0  // also where the softmax of the others is no number
                  : softmax ? score[e] * (d_logits[e] - along)
                            : d_logits[e] * score_slope(f.score, l, score[e]);
    if (a.logits != nullptr) d_logits[e] += a.logits[t * f.experts + e];
    d_logits[e] = through_cap(d_logits[e], l);
  }
}

}  // namespace moeaudit::kernels
