// Drops beyond the capacity on LibTorch: the truth that kernels/host/dispatch.h answers to. A choice is kept if fewer
// than `capacity` choices of its expert come before it: all pairs are compared, nothing is sorted.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

enum class CapacityForm { kMegatron, kDeepSpeed, kMegaBlocks, kOlmoCore, kTutel, kFastMoE };

/// Choices that one expert takes in each case: cases int64 [N, 8] of tokens, experts, top_k, min_capacity,
/// expert_parallel_size, world_size, alignment and the largest count of an expert, factors float64 [N] that the form has a
/// meaning for. Float64 tensors round as Python's floats do, float32 ones as DeepSpeed's. Returns int64 [N].
at::Tensor capacity(CapacityForm form, const at::Tensor& cases, const at::Tensor& factors);

enum class DropOrder { kTokens, kChoices, kWeights, kKeys, kBatchPrioritised };

/// chosen int64 [T, k] (negative: none), weights and keys float64 [T, k], scores float64 [T, E], each undefined where the
/// order does not need it. Returns int64 [T, k]: the place of each choice in its expert, -1 where it is dropped.
at::Tensor drop(const at::Tensor& chosen, const at::Tensor& weights, const at::Tensor& keys, const at::Tensor& scores,
                DropOrder order, std::int64_t capacity);

/// weights [T, k] of the choices that have a place, 0 of the others; renormalised: over their sum, or over `smallest` if
/// that is more. Float64, differentiable.
at::Tensor kept_weights(const at::Tensor& weights, const at::Tensor& place, bool renormalise, double smallest);

}  // namespace moeaudit::reference
