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
  /// As route() had them; tensor_dtype must be kF64 or that of T: gradients are those of the exact formulas.
  RouteArgs<T> forward;
  const std::int32_t* chosen = nullptr;  // [tokens, top_k], of route(); negative: dropped, no gradient from it
  const double* weights = nullptr;       // [tokens, top_k], d loss / d weights of route(); or null
  const double* scores =
      nullptr;  // [tokens, experts], d loss / d scores (a balance loss); or null. Not with softmax_after_top_k
  const double* logits =
      nullptr;  // [tokens, experts], d loss / d logits from elsewhere (a z-loss), added last; or null
};

/// d_logits [tokens, experts] = d loss / d logits. Everything is float64, sums over experts in kLanes lanes (elementary.h). kBadShape
/// also for an id beyond the experts; kBadOption for scores with softmax_after_top_k; kNullPointer without chosen where
/// there are weights.
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

template <class T>
Status check_route_backward(const RouteBackwardArgs<T>& a, const double* d_logits) {
  const RouteArgs<T>& f = a.forward;
  if (f.tokens < 0 || f.experts < 1) return Status::kBadShape;
  if (f.top_k < 1 || f.top_k > f.experts) return Status::kBadTopK;
  if (f.softmax_after_top_k && (a.scores != nullptr || f.score != Score::kSoftmax)) return Status::kBadOption;
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

/// One token. `score` and `d` have room for `experts` values; d_logits [experts].
template <class T>
MOE_AUDIT_HOST_DEVICE inline void route_backward_token(const RouteBackwardArgs<T>& a, std::int64_t t, double* score,
                                                       double* d_logits) {
  const RouteArgs<T>& f = a.forward;
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
    d_logits[e] = softmax ? score[e] * (d_logits[e] - along)
                          : d_logits[e] * score_slope(f.score, static_cast<double>(logits[e]), score[e]);
    if (a.logits != nullptr) d_logits[e] += a.logits[t * f.experts + e];
  }
}

}  // namespace moeaudit::kernels
