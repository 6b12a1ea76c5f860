// Balance losses, the z-loss and the bias step in float64 on LibTorch.
#include "reference/balance_loss.h"

#include <ATen/ATen.h>

namespace moeaudit::reference {
namespace {

at::Tensor one_set(const at::Tensor& p, const at::Tensor& chosen, const at::Tensor& valid, const BalanceLossOptions& o,
                   const at::Tensor& counts, double counted) {
  const std::int64_t experts = p.size(1), k = chosen.defined() ? chosen.size(1) : o.top_k;
  const double tokens = o.divide_by_all_tokens ? static_cast<double>(p.size(0)) : valid.sum().item<double>();
  if (valid.sum().item<double>() == 0.0) return p.sum() * 0.0;
  const at::Tensor mean = at::where(valid.unsqueeze(1).gt(0), p, at::zeros_like(p)).sum(0) / tokens;
  at::Tensor c = counts, chosen_by = {};
  double n = counted;
  if (chosen.defined()) {
    const at::Tensor kept = chosen.ge(0).to(at::kDouble) * valid.unsqueeze(1);                  // [T, k]
    chosen_by = at::one_hot(chosen.clamp_min(0), experts).to(at::kDouble) * kept.unsqueeze(2);  // [T, k, E]
  }
  if (!c.defined()) {
    c = (o.first_choice_only ? chosen_by.select(1, 0) : chosen_by.sum(1)).sum(0);
    n = tokens;
  }
  const at::Tensor f = c.to(at::kDouble) / (o.first_choice_only || !o.over_k ? n : n * static_cast<double>(k));
  if (o.balanced == Balanced::kExperts) return (f * mean).sum() * static_cast<double>(experts);
  const std::int64_t each = experts / o.devices;
  const at::Tensor on_device = mean.reshape({o.devices, each}).sum(1);  // P'_d
  if (o.balanced == Balanced::kDevices)
    return ((f * static_cast<double>(experts)).reshape({o.devices, each}).mean(1) * on_device).sum();
  const at::Tensor reached = chosen_by.amax(1).reshape({p.size(0), o.devices, each}).amax(2).sum(0);  // tokens on d
  return (reached * on_device).sum() * static_cast<double>(o.devices) / (static_cast<double>(o.most_devices) * tokens);
}

at::Tensor mask_of(const at::Tensor& valid, std::int64_t tokens) {
  return valid.defined() ? valid.to(at::kDouble) : at::ones({tokens}, at::kDouble);
}

}  // namespace

at::Tensor balance_loss(const at::Tensor& probabilities, const at::Tensor& chosen, const BalanceLossOptions& o,
                        const at::Tensor& valid, const std::vector<std::int64_t>& offsets, const at::Tensor& counts,
                        const at::Tensor& counted_tokens) {
  at::Tensor p = probabilities.to(at::kDouble);
  if (o.over_sum) p = p / (p.sum(-1, true) + o.sum_eps);
  const at::Tensor mask = mask_of(valid, p.size(0));
  const std::vector<std::int64_t> ends = offsets.empty() ? std::vector<std::int64_t>{0, p.size(0)} : offsets;
  at::Tensor sum = at::zeros({}, at::kDouble);
  const std::size_t sets = ends.size() - 1;
  for (std::size_t s = 0; s < sets; ++s) {
    const std::int64_t first = ends[s], length = ends[s + 1] - first, row = static_cast<std::int64_t>(s);
    sum = sum + one_set(p.narrow(0, first, length), chosen.defined() ? chosen.narrow(0, first, length) : chosen,
                        mask.narrow(0, first, length), o, counts.defined() ? counts[row] : counts,
                        counts.defined() ? counted_tokens[row].item<double>() : 0.0);
  }
  return o.sum_over_sets ? sum : sum / static_cast<double>(sets);
}

at::Tensor z_loss(const at::Tensor& logits, const at::Tensor& valid, bool divide_by_all_tokens) {
  const at::Tensor l = logits.to(at::kDouble), mask = mask_of(valid, l.size(0));
  const double tokens = divide_by_all_tokens ? static_cast<double>(l.size(0)) : mask.sum().item<double>();
  if (mask.sum().item<double>() == 0.0) return l.sum() * 0.0;
  const at::Tensor z = at::logsumexp(l, -1);
  return at::where(mask.gt(0), z * z, at::zeros_like(z)).sum() / tokens;
}

at::Tensor counted(const at::Tensor& counts, at::ScalarType dtype) {
  const std::vector<std::int64_t> shape = {counts.size(2), counts.size(3)};
  at::Tensor total = at::zeros(shape, dtype);
  for (std::int64_t r = 0; r < counts.size(0); ++r) {
    at::Tensor own = at::zeros(shape, dtype);
    for (std::int64_t m = 0; m < counts.size(1); ++m) own += counts[r][m].to(dtype);
    total += own;
  }
  return total;
}

at::Tensor bias_update(const at::Tensor& bias, const at::Tensor& counts, double rate, bool proportional,
                       bool centre_step, bool centre_bias) {
  const at::Tensor c = counts.is_floating_point() ? counts : counts.to(at::kDouble);
  const at::Tensor off = (c.sum(-1, true) / c.size(-1) - c).to(at::kDouble);
  const at::Tensor sign = at::where(off.isnan(), off, off.sign());  // LibTorch's sign of a NaN is 0
  at::Tensor step = (proportional ? off : sign) * rate;
  if (centre_step) step = step - step.mean(-1, true);
  const at::Tensor out = bias.to(at::kDouble) + step;
  return centre_bias ? out - out.mean(-1, true) : out;
}

}  // namespace moeaudit::reference
