// The router in float64 on LibTorch.
#include "reference/router.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
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

/// The p-norm of the last dimension, whose values are not negative, by its definition.
at::Tensor norm(const at::Tensor& v, double p) {
  TORCH_CHECK(p > 0, "renormalise_norm (", p, ") must be above 0");
  if (std::isinf(p)) return at::amax(v, -1, /*keepdim=*/true);
  return p == 1 ? sum_in_order(v) : at::pow(sum_in_order(at::pow(v, p)), 1 / p);
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

at::Tensor scores(const at::Tensor& logits, Score score, double sigmoid_offset) {
  const at::Tensor l = logits.to(at::kDouble);
  TORCH_CHECK(sigmoid_offset == 0 || score == Score::kSigmoid, "sigmoid_offset goes with sigmoids alone");
  if (score == Score::kSigmoid) return at::sigmoid(l) + sigmoid_offset;
  if (score == Score::kSqrtSoftplus) return at::sqrt(at::softplus(l, /*beta=*/1, /*threshold=*/20));
  const at::Tensor e = at::exp(l - at::amax(l, -1, /*keepdim=*/true));
  return e / sum_in_order(e);
}

Routed route(const at::Tensor& logits, const RouteOptions& options, const at::Tensor& correction_bias) {
  RouteInputs in;
  in.correction_bias = correction_bias;
  return route(logits, options, in);
}

Routed route(const at::Tensor& logits, const RouteOptions& o, const RouteInputs& in) {
  TORCH_CHECK(logits.dim() == 2, "logits must be [T, E]");
  TORCH_CHECK(o.top_k >= 1 && o.top_k <= logits.size(1), "top_k (", o.top_k, ") must lie in 1..E (", logits.size(1),
              ")");
  TORCH_CHECK(!in.always_logits.defined() || o.score != Score::kSoftmax, "always_logits do not go with softmax");
  const auto capped = [&o](const at::Tensor& v) {
    const at::Tensor l = v.to(at::kDouble);
    return o.logit_softcap > 0 ? o.logit_softcap * at::tanh(l / o.logit_softcap) : l;
  };
  const at::Tensor l = capped(logits), &correction_bias = in.correction_bias;
  const at::Tensor score = o.score_after_top_k ? l : scores(l, o.score, o.sigmoid_offset);
  Routed out;
  out.choice = !correction_bias.defined() ? score
               : o.bias_multiplies        ? score * correction_bias.to(at::kDouble)
                                          : score + correction_bias.to(at::kDouble);
  if (o.group_score != GroupScore::kNone) out.choice = mask_groups(out.choice, o);
  out.chosen = in.given.defined() ? in.given : best(out.choice, o.top_k);
  at::Tensor all = score.gather(-1, out.chosen);
  if (o.score_after_top_k) all = scores(all, o.score, o.sigmoid_offset);
  if (in.always_logits.defined()) all = at::cat({all, scores(capped(in.always_logits), o.score, o.sigmoid_offset)}, -1);
  if (o.renormalise) {
    at::Tensor by = norm(all, o.renormalise_norm) + o.renormalise_eps;
    if (o.renormalise_floor > 0) by = at::clamp_min(by, o.renormalise_floor);
    all = all / by;
  }
  all = all * o.scaling;
  out.weights = all.narrow(-1, 0, o.top_k);
  if (in.always_logits.defined()) out.always_weights = all.narrow(-1, o.top_k, in.always_logits.size(-1));
  if (in.expert_scale.defined()) out.weights = out.weights * in.expert_scale.to(at::kDouble).index({out.chosen});
  return out;
}

}  // namespace moeaudit::reference
