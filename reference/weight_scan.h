// What the values of a tensor add up to, in float64 on LibTorch: the truth that kernels/host/weight_scan.h answers to.
//
// Symbols: x_i the n values of the tensor in row-major order, widened to float64 exactly; F the indices of finite ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

struct WeightScan {
  std::int64_t non_finite = 0;         // n - |F|
  std::int64_t first_non_finite = -1;  // the smallest i not in F
  std::int64_t zeros = 0;              // |{i in F: x_i = 0}|
  double min = 0, max = 0;             // over F; NaN if F is empty
  double sum = 0;                      // sum of x_i over F, in an order that LibTorch chooses
  double sum_of_squares = 0;           // sum of x_i^2 over F, the squares rounded to float64
  double absolute = 0;                 // sum of |x_i| over F: the scale of rounding errors
};

/// Any dtype that converts to float64.
WeightScan weight_scan(const at::Tensor& values);

}  // namespace moeaudit::reference
