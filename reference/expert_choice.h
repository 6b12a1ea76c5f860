// Expert choice in float64 on LibTorch: the truth that kernels/host/expert_choice.h answers to.
// Zhou et al., arXiv 2202.09368, section 3.2. Symbols: T tokens, E experts, C capacity.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

struct ExpertChosen {
  at::Tensor tokens;   // int64 [E, C], best first, the lower token first among equals
  at::Tensor weights;  // float64 [E, C]: their scores; differentiable
};

/// scores [T, E]; valid bool [T] or undefined: the others' scores count as -inf. Throws c10::Error unless 1 <= C <= valid
/// tokens.
ExpertChosen expert_choice(const at::Tensor& scores, std::int64_t capacity, const at::Tensor& valid = {});

}  // namespace moeaudit::reference
