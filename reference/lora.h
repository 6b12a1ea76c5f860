// LoRA in float64 on LibTorch: the truth that kernels/host/lora.h answers to.
//
// Symbols: A [rank, in], B [out, rank], W [out, in], E experts of a stack with lora_A [rank E, in], lora_B [out, rank
// E].
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

/// B A of every expert, [E, out, in], as PEFT's ParamWrapper takes its factors apart: A's rows expert by expert, B's
/// columns rank by rank with the experts side by side.
at::Tensor expert_updates(const at::Tensor& lora_a, const at::Tensor& lora_b, std::int64_t experts);

/// x W^T + s (x A^T) B^T for x [T, in]. Differentiable.
at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& w, const at::Tensor& a, const at::Tensor& b,
                        double scale);

/// W + s B A, each step cast to its dtype by LibTorch itself: the product, what is scaled, the update, the sum, the
/// result (float64). `negative` takes it out.
at::Tensor lora_merge(const at::Tensor& w, const at::Tensor& a, const at::Tensor& b, double scale,
                      at::ScalarType product, at::ScalarType scaled, at::ScalarType delta, at::ScalarType sum,
                      at::ScalarType stored, bool negative);

}  // namespace moeaudit::reference
