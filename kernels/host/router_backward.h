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
  /// autograd: derivatives.yaml of div, sum, norm, gather, softmax and sigmoid). Otherwise they are those of the exact
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
  if ((f.score_after_top_k && a.scores != nullptr) || !scores_fit(f)) return Status::kBadOption;
  if (f.always > 0 && (is_narrow(f.tensor_dtype) || f.score == Score::kSoftmax)) return Status::kBadOption;
  if (f.tokens > 0 && (f.logits == nullptr || d_logits == nullptr || (a.weights != nullptr && a.chosen == nullptr) ||
                       (f.always > 0 && f.always_logits == nullptr)))
    return Status::kNullPointer;
  return Status::kOk;
}

/// d norm / d score of the PNorm that `norm` is of, in exact formulas: (score / norm)^(p - 1), or, of the `at_most`
/// largest ones, one of their equal shares; 0 at a score of 0 for p < 1 (norm_backward() of PyTorch).
MOE_AUDIT_HOST_DEVICE inline double norm_slope(const PNorm<double>& of, double norm, double score, double at_most) {
  if (of.largest()) return score == norm ? 1.0 / at_most : 0.0;
  return of.p == 1.0 ? 1.0 : of.p < 1.0 && score == 0.0 ? 0.0 : power(score / norm, of.p - 1.0);
}

/// base^exponent as torch.pow has it of tensors of a narrow dtype: the exponent is of that dtype, too, and a cube of
/// bfloat16 is two products (float16: std::pow, on a CPU).
template <class T>
MOE_AUDIT_HOST_DEVICE inline T rounded_power(T base, T exponent, Float dtype) {
  const auto rounded = [dtype](T v) { return static_cast<T>(round_to(static_cast<double>(v), dtype)); };
  if (exponent == T(1)) return base;
  return exponent == T(3) && dtype == Float::kBF16 ? rounded(rounded(base * base) * base)
                                                   : rounded(power(base, rounded(exponent)));
}
/// The gradient g of a p-norm back to one of its scores (norm_backward() in FunctionsManual.cpp of PyTorch 2.13), each
/// result a tensor of `dtype`.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T rounded_slope_of_norm(T g, const PNorm<T>& of, T norm, T score, T at_most, Float dtype) {
  const auto rounded = [dtype](T v) { return static_cast<T>(round_to(static_cast<double>(v), dtype)); };
  const auto to_the = [dtype](T v, T exponent) { return rounded_power(v, exponent, dtype); };
  const T p = of.p;
  if (p == T(1)) return g;
  if (of.largest()) return score == norm ? rounded(g / at_most) : T(0);
  if (p == T(2)) return norm == T(0) ? T(0) : rounded(g * rounded(score / norm));
  if (p < T(1)) {
    const T own = score == T(0) ? T(0) : to_the(score, p - T(1));
    return rounded(rounded(own * g) * to_the(norm, T(1) - p));
  }
  const T own = p < T(2) ? to_the(score, p - T(1)) : rounded(score * to_the(score, p - T(2)));
  return norm == T(0) ? T(0) : rounded(own * rounded(g / to_the(norm, p - T(1))));
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

/// One token with tensors of a narrow dtype. `score` has room for `experts` values; d_logits [experts]. What is in
/// `score` has no sigmoid_offset: the slope of a sigmoid knows nothing of it.
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
    const auto offset = [&](std::int64_t j) {
      const T s = static_cast<T>(score[chosen[j]]);
      return f.sigmoid_offset == T(0) ? s : rounded(s + f.sigmoid_offset);
    };
    PNorm<T> of{f.renormalise_norm};
    for (std::int64_t j = 0; j < f.top_k; ++j) {
      if (chosen[j] >= 0) of.add(offset(j));
    }
    const T norm = rounded(of.root());
    T at_most = 0;  // scores that the largest one is, where it is the norm
    for (std::int64_t j = 0; of.largest() && j < f.top_k; ++j) {
      if (chosen[j] >= 0 && offset(j) == norm) at_most += T(1);
    }
    const T by = denominator(f, norm);
    const bool floored = above_floor(f, norm) < f.renormalise_floor;  // then the norm has no gradient
    const auto of_weight = [&](std::int64_t j) {
      T g = rounded(static_cast<T>(upstream[j]));
      if (f.expert_scale != nullptr) g = rounded(g * f.expert_scale[chosen[j]]);
      return f.scaling != T(1) ? rounded(g * f.scaling) : g;
    };
    T of_sum = 0;  // gradient of the denominator: each term a tensor element, their sum another
    for (std::int64_t j = 0; f.renormalise && !floored && j < f.top_k; ++j) {
      if (chosen[j] < 0) continue;
      of_sum += rounded(-of_weight(j) * rounded(rounded(offset(j) / by) / by));
    }
    of_sum = rounded(of_sum);
    for (std::int64_t j = 0; j < f.top_k; ++j) {
      if (chosen[j] < 0) continue;
      const T g = of_weight(j);
      const T along = rounded_slope_of_norm(of_sum, of, norm, offset(j), at_most, f.tensor_dtype);
      d_logits[chosen[j]] = static_cast<double>(f.renormalise ? rounded(rounded(g / by) + along) : g);
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

/// One token. `score` and `d` have room for `experts` values; d_logits [experts]. What is in `score` has no
/// sigmoid_offset, as above.
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
  const auto offset = static_cast<double>(f.sigmoid_offset);
  const auto score_of = [&](std::int64_t j) { return score[chosen[j]] + offset; };
  const auto always_of = [&](std::int64_t s) { return alone(logit(always[s])) + offset; };
  PNorm<double> of{static_cast<double>(f.renormalise_norm)};
  double product = 0, at_most = 0;  // at_most: scores that the largest one is, where it is the norm
  for (std::int64_t j = 0; upstream != nullptr && j < f.top_k; ++j) {
    if (chosen[j] < 0) continue;
    of.add(score_of(j));
    product += of_weight(j) * score_of(j);
  }
  for (std::int64_t s = 0; s < f.always; ++s) {
    of.add(always_of(s));
    product += of_always(s) * always_of(s);
  }
  const double norm = of.root();
  for (std::int64_t j = 0; of.largest() && upstream != nullptr && j < f.top_k; ++j)
    at_most += chosen[j] >= 0 && score_of(j) == norm ? 1.0 : 0.0;
  for (std::int64_t s = 0; of.largest() && s < f.always; ++s) at_most += always_of(s) == norm ? 1.0 : 0.0;
  const double eps = static_cast<double>(f.renormalise_eps), floor = static_cast<double>(f.renormalise_floor);
  const bool floored = norm + eps < floor;
  const double by = floored ? floor : norm + eps, along_norm = floored ? 0.0 : product / by / by;
  const double scaling = static_cast<double>(f.scaling);
  const auto of_score = [&](double u, double s) {
    return f.renormalise ? scaling * (u / by - along_norm * norm_slope(of, norm, s, at_most)) : scaling * u;
  };
  for (std::int64_t j = 0; upstream != nullptr && j < f.top_k; ++j) {
    if (chosen[j] >= 0) d_logits[chosen[j]] += of_score(of_weight(j), score_of(j));
  }
  const auto through_cap = [&](double g, double capped) {
    return softcap > 0.0 ? g * (1.0 - capped / softcap * (capped / softcap)) : g;
  };
  for (std::int64_t s = 0; a.d_always_logits != nullptr && s < f.always; ++s) {
    const double l = logit(always[s]);
    const double g = of_score(of_always(s), always_of(s));
    a.d_always_logits[t * f.always + s] = through_cap(g * score_slope(f.score, l, alone(l)), l);
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
