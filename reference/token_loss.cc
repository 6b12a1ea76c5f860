// Cross-entropy in float64 on LibTorch.
#include "reference/token_loss.h"

#include <ATen/ATen.h>

namespace moeaudit::reference {

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor counts = labels.ne(-100);
  const at::Tensor picked = at::log_softmax(logits.to(at::kDouble), -1)
                                .gather(1, at::where(counts, labels, at::zeros_like(labels)).unsqueeze(1))
                                .squeeze(1);
  return -at::where(counts, picked, at::zeros_like(picked)).sum();
}

}  // namespace moeaudit::reference
