// LoRA on LibTorch.
#include "reference/lora.h"

#include <ATen/ATen.h>

#include <vector>

namespace moeaudit::reference {

at::Tensor expert_updates(const at::Tensor& lora_a, const at::Tensor& lora_b, std::int64_t experts) {
  const std::int64_t rank = lora_a.size(0) / experts;
  std::vector<at::Tensor> updates;
  for (std::int64_t e = 0; e < experts; ++e) {
    const at::Tensor a = lora_a.narrow(0, e * rank, rank).to(at::kDouble);
    const at::Tensor b = lora_b.slice(1, e, lora_b.size(1), experts).to(at::kDouble);
    updates.push_back(b.matmul(a));
  }
  return at::stack(updates);
}

at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& w, const at::Tensor& a, const at::Tensor& b,
                        double scale) {
  const at::Tensor wide = x.to(at::kDouble);
  return wide.matmul(w.to(at::kDouble).t()) + wide.matmul(a.to(at::kDouble).t()).matmul(b.to(at::kDouble).t()) * scale;
}

at::Tensor lora_merge(const at::Tensor& w, const at::Tensor& a, const at::Tensor& b, double scale,
                      at::ScalarType product, at::ScalarType scaled, at::ScalarType delta, at::ScalarType sum,
                      at::ScalarType stored, bool negative) {
  // LibTorch casts float64 to 16 bits by way of float32: `scaled` and `sum` are float32 before a 16-bit dtype anyway.
  const at::Tensor p = b.to(at::kDouble).matmul(a.to(at::kDouble)).to(product).to(at::kDouble);
  const at::Tensor d = (p * scale).to(scaled).to(delta).to(at::kDouble);
  const at::Tensor wide = w.to(at::kDouble);
  return (negative ? wide - d : wide + d).to(sum).to(stored).to(at::kDouble);
}

}  // namespace moeaudit::reference
