// Grouped matrix products: the rows of every expert with the matrix of that expert. Host kernels.
//
// Symbols: R rows, of which expert e owns offsets[e] to offsets[e + 1]; N outputs and K inputs of the experts' matrices
// [N, K], as torch.nn.Linear has them.
#pragma once

#include <cstdint>

#include "kernels/host/bfloat16.h"
#include "kernels/host/router.h"  // Status, kGateRun

namespace moeaudit::kernels {

enum class GroupedProduct {
  kForward,  // out[r, n] = sum_k left[r, k] right[e, n, k], e the expert of row r
  kInput,    // out[r, k] = sum_n left[r, n] right[e, n, k]: the gradient to the inputs, left that of the outputs
  kWeight,   // weight[e, n, k] = sum_r left[r, n] right[r, k] over the rows of e: the gradient to the matrices
};

/// Order of a sum: as gate_logits() has it, in stretches of kGateRun terms, each from 0 and in order, the stretches
/// added up in order from 0. Then: times alpha, plus what `out` held (`add`), plus the bias; rounded to T once where
/// stored.
///   float, double  every product and every sum is rounded to T
///   BFloat16       products are exact and sums are float64; a CUDA device sums in float32, in the order of its tensor
///                  cores (kernels/cuda/grouped_gemm.h)
template <class T>
struct GroupedGemmArgs {
  GroupedProduct product = GroupedProduct::kForward;
  const T* left = nullptr;                // [rows, inputs], or [rows, outputs] with kInput and kWeight
  const T* right = nullptr;               // [experts, outputs, inputs], or [rows, inputs] with kWeight
  const T* bias = nullptr;                // [experts, outputs], or null; kForward alone
  const std::int64_t* offsets = nullptr;  // [experts + 1], ascending from 0 to at most `rows`
  std::int64_t experts = 0, rows = 0, inputs = 0, outputs = 0;
  double alpha = 1;
  bool add = false;           // not with kWeight
  T* out = nullptr;           // kForward, kInput; rows beyond offsets[experts] stay as they are
  Wide<T>* weight = nullptr;  // kWeight: [experts, outputs, inputs], 0 for an expert without rows
};

/// kBadShape for sizes below 1 (rows below 0) and offsets that do not ascend from 0 to at most `rows`; kBadOption for
/// `add` or a bias where there is none; kNullPointer.
Status grouped_gemm(const GroupedGemmArgs<float>& args);
Status grouped_gemm(const GroupedGemmArgs<double>& args);
Status grouped_gemm(const GroupedGemmArgs<BFloat16>& args);

/// sums[e, n] = sum_r scale[r] values[r, n] over the rows of e: the gradient to a bias. In Wide<T>, rows in stretches
/// of kGateRun as above. scale null: all 1.
template <class T>
struct ColumnSumsArgs {
  const T* values = nullptr;              // [rows, columns]
  const Wide<T>* scale = nullptr;         // [rows], or null
  const std::int64_t* offsets = nullptr;  // [experts + 1]
  std::int64_t experts = 0, rows = 0, columns = 0;
  Wide<T>* sums = nullptr;  // [experts, columns]
};
Status column_sums(const ColumnSumsArgs<float>& args);
Status column_sums(const ColumnSumsArgs<double>& args);
Status column_sums(const ColumnSumsArgs<BFloat16>& args);

/// What is wrong with the arguments, the values of `offsets` apart.
template <class T>
Status check_grouped_gemm(const GroupedGemmArgs<T>& a) {
  if (a.experts < 1 || a.rows < 0 || a.inputs < 1 || a.outputs < 1) return Status::kBadShape;
  if (a.add && a.product == GroupedProduct::kWeight) return Status::kBadOption;
  if (a.bias != nullptr && a.product != GroupedProduct::kForward) return Status::kBadOption;
  if (a.offsets == nullptr) return Status::kNullPointer;
  if (a.product == GroupedProduct::kWeight)
    return a.weight == nullptr || (a.rows > 0 && (a.left == nullptr || a.right == nullptr)) ? Status::kNullPointer
                                                                                            : Status::kOk;
  const bool some = a.rows > 0;
  return some && (a.left == nullptr || a.right == nullptr || a.out == nullptr) ? Status::kNullPointer : Status::kOk;
}
template <class T>
Status check_column_sums(const ColumnSumsArgs<T>& a) {
  if (a.experts < 1 || a.rows < 0 || a.columns < 1) return Status::kBadShape;
  if (a.offsets == nullptr || a.sums == nullptr || (a.rows > 0 && a.values == nullptr)) return Status::kNullPointer;
  return Status::kOk;
}

/// From the sum of products to what is stored.
template <class T, class Sum>
MOE_AUDIT_HOST_DEVICE inline T finish_product(Sum sum, Sum alpha, bool add, T before, const T* bias) {
  Sum v = alpha * sum;
  if (add) v = static_cast<Sum>(widen(before)) + v;
  if (bias != nullptr) v = v + static_cast<Sum>(widen(*bias));
  return narrow<T>(v);
}

/// One column over the rows [first, last), at most a stretch.
template <class T>
MOE_AUDIT_HOST_DEVICE inline Wide<T> column_stretch(const ColumnSumsArgs<T>& a, std::int64_t first, std::int64_t last,
                                                    std::int64_t column) {
  Wide<T> sum = 0;
  for (std::int64_t r = first; r < last; ++r) {
    const Wide<T> v = widen(a.values[r * a.columns + column]);
    sum += a.scale == nullptr ? v : a.scale[r] * v;
  }
  return sum;
}

}  // namespace moeaudit::kernels
