// One MoE layer in float64 on LibTorch: the truth that kernels/host/moe_layer.h answers to. Every expert sees every
// token, and a matrix of weights takes what was chosen; nothing is permuted, and gradients are autograd's.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

namespace moeaudit::reference {

enum class Activation { kSilu, kGeluTanh, kRelu, kRelu2 };

struct ExpertForm {
  Activation activation = Activation::kSilu;
  bool gated = true;
  double alpha = 1;
  double limit = std::numeric_limits<double>::infinity();
  double up_offset = 0;
};

struct ExpertLinear {
  at::Tensor weight;          // [E, out, in]
  at::Tensor bias;            // [E, out], or undefined
  at::Tensor lora_a, lora_b;  // [E, r, in], [E, out, r], or undefined
  double scaling = 1;
};
struct Experts {
  ExpertLinear gate_up, down;
};

/// x [T, d], chosen int64 [T, k] (negative: dropped), weights [T, k], on the outputs or on the inputs of the experts;
/// shared without tensors: none; shared_gate [d] or undefined. All but chosen float64, and differentiated through.
at::Tensor moe_layer(const at::Tensor& x, const at::Tensor& chosen, const at::Tensor& weights, const ExpertForm& form,
                     const Experts& routed, const Experts& shared = {}, const at::Tensor& shared_gate = {},
                     bool weights_on_input = false);

}  // namespace moeaudit::reference
