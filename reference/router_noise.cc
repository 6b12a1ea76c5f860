#include "reference/router_noise.h"

#include <ATen/ATen.h>

namespace moeaudit::reference {

at::Tensor noisy_logits(const at::Tensor& logits, const at::Tensor& noise, const at::Tensor& noise_logits, double eps) {
  TORCH_CHECK(logits.sizes() == noise.sizes() && logits.sizes() == noise_logits.sizes(), "logits, noise and noise_logits differ in shape");
  const at::Tensor deviation = at::softplus(noise_logits.to(at::kDouble), /*beta=*/1, /*threshold=*/20) + eps;
  return logits.to(at::kDouble) + noise.to(at::kDouble) * deviation;
}

}  // namespace moeaudit::reference
