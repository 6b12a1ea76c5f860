// Permute and combine on LibTorch: the truth that kernels/host/permute.h answers to. The row of a choice is how many
// choices come before it, all pairs compared; combining is a product with the matrix of weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

/// chosen int64 [T, k] (negative: none). Returns int64 [T, k]: the row of each choice when choices are ordered by
/// expert, those of one expert by token and rank; -1 for none.
at::Tensor permute(const at::Tensor& chosen);

/// rows [R, d], row_of_slot int64 [T, k] (-1: nowhere), weights [T, k]. Returns [T, d] = sum_j weights[t, j] rows[row
/// of (t, j)] in float64, differentiable through rows and weights.
at::Tensor combine(const at::Tensor& rows, const at::Tensor& row_of_slot, const at::Tensor& weights);

}  // namespace moeaudit::reference
