// Regularisers of the router in float64 on LibTorch.
#include "reference/router_regularisers.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <tuple>

namespace moeaudit::reference {
namespace {

at::Tensor wide(const at::Tensor& t) { return t.to(at::kDouble); }

/// Rows of v whose token is valid.
at::Tensor kept(const at::Tensor& v, const at::Tensor& valid) { return valid.defined() ? v.index({valid.ne(0)}) : v; }

at::Tensor entropy(const at::Tensor& p) {
  const at::Tensor safe = at::where(p.gt(0), p, at::ones_like(p));
  return -(p * at::log(safe)).sum(-1);
}

}  // namespace

at::Tensor cv_squared(const at::Tensor& values, const CvOptions& o) {
  const at::Tensor v = wide(values), mean = v.mean();
  if (o.sample && v.numel() == 1) return v.sum() * 0.0;
  return v.var(o.sample) / (mean * mean + o.eps);
}

at::Tensor importance_loss(const at::Tensor& gates, const at::Tensor& chosen, std::int64_t experts, const CvOptions& o,
                           const at::Tensor& valid) {
  at::Tensor dense = wide(gates);
  if (chosen.defined()) {
    const at::Tensor one_hot = at::one_hot(chosen.clamp_min(0), experts).to(at::kDouble);
    dense = (one_hot * at::where(chosen.ge(0), dense, at::zeros_like(dense)).unsqueeze(-1)).sum(1);
  }
  return cv_squared(kept(dense, valid).sum(0), o);
}

at::Tensor load_probabilities(const at::Tensor& clean, const at::Tensor& noise, const at::Tensor& raw, double added,
                              std::int64_t top_k, bool last_chosen) {
  const at::Tensor z = wide(clean);
  const std::int64_t experts = z.size(1);
  const at::Tensor stddev = raw.defined() ? at::softplus(wide(raw)) + added : at::full_like(z, added);
  const at::Tensor noisy = z + wide(noise) * stddev;
  at::Tensor threshold;  // [T, E]
  if (last_chosen) {
    threshold = std::get<0>(at::sort(noisy, true, -1, true)).select(1, top_k - 1).unsqueeze(1);
  } else {
    if (top_k == experts) return z * 0.0 + 1.0;
    // The k-th largest of the others, expert by expert: a row for each, with the expert itself at -inf.
    const at::Tensor others = noisy.unsqueeze(1).masked_fill(at::eye(experts, at::kBool).unsqueeze(0),
                                                             -std::numeric_limits<double>::infinity());
    threshold = std::get<0>(at::sort(others, true, -1, true)).select(2, top_k - 1);
  }
  return at::erfc(-(z - threshold) / stddev / std::sqrt(2.0)) / 2;
}

at::Tensor load_loss(const at::Tensor& probabilities, const CvOptions& o, const at::Tensor& valid) {
  return cv_squared(kept(probabilities, valid).sum(0), o);
}

at::Tensor routing_entropy(const at::Tensor& logits, bool of_mean, const at::Tensor& valid) {
  const at::Tensor p = at::softmax(kept(wide(logits), valid), -1);
  if (p.size(0) == 0) return wide(logits).sum() * 0.0;
  return of_mean ? entropy(p.mean(0)) : entropy(p).mean();
}

at::Tensor gate_orthogonality(const at::Tensor& w, bool squared) {
  const at::Tensor off = at::mm(wide(w), wide(w).t()) - at::eye(w.size(0), at::kDouble);
  return squared ? (off * off).sum() : off.abs().sum();
}

at::Tensor expert_overlap(const at::Tensor& outputs, const at::Tensor& present, Overlap overlap, double eps, bool mean,
                          const at::Tensor& valid) {
  const at::Tensor x = kept(wide(outputs), valid);
  const std::int64_t k = x.size(1);
  at::Tensor there = present.defined() ? kept(present, valid).to(at::kDouble) : at::ones({x.size(0), k}, at::kDouble);
  const at::Tensor pair = there.unsqueeze(2) * there.unsqueeze(1) * (1 - at::eye(k, at::kDouble));  // [T, j, k]
  const at::Tensor dot = at::bmm(x, x.transpose(1, 2)), square = (x * x).sum(2);
  at::Tensor value;
  if (overlap == Overlap::kCosine) {
    const at::Tensor length = at::sqrt(at::where(square.gt(0), square, at::ones_like(square))).clamp_min(eps);
    value = dot / (length.unsqueeze(2) * length.unsqueeze(1));
  } else {
    const at::Tensor onto = x.unsqueeze(1);                                                 // x_k
    const at::Tensor projection = (dot / (square.unsqueeze(1) + eps)).unsqueeze(3) * onto;  // [T, j, k, d]
    value = (projection * projection).sum(3);
    if (overlap == Overlap::kProjection)
      value =
          at::where(value.gt(0), at::sqrt(at::where(value.gt(0), value, at::ones_like(value))), at::zeros_like(value));
  }
  value = at::where(pair.gt(0), value, at::zeros_like(value)).sum({1, 2});  // [T]
  if (!mean) return value.sum();
  const at::Tensor pairs = pair.sum({1, 2}), some = pairs.gt(0);
  if (!some.any().item<bool>()) return x.sum() * 0.0;
  return (value.index({some}) / pairs.index({some})).mean();
}

at::Tensor score_variance(const at::Tensor& scores, bool mean, const at::Tensor& valid) {
  const at::Tensor s = kept(wide(scores), valid);
  if (s.size(0) == 0) return wide(scores).sum() * 0.0;
  const at::Tensor off = s - s.mean(0, true);
  return -(off * off).sum() / static_cast<double>(s.size(1) * (mean ? s.size(0) : 1));
}

}  // namespace moeaudit::reference
