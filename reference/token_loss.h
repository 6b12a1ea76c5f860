// Cross-entropy in float64 on LibTorch: the truth that kernels/host/token_loss.h answers to.
#pragma once

#include <ATen/core/Tensor.h>

namespace moeaudit::reference {

/// Sum over the labels that are not -100 of -log softmax(logits [T, V])[label]. Differentiable.
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels);

}  // namespace moeaudit::reference
