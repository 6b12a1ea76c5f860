#include "reference/router_noise.h"

#include <ATen/ATen.h>

namespace moeaudit::reference {

at::Tensor noisy_logits(const at::Tensor& logits, const at::Tensor& noise, const at::Tensor& noise_logits, double eps,
                        double scale) {
  const bool learnt = noise_logits.defined();
  TORCH_CHECK(logits.sizes() == noise.sizes() && (!learnt || logits.sizes() == noise_logits.sizes()),
              "logits, noise and noise_logits differ in shape");
  const at::Tensor l = logits.to(at::kDouble), n = noise.to(at::kDouble);
  return learnt ? l + n * (at::softplus(noise_logits.to(at::kDouble), /*beta=*/1, /*threshold=*/20) + eps) : l + n * scale;
}

at::Tensor jitter(const at::Tensor& x, const at::Tensor& factor) { return x.to(at::kDouble) * factor.to(at::kDouble); }

}  // namespace moeaudit::reference
