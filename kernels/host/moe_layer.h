// One MoE layer after its router: experts, shared expert, LoRA on both, and all their gradients. Host kernels.
//
// Symbols: T tokens, d hidden, E experts, k choices a token, R rows (permute.h), f the width of an expert, u = 2 f rows
// of its first matrix (gate, then up; f without a gate), r the rank of an adapter, s its scaling.
//
//   a = W1 x + b1 + s1 B1 (A1 x)                         of the rows of an expert
//   h = phi(min(a_gate, limit)) (clamp(a_up, -limit, limit) + up_offset)     or phi(a) without a gate
//   o = W2 h + b2 + s2 B2 (A2 h)
//   y[t] = sum_j weights[t, j] o[row of (t, j)] + sigmoid(g . x[t]) shared(x[t])
//
// Which models: Mixtral (arXiv 2401.04088), OLMoE, Qwen3-MoE: kSilu with a gate. Qwen2-MoE: a shared expert with the
// sigmoid gate g (transformers 5.23.0 modeling_qwen2_moe.py Qwen2MoeSparseMoeBlock). DeepSeek (arXiv 2401.06066 eq. 3
// to 5), GLM-4.5, Ernie: shared experts without it, n of them being one of n times the width. gpt-oss: biases,
// alpha 1.702, limit 7, up_offset 1 (modeling_gpt_oss.py GptOssExperts). DeepSeek-V4: limit 10 alone. Switch (arXiv
// 2101.03961): kRelu without a gate; Nemotron-H: kRelu2 without one. LoRA as PEFT has it: a pair of matrices for every
// expert and matrix, scaling alpha / r or alpha / sqrt(r); separate adapters of gate and up are one of rank 2 r with A
// stacked and B block-diagonal.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/host/elementary.h"
#include "kernels/host/grouped_gemm.h"
#include "kernels/host/permute.h"

