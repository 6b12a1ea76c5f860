// The noise of routers in float64 on LibTorch: the truth that kernels/host/router_noise.h answers to.
#pragma once

#include <ATen/core/Tensor.h>

namespace moeaudit::reference {

/// logits + noise (softplus(noise_logits) + eps): Shazeer et al., arXiv 1701.06538 equation 4. All [T, E]; noise_logits
/// undefined: logits + noise scale. Differentiable.
at::Tensor noisy_logits(const at::Tensor& logits, const at::Tensor& noise, const at::Tensor& noise_logits, double eps,
                        double scale = 0);

/// x factor: Switch, arXiv 2101.03961 table 4. Differentiable.
at::Tensor jitter(const at::Tensor& x, const at::Tensor& factor);

}  // namespace moeaudit::reference
