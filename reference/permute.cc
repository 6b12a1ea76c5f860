// Permute and combine on LibTorch.
#include "reference/permute.h"

#include <ATen/ATen.h>

namespace moeaudit::reference {

at::Tensor permute(const at::Tensor& chosen) {
  const at::Tensor e = chosen.reshape({-1}), slot = at::arange(e.size(0));
  const at::Tensor lower = e.unsqueeze(0).lt(e.unsqueeze(1)), same = e.unsqueeze(0).eq(e.unsqueeze(1));
  const at::Tensor before = lower.logical_or(same.logical_and(slot.unsqueeze(0).lt(slot.unsqueeze(1))));
  const at::Tensor row = before.logical_and(e.ge(0).unsqueeze(0)).sum(1);
  return at::where(e.ge(0), row, at::full_like(row, -1)).reshape(chosen.sizes());
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& row_of_slot, const at::Tensor& weights) {
  const at::Tensor somewhere = row_of_slot.ge(0).to(at::kDouble);
  const at::Tensor one_hot = at::one_hot(row_of_slot.clamp_min(0), rows.size(0)).to(at::kDouble);  // [T, k, R]
  const at::Tensor matrix = (one_hot * (weights.to(at::kDouble) * somewhere).unsqueeze(2)).sum(1);
  return matrix.matmul(rows.to(at::kDouble));
}

}  // namespace moeaudit::reference
