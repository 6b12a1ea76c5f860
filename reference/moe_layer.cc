// One MoE layer in float64 on LibTorch.
#include "reference/moe_layer.h"

#include <ATen/ATen.h>

#include <cmath>

namespace moeaudit::reference {
namespace {

at::Tensor phi(const ExpertForm& f, const at::Tensor& z) {
  switch (f.activation) {
    case Activation::kSilu: return z * at::sigmoid(z * f.alpha);
    case Activation::kGeluTanh: return z * 0.5 * (1 + at::tanh((z + z * z * z * 0.044715) * std::sqrt(2 / M_PI)));
    case Activation::kRelu: return at::relu(z);
    case Activation::kRelu2: return at::square(at::relu(z));
  }
  return z;
}

at::Tensor activate(const ExpertForm& f, const at::Tensor& a) {
  if (!f.gated) return phi(f, a);
  const std::int64_t width = a.size(1) / 2;
  at::Tensor gate = a.narrow(1, 0, width), up = a.narrow(1, width, width);
  if (std::isfinite(f.limit)) {
    gate = gate.clamp_max(f.limit);
    up = up.clamp(-f.limit, f.limit);
  }
  return phi(f, gate) * (up + f.up_offset);
}

at::Tensor linear(const ExpertLinear& l, std::int64_t e, const at::Tensor& x) {
  at::Tensor out = x.matmul(l.weight[e].t());
  if (l.bias.defined()) out = out + l.bias[e];
  if (l.lora_a.defined()) out = out + x.matmul(l.lora_a[e].t()).matmul(l.lora_b[e].t()) * l.scaling;
  return out;
}

at::Tensor expert(const ExpertForm& f, const Experts& w, std::int64_t e, const at::Tensor& x) {
  return linear(w.down, e, activate(f, linear(w.gate_up, e, x)));
}

}  // namespace

at::Tensor moe_layer(const at::Tensor& x, const at::Tensor& chosen, const at::Tensor& weights, const ExpertForm& form,
                     const Experts& routed, const Experts& shared, const at::Tensor& shared_gate,
                     bool weights_on_input) {
  at::Tensor y = at::zeros_like(x);
  for (std::int64_t e = 0; e < routed.gate_up.weight.size(0); ++e) {
    const at::Tensor is = chosen.eq(e).to(at::kDouble);  // [T, k]
    for (std::int64_t j = 0; weights_on_input && j < chosen.size(1); ++j)
      y = y + is.narrow(1, j, 1) * expert(form, routed, e, x * weights.narrow(1, j, 1));
    if (!weights_on_input) y = y + (weights * is).sum(1, true) * expert(form, routed, e, x);
  }
  if (!shared.gate_up.weight.defined()) return y;
  const at::Tensor out = expert(form, shared, 0, x);
  return y + (shared_gate.defined() ? at::sigmoid(x.matmul(shared_gate)).unsqueeze(1) * out : out);
}

}  // namespace moeaudit::reference
