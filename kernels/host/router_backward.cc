#include "kernels/host/router_backward.h"

#include <algorithm>
#include <vector>

namespace moeaudit::kernels {
namespace {

template <class T>
Status run(const RouteBackwardArgs<T>& a, double* d_logits) {
  if (const Status status = check_route_backward(a, d_logits); status != Status::kOk) return status;
  const RouteArgs<T>& f = a.forward;
  for (std::int64_t i = 0; a.chosen != nullptr && i < f.tokens * f.top_k; ++i) {
    if (a.chosen[i] >= f.experts) return Status::kBadShape;
  }
  std::vector<double> score(static_cast<std::size_t>(f.experts));
  for (std::int64_t t = 0; t < f.tokens; ++t) route_backward_token(a, t, score.data(), d_logits + t * f.experts);
  return Status::kOk;
}

template <class T>
Status run(const GateBackwardArgs<T>& a, double* d_w, double* d_x) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1) return Status::kBadShape;
  const bool some = a.tokens > 0;
  if (some && (a.d_logits == nullptr || (d_w != nullptr && a.x == nullptr) || (d_x != nullptr && a.w == nullptr)))
    return Status::kNullPointer;
  if (d_w != nullptr) std::fill(d_w, d_w + a.experts * a.hidden, 0.0);
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    const double* g = a.d_logits + t * a.experts;
    for (std::int64_t e = 0; d_w != nullptr && e < a.experts; ++e) {
      const T* x = a.x + t * a.hidden;
      double* out = d_w + e * a.hidden;
      for (std::int64_t i = 0; i < a.hidden; ++i) out[i] += g[e] * static_cast<double>(x[i]);
    }
    if (d_x == nullptr) continue;
    double* out = d_x + t * a.hidden;
    std::fill(out, out + a.hidden, 0.0);
    for (std::int64_t e = 0; e < a.experts; ++e) {
      const T* w = a.w + e * a.hidden;
      for (std::int64_t i = 0; i < a.hidden; ++i) out[i] += g[e] * static_cast<double>(w[i]);
    }
  }
  return Status::kOk;
}

template <class T>
Status run(const ExpertScaleBackwardArgs<T>& a, double* d_scale) {
  if (const Status status = check_expert_scale_backward(a, d_scale); status != Status::kOk) return status;
  std::vector<double> lanes(static_cast<std::size_t>(a.experts * kLanes));
  for (std::int64_t i = 0; i < a.tokens * a.top_k; ++i) {
    const std::int64_t e = a.chosen[i];
    if (e >= a.experts) return Status::kBadShape;
    if (e >= 0) lanes[static_cast<std::size_t>(e * kLanes + i % kLanes)] += a.weights[i] * static_cast<double>(a.unscaled[i]);
  }
  for (std::int64_t e = 0; e < a.experts; ++e) d_scale[e] = add_lanes(lanes.data() + e * kLanes);
  return Status::kOk;
}

}  // namespace

Status route_backward(const RouteBackwardArgs<float>& args, double* d_logits) { return run(args, d_logits); }
Status route_backward(const RouteBackwardArgs<double>& args, double* d_logits) { return run(args, d_logits); }
Status gate_backward(const GateBackwardArgs<float>& args, double* d_w, double* d_x) { return run(args, d_w, d_x); }
Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x) { return run(args, d_w, d_x); }
Status expert_scale_backward(const ExpertScaleBackwardArgs<float>& args, double* d_scale) { return run(args, d_scale); }
Status expert_scale_backward(const ExpertScaleBackwardArgs<double>& args, double* d_scale) { return run(args, d_scale); }

}  // namespace moeaudit::kernels
