// A gate whose sum is rounded on the way: what a narrow accumulator, or partial sums stored in a narrow dtype, make of
// the logits. A variant to compare with, never what gate_logits() does (one rounding, at the output). Host kernels.
#pragma once

#include <cstdint>

#include "kernels/host/router.h"

namespace moeaudit::kernels {

struct RoundedGateArgs {
  const float* x = nullptr;     // [tokens, hidden], values of dtype
  const float* w = nullptr;     // [experts, hidden], values of dtype
  const float* bias = nullptr;  // [experts], values of dtype; or null
  std::int64_t tokens = 0, hidden = 0, experts = 0;
  Float dtype = Float::kBF16;
  /// Products that are added up in float64 before they are rounded. 1: a narrow accumulator, every product rounded and
  /// every sum, as tensors of dtype have it. hidden / S: S partial sums stored in dtype, as split-K does where a
  /// framework lets it (PyTorch: allow_bf16_reduced_precision_reduction, allow_fp16_reduced_precision_reduction).
  std::int64_t stretch = 1;
};

/// logits [tokens, experts] = the stretches of x[t, i] w[e, i] in the order of i, each from 0 in that order and rounded
/// to dtype, then added up in theirs, from 0; rounded after every addition, and so is the sum with the bias. kBadShape,
/// kNullPointer.
Status rounded_gate_logits(const RoundedGateArgs& args, float* logits);

MOE_AUDIT_HOST_DEVICE inline float rounded_gate_logit(const RoundedGateArgs& a, std::int64_t t, std::int64_t e) {
  const float *x = a.x + t * a.hidden, *w = a.w + e * a.hidden;
  double total = 0;
  for (std::int64_t first = 0; first < a.hidden; first += a.stretch) {
    const std::int64_t left = a.hidden - first, count = left < a.stretch ? left : a.stretch;
    double sum = 0;
    for (std::int64_t i = first; i < first + count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(w[i]);
    total = round_to(total + round_to(sum, a.dtype), a.dtype);
  }
  return static_cast<float>(a.bias == nullptr ? total : round_to(total + static_cast<double>(a.bias[e]), a.dtype));
}

inline Status check_rounded_gate(const RoundedGateArgs& a, const float* logits) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1 || a.stretch < 1) return Status::kBadShape;
  return a.tokens > 0 && (a.x == nullptr || a.w == nullptr || logits == nullptr) ? Status::kNullPointer : Status::kOk;
}

}  // namespace moeaudit::kernels
