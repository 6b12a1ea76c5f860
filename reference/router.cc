// The router in float64 on LibTorch.
#include "reference/router.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace moeaudit::reference {
namespace {

/// Sum over the last dimension, one column after the other.
at::Tensor sum_in_order(const at::Tensor& v) {
  at::Tensor sum = at::zeros_like(v.select(-1, 0));
  for (std::int64_t i = 0; i < v.size(-1); ++i) sum = sum + v.select(-1, i);
  return sum.unsqueeze(-1);
}

/// Indices of the n largest of the last dimension. A stable descending sort is what promises the lowest index among
/// equals; topk promises nothing.
at::Tensor best(const at::Tensor& v, std::int64_t n) {
  return std::get<1>(at::sort(v, /*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(-1, 0, n);
}

at::Tensor mask_groups(const at::Tensor& choice, const RouteOptions& o) {
  const std::int64_t tokens = choice.size(0), experts = choice.size(1);
  TORCH_CHECK(o.groups >= 1 && experts % o.groups == 0, "groups (", o.groups, ") must divide the experts (", experts,
              ")");
  TORCH_CHECK(o.top_groups >= 1 && o.top_groups <= o.groups, "top_groups must lie in 1..groups");
  const at::Tensor members = choice.reshape({tokens, o.groups, experts / o.groups});
  const std::int64_t share = std::max<std::int64_t>(o.top_k / o.top_groups, 1);
  const std::int64_t taken = o.group_score == GroupScore::kTop2Sum ? 2 : o.group_score == GroupScore::kTopShareSum ? share : 1;
  TORCH_CHECK(members.size(2) >= taken, "a group of ", members.size(2), " experts has no ", taken, " best");
  const at::Tensor value = sum_in_order(members.gather(-1, best(members, taken))).squeeze(-1);
  const at::Tensor kept = at::zeros_like(value).scatter(-1, best(value, o.top_groups), 1.0).to(at::kBool);
  const double fill = o.group_mask_is_zero ? 0.0 : -std::numeric_limits<double>::infinity();
  return members.masked_fill(kept.logical_not().unsqueeze(-1), fill).reshape({tokens, experts});
}

}  // namespace

at::Tensor gate_logits(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias) {
  TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1), "x must be [T, d] and w [E, d]");
  const at::Tensor a = x.to(at::kDouble), b = w.to(at::kDouble);
  at::Tensor logits = at::zeros({a.size(0), b.size(0)}, a.options());
  for (std::int64_t i = 0; i < a.size(1); ++i)
    logits = logits + a.select(1, i).unsqueeze(1) * b.select(1, i).unsqueeze(0);
  if (!bias.defined()) return logits;
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == b.size(0), "bias must be [E]");
  return logits + bias.to(at::kDouble);
}

at::Tensor rounded_gate_logits(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias, at::ScalarType dtype,
                               std::int64_t stretch) {
  at::Tensor total = at::zeros({x.size(0), w.size(0)}, dtype);
  for (std::int64_t first = 0; first < x.size(1); first += stretch) {
    const std::int64_t count = std::min(stretch, x.size(1) - first);
    total = total + gate_logits(x.narrow(1, first, count), w.narrow(1, first, count)).to(dtype);
  }
  return bias.defined() ? total + bias.to(dtype) : total;
}

at::Tensor scores(const at::Tensor& logits, Score score) {
  const at::Tensor l = logits.to(at::kDouble);
  if (score == Score::kSigmoid) return at::sigmoid(l);
  if (score == Score::kSqrtSoftplus) return at::sqrt(at::softplus(l, /*beta=*/1, /*threshold=*/20));
  const at::Tensor e = at::exp(l - at::amax(l, -1, /*keepdim=*/true));
  return e / sum_in_order(e);
}

Routed route(const at::Tensor& logits, const RouteOptions& o, const at::Tensor& correction_bias) {
  TORCH_CHECK(logits.dim() == 2, "logits must be [T, E]");
  TORCH_CHECK(o.top_k >= 1 && o.top_k <= logits.size(1), "top_k (", o.top_k, ") must lie in 1..E (", logits.size(1),
              ")");
  TORCH_CHECK(!o.softmax_after_top_k || o.score == Score::kSoftmax, "softmax_after_top_k goes with softmax");
  const at::Tensor l = logits.to(at::kDouble);
  const at::Tensor score = o.softmax_after_top_k ? l : scores(l, o.score);
  Routed out;
  out.choice = !correction_bias.defined() ? score
               : o.bias_multiplies        ? score * correction_bias.to(at::kDouble)
                                          : score + correction_bias.to(at::kDouble);
  if (o.group_score != GroupScore::kNone) out.choice = mask_groups(out.choice, o);
  out.chosen = best(out.choice, o.top_k);
  out.weights = score.gather(-1, out.chosen);
  if (o.softmax_after_top_k) out.weights = scores(out.weights, Score::kSoftmax);
  if (o.renormalise) out.weights = out.weights / (sum_in_order(out.weights) + o.renormalise_eps);
  out.weights = out.weights * o.scaling;
  return out;
}

}  // namespace moeaudit::reference