namespace moeaudit::kernels {

enum class Activation {
  kSilu,      // z sigmoid(alpha z)
  kGeluTanh,  // z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), torch's approximate="tanh"
  kRelu,
  kRelu2,  // max(z, 0)^2
};

struct ExpertForm {
  Activation activation = Activation::kSilu;
  bool gated = true;
  double alpha = 1;                                        // kSilu
  double limit = std::numeric_limits<double>::infinity();  // gated
  double up_offset = 0;                                    // gated
};

/// What a routing weight multiplies.
enum class WeightOn {
  kOutput,
  kInput,  // x, before the expert sees it: y[t] = sum_j o of (weights[t, j] x[t]); Llama 4 (modeling_llama4.py
           // Llama4TextMoe)
};

/// A matrix of every expert and what is added to it.
template <class T>
struct ExpertLinear {
  const T* weight = nullptr;  // [experts, outputs, inputs]
  const T* bias = nullptr;    // [experts, outputs], or null
  const T* lora_a = nullptr;  // [experts, rank, inputs]
  const T* lora_b = nullptr;  // [experts, outputs, rank]
  std::int64_t rank = 0;      // 0: no adapter
  double scaling = 1;
};
template <class T>
struct ExpertWeights {
  ExpertLinear<T> gate_up;  // d to u
  ExpertLinear<T> down;     // f to d
  std::int64_t width = 0;   // f
};

template <class T>
struct MoeLayerArgs {
  const T* x = nullptr;                  // [tokens, hidden]
  const std::int32_t* chosen = nullptr;  // [tokens, top_k]; negative: dropped
  const std::int32_t* place = nullptr;   // [tokens, top_k], or null; permute.h
  const Wide<T>* weights = nullptr;      // [tokens, top_k]
  std::int64_t tokens = 0, hidden = 0, experts = 0, top_k = 0;
  std::int64_t capacity = 0;  // with place
  WeightOn weight_on = WeightOn::kOutput;
  ExpertForm form;  // of experts and shared expert
  ExpertWeights<T> routed;
  ExpertWeights<T> shared;         // of one expert; width 0: none
  const T* shared_gate = nullptr;  // [hidden], or null: the shared expert counts whole
};

/// What the forward pass leaves for the backward one, in memory of the caller's.
template <class T>
struct ExpertState {
  T* before = nullptr;       // [rows, u]: a
  T* activated = nullptr;    // [rows, f]: h
  T* out = nullptr;          // [rows, hidden]: o
  T* gate_up_low = nullptr;  // [rows, rank]: A1 x; where there is an adapter
  T* down_low = nullptr;     // [rows, rank]: A2 h
};
template <class T>
struct MoeLayerState {
  Permutation permutation;
  T* rows = nullptr;  // [R, hidden]: what the experts see, in their order
  ExpertState<T> routed;
  ExpertState<T> shared;                   // rows are tokens
  std::int64_t* shared_offsets = nullptr;  // [2]; where there is a shared expert
  Wide<T>* shared_weight = nullptr;        // [tokens]: sigmoid(g . x); where there is its gate
};

/// Gradients of the loss; any may be null.
template <class T>
struct ExpertLinearGradients {
  Wide<T>*weight = nullptr, *bias = nullptr, *lora_a = nullptr, *lora_b = nullptr;  // shapes as above
};
template <class T>
struct MoeLayerGradients {
  T* x = nullptr;              // [tokens, hidden]
  Wide<T>* weights = nullptr;  // [tokens, top_k]: to the routing weights; 0 where dropped
  ExpertLinearGradients<T> gate_up, down, shared_gate_up, shared_down;
  Wide<T>* shared_gate = nullptr;  // [hidden]
};

/// Sums of products as grouped_gemm.h and permute.h state them, the adapter's added to the matrix's, the shared
/// expert's to the sum over the choices. An activation is calculated in float64 and rounded to T once; so is the
/// sigmoid. BFloat16 rounds wherever MoeLayerState stores, and the gradients of what it stores. The gradient to x: over
/// the choices in the order of rank, then that through the shared expert, then that through its gate. kBadShape,
/// kBadTopK, kBadOption (no finite alpha or up_offset, a limit that is not above 0, a shared gate without a shared
/// expert), kNullPointer; what permute() refuses.
Status moe_layer(const MoeLayerArgs<float>& args, const MoeLayerState<float>& state, float* y);
Status moe_layer(const MoeLayerArgs<double>& args, const MoeLayerState<double>& state, double* y);
Status moe_layer(const MoeLayerArgs<BFloat16>& args, const MoeLayerState<BFloat16>& state, BFloat16* y);

/// state: as moe_layer() left it. d_y [tokens, hidden].
Status moe_layer_backward(const MoeLayerArgs<float>& args, const MoeLayerState<float>& state, const float* d_y,
                          const MoeLayerGradients<float>& gradients);
Status moe_layer_backward(const MoeLayerArgs<double>& args, const MoeLayerState<double>& state, const double* d_y,
                          const MoeLayerGradients<double>& gradients);
Status moe_layer_backward(const MoeLayerArgs<BFloat16>& args, const MoeLayerState<BFloat16>& state, const BFloat16* d_y,
                          const MoeLayerGradients<BFloat16>& gradients);

/// u.
MOE_AUDIT_HOST_DEVICE inline std::int64_t first_outputs(const ExpertForm& f, std::int64_t width) {
  return f.gated ? 2 * width : width;
}

// ---- formulas of one element
// -----------------------------------------------------------------------------------------------

/// What activations of T are calculated in.
template <class T>
struct ActivationRealOf {
  using Type = double;
};
template <>
struct ActivationRealOf<BFloat16> {
  using Type = float;
};
template <class T>
using ActivationReal = typename ActivationRealOf<T>::Type;

template <class R>
struct Curve {
  R value, slope;
};
/// phi and its derivative; at a kink the derivative from below, as torch has it. R: double or float.
template <class R>
MOE_AUDIT_HOST_DEVICE inline Curve<R> activation_curve(const ExpertForm& f, R z) {
  constexpr R kOne = 1;
  switch (f.activation) {
    case Activation::kSilu: {
      const R alpha = static_cast<R>(f.alpha), s = sigmoid_of(alpha * z);
      return {z * s, s + z * s * (kOne - s) * alpha};
    }
    case Activation::kGeluTanh: {
      constexpr R kTwice = static_cast<R>(1.5957691216057308);  // 2 sqrt(2 / pi); (1 + tanh v) / 2 is sigmoid(2 v)
      constexpr R kCube = static_cast<R>(0.044715), kSquare = static_cast<R>(0.134145);
      const R s = sigmoid_of(kTwice * (z + kCube * z * z * z));
      return {z * s, s + z * s * (kOne - s) * (kTwice * (kOne + kSquare * z * z))};
    }
    case Activation::kRelu: return {z <= 0 ? R(0) : z, z <= 0 ? R(0) : kOne};
    case Activation::kRelu2: return {z <= 0 ? R(0) : z * z, z <= 0 ? R(0) : 2 * z};
  }
  return {z, kOne};
}

/// h from a_gate and a_up (unused without a gate). NaN stays NaN.
template <class R>
MOE_AUDIT_HOST_DEVICE inline R activate(const ExpertForm& f, R gate, R up) {
  if (!f.gated) return activation_curve(f, gate).value;
  const R limit = static_cast<R>(f.limit);
  const R z = gate > limit ? limit : gate, v = up > limit ? limit : (up < -limit ? -limit : up);
  return activation_curve(f, z).value * (v + static_cast<R>(f.up_offset));
}
/// d loss / d a_gate and d loss / d a_up from d = d loss / d h. A value at its limit still has a gradient, one beyond
/// it none, NaN none either, as torch.clamp has it.
template <class R>
MOE_AUDIT_HOST_DEVICE inline void activate_backward(const ExpertForm& f, R gate, R up, R d, R* d_gate, R* d_up) {
  if (!f.gated) {
    *d_gate = d * activation_curve(f, gate).slope;
    return;
  }
  const R limit = static_cast<R>(f.limit), v = up > limit ? limit : (up < -limit ? -limit : up);
  const Curve<R> c = activation_curve(f, gate > limit ? limit : gate);
  const bool clamps = f.limit < std::numeric_limits<double>::infinity();
  *d_gate = !clamps || gate <= limit ? d * (v + static_cast<R>(f.up_offset)) * c.slope : R(0);
  *d_up = !clamps || (up <= limit && up >= -limit) ? d * c.value : R(0);
}

/// Element i of a row of h, from that row of a.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T activated_element(const ExpertForm& f, T gate, T up) {
  using R = ActivationReal<T>;
  return narrow<T>(activate(f, static_cast<R>(widen(gate)), static_cast<R>(widen(up))));
}
template <class T>
MOE_AUDIT_HOST_DEVICE inline void activate_backward_element(const ExpertForm& f, T gate, T up, T d, T* d_gate,
                                                            T* d_up) {
  using R = ActivationReal<T>;
  R to_gate = 0, to_up = 0;
  activate_backward(f, static_cast<R>(widen(gate)), static_cast<R>(widen(up)), static_cast<R>(widen(d)), &to_gate,
                    &to_up);
  *d_gate = narrow<T>(to_gate);
  *d_up = narrow<T>(to_up);
}

/// y with the shared expert's output, weight null: whole.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T with_shared(T y, T shared, const Wide<T>* weight) {
  return narrow<T>(widen(y) + (weight == nullptr ? widen(shared) : *weight * widen(shared)));
}
/// d loss / d (g . x) from d loss / d sigmoid and the sigmoid.
template <class W>
MOE_AUDIT_HOST_DEVICE inline W gate_slope(W d, W sigmoid) {
  return d * (sigmoid * (W(1) - sigmoid));
}
/// The gradient to x with what comes through the shared expert and through its gate (d_logit null: no gate).
template <class T>
MOE_AUDIT_HOST_DEVICE inline T with_shared_gradient(T d_x, T through, const Wide<T>* d_logit, const T* gate) {
  Wide<T> v = widen(d_x) + widen(through);
  if (d_logit != nullptr) v = v + *d_logit * widen(*gate);
  return narrow<T>(v);
}

}  // namespace moeaudit::kernels
