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
      nullptr;  // [tokens, experts], d loss / d scores (a balance loss); or null. Not with softmax_after_top_k
  const double* logits =
      nullptr;  // [tokens, experts], d loss / d logits from elsewhere (a z-loss), added last; or null
};

/// d_logits [tokens, experts] = d loss / d logits. Everything is float64, sums over experts in kLanes lanes
/// (elementary.h). kBadShape also for an id beyond the experts; kBadOption for scores with softmax_after_top_k, and for
/// kSqrtSoftplus in a narrow tensor_dtype, whose gradient is not emulated; kNullPointer without chosen where there are
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

MOE_AUDIT_HOST_DEVICE inline bool is_narrow(Float dtype) { return dtype == Float::kBF16 || dtype == Float::kF16; }

template <class T>
Status check_route_backward(const RouteBackwardArgs<T>& a, const double* d_logits) {
  const RouteArgs<T>& f = a.forward;
  if (f.tokens < 0 || f.experts < 1) return Status::kBadShape;
  if (f.top_k < 1 || f.top_k > f.experts) return Status::kBadTopK;
  if (f.softmax_after_top_k && (a.scores != nullptr || f.score != Score::kSoftmax)) return Status::kBadOption;
  if (is_narrow(f.tensor_dtype) && f.score == Score::kSqrtSoftplus) return Status::kBadOption;
  if (f.tokens > 0 && (f.logits == nullptr || d_logits == nullptr || (a.weights != nullptr && a.chosen == nullptr)))
    return Status::kNullPointer;
  return Status::kOk;
}

/// d score / d logit for the scores that stand alone.
MOE_AUDIT_HOST_DEVICE inline double score_slope(Score score, double logit, double value) {
  if (score == Score::kSigmoid) return value * (1.0 - value);
  return logit > 20.0  ? 0.5 / value
         : value > 0.0 ? sigmoid_exact_order(logit) / (2.0 * value)
                       : 0.0;  // sqrt of softplus
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
    if (!f.softmax_after_top_k) return true;
    for (std::int64_t j = 0; chosen != nullptr && j < f.top_k; ++j) {
      if (chosen[j] == e) return true;
    }
    return false;
  };
  // Forward, as route() has it, but for the lanes of a softmax after top-k.
  const bool softmax = f.score == Score::kSoftmax;
  T largest = -std::numeric_limits<T>::infinity(), lane[kLanes] = {};
  for (std::int64_t e = 0; e < f.experts; ++e) {
    if (softmax && is_in(e) && logits[e] > largest) largest = logits[e];
    d_logits[e] = 0;
  }
  for (std::int64_t e = 0; e < f.experts; ++e) {
    const T v = !softmax ? rounded(sigmoid_of(logits[e])) : is_in(e) ? exp_shifted(logits[e] - largest) : T(0);
    lane[e % kLanes] += v;
    score[e] = static_cast<double>(v);
  }
  const T sum = add_lanes(lane);
  for (std::int64_t e = 0; softmax && e < f.experts; ++e)
    score[e] = static_cast<double>(rounded(static_cast<T>(score[e]) / sum));
  // w = gather(score); v = w / (sum of w + eps); v scaling.
  if (upstream != nullptr) {
    T total = 0;
    for (std::int64_t j = 0; j < f.top_k; ++j) {
      if (chosen[j] >= 0) total += static_cast<T>(score[chosen[j]]);
    }
    const T by = rounded(rounded(total) + f.renormalise_eps);
    const auto of_weight = [&](std::int64_t j) {
      const T g = rounded(static_cast<T>(upstream[j]));
      return f.scaling != T(1) ? rounded(g * f.scaling) : g;
    };
    T of_sum = 0;  // gradient of the denominator: each term a tensor element, their sum another
    for (std::int64_t j = 0; f.renormalise && j < f.top_k; ++j) {
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
    T out = !is_in(e) ? T(0) : rounded(softmax ? (g - along) * s : g * (T(1) - s) * s);
    if (a.logits != nullptr) out = rounded(out + rounded(static_cast<T>(a.logits[t * f.experts + e])));
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
    if (!f.softmax_after_top_k) return true;
    for (std::int64_t j = 0; chosen != nullptr && j < f.top_k; ++j) {
      if (chosen[j] == e) return true;
    }
    return false;
  };
  double largest = -std::numeric_limits<double>::infinity(), lane[kLanes] = {};
  for (std::int64_t e = 0; softmax && e < f.experts; ++e) {
    const double l = static_cast<double>(logits[e]);
    if (is_in(e) && l > largest) largest = l;
  }
  for (std::int64_t e = 0; e < f.experts; ++e) {
    const double l = static_cast<double>(logits[e]);
    if (!softmax) {
      score[e] = f.score == Score::kSigmoid ? sigmoid_exact_order(l) : sqrt_softplus_exact_order(l);
    } else {
      score[e] = is_in(e) ? exp_exact_order(l - largest) : 0.0;
      lane[e % kLanes] += score[e];
    }
    d_logits[e] = 0;
  }
  const double sum = add_lanes(lane);
  for (std::int64_t e = 0; softmax && e < f.experts; ++e) score[e] = score[e] / sum;
  // Through scaling and renormalisation to the scores.
  double total = 0, product = 0;
  for (std::int64_t j = 0; upstream != nullptr && j < f.top_k; ++j) {
    if (chosen[j] < 0) continue;
    total += score[chosen[j]];
    product += upstream[j] * score[chosen[j]];
  }
  const double by = total + static_cast<double>(f.renormalise_eps), scaling = static_cast<double>(f.scaling);
  for (std::int64_t j = 0; upstream != nullptr && j < f.top_k; ++j) {
    if (chosen[j] < 0) continue;
    d_logits[chosen[j]] += f.renormalise ? scaling * (upstream[j] / by - product / by / by) : scaling * upstream[j];
  }
  // From the scores to the logits.
  for (double& v : lane) v = 0;
  for (std::int64_t e = 0; e < f.experts; ++e) {
    if (a.scores != nullptr) d_logits[e] += a.scores[t * f.experts + e];
    lane[e % kLanes] += d_logits[e] * score[e];
  }
  const double along = add_lanes(lane);
  for (std::int64_t e = 0; e < f.experts; ++e) {
    d_logits[e] = !is_in(e) ? 0.0  // also where the softmax of the others is no number
                  : softmax ? score[e] * (d_logits[e] - along)
                            : d_logits[e] * score_slope(f.score, static_cast<double>(logits[e]), score[e]);
    if (a.logits != nullptr) d_logits[e] += a.logits[t * f.experts + e];
  }
}

}  // namespace moeaudit::kernels
