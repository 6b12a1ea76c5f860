#include "reference/expert_choice.h"

#include <ATen/ATen.h>

#include <limits>
#include <tuple>

namespace moeaudit::reference {

ExpertChosen expert_choice(const at::Tensor& scores, std::int64_t capacity, const at::Tensor& valid) {
  TORCH_CHECK(scores.dim() == 2, "scores must be [T, E]");
  const at::Tensor s = scores.to(at::kDouble);
  const std::int64_t candidates = valid.defined() ? valid.sum().item<std::int64_t>() : s.size(0);
  TORCH_CHECK(capacity >= 1 && capacity <= candidates, "capacity (", capacity, ") must lie in 1..", candidates);
  at::Tensor choice = s.t();
  if (valid.defined())
    choice = choice.masked_fill(valid.logical_not().unsqueeze(0), -std::numeric_limits<double>::infinity());
  ExpertChosen out;
  // A stable descending sort promises the lowest index among equals; topk promises nothing.
  out.tokens = std::get<1>(at::sort(choice, /*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(-1, 0, capacity);
  out.weights = s.t().gather(-1, out.tokens);
  return out;
}

}  // namespace moeaudit::reference
