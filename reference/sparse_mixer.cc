#include "reference/sparse_mixer.h"

#include <ATen/ATen.h>

#include <limits>
#include <tuple>
#include <vector>

namespace moeaudit::reference {

Mixed sparse_mixer(const at::Tensor& logits, double jitter, const at::Tensor& given, const at::Tensor& draws) {
  TORCH_CHECK(logits.dim() == 2, "logits must be [T, E]");
  TORCH_CHECK(!draws.defined() || given.defined(), "draws without the experts that were drawn");
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const at::Tensor s = logits.to(at::kDouble);
  at::Tensor left = s;  // without what was picked
  std::vector<at::Tensor> chosen, weights, kept, probabilities;
  for (int j = 0; j < 2; ++j) {
    // max() gives the first of equals, and a NaN before everything.
    const auto [largest, best] = at::max(left.detach(), -1, /*keepdim=*/true);
    const at::Tensor over = at::maximum(s.detach().abs(), largest);
    const at::Tensor masked = ((largest - s.detach()) / over).gt(2 * jitter);
    const at::Tensor pick = given.defined() ? given.to(at::kLong).narrow(-1, j, 1) : best;
    const at::Tensor p = at::softmax(left.masked_fill(masked, -kInf), -1);
    at::Tensor weight = p.gather(-1, pick);
    if (draws.defined()) {
      const at::Tensor whole =
          pick.eq(std::get<1>(at::max(p.detach(), -1, true))).logical_or(draws.narrow(-1, j, 1).gt(0.75));
      // float32 tensors, as the sum of a Python number and a bool tensor is one: 0.3333, and 0.3333 + 0.6667 = 1.
      const double midpoint = static_cast<double>(0.3333f), both = static_cast<double>(0.3333f + 0.6667f);
      weight = weight * at::where(whole, at::full_like(weight, both), at::full_like(weight, midpoint));
    }
    at::Tensor keeps = masked.logical_not();
    if (j == 1) keeps = keeps.logical_and(at::ones_like(keeps).scatter(-1, chosen[0], false));
    chosen.push_back(pick), weights.push_back(weight), kept.push_back(keeps), probabilities.push_back(p);
    left = s.scatter(-1, pick, -kInf);
  }
  return {at::cat(chosen, -1), at::cat(weights, -1), at::stack(kept, 1), at::stack(probabilities, 1)};
}

at::Tensor sparse_mixer_gradient(const Mixed& mixed, const at::Tensor& upstream) {
  const at::Tensor p = mixed.probabilities.detach(), chosen = mixed.chosen.unsqueeze(-1);
  const at::Tensor u = upstream.to(at::kDouble).unsqueeze(-1) * p.gather(-1, chosen);
  return (p * -u).scatter_add(-1, chosen, u).sum(1);
}

}  // namespace moeaudit::reference
