// The one comparator of numbers in the tests.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kernels/host/low_precision.h"

namespace moeaudit::test {

/// A view of row-major values with their shape.
template <class T>
struct Values {
  std::vector<std::int64_t> shape;
  std::span<const T> data;
};

struct CompareOptions {
  /// Largest |actual - expected| accepted for element i. Not set: 0, equality. A bound that is NaN accepts nothing.
  std::function<double(std::size_t i, double expected)> bound;
  /// Accept equal infinities, and NaN where NaN is expected. Otherwise every non-finite value is a failure.
  bool same_non_finite_is_equal = false;
  /// The format whose places max_ulp counts.
  kernels::Float format = kernels::Float::kF64;
};

struct Worst {
  double value = 0;    // NaN errors do not occur here: non-finite values are counted apart
  std::size_t at = 0;  // flat index
  double expected = 0, actual = 0;
};

struct Comparison {
  bool same_shape = false;
  std::string shapes;  // "[2, 3] against [3, 2]"
  std::vector<std::int64_t> shape;
  std::size_t count = 0;
  std::size_t over_bound = 0;           // both finite, and not (error <= bound)
  std::size_t non_finite_one_side = 0;  // finite against NaN or infinity
  std::size_t non_finite_differ = 0;    // NaN against infinity, or infinities of opposite sign
  std::size_t non_finite_same = 0;      // NaN against NaN, or the same infinity
  std::size_t sign_flips = 0;           // opposite signs, neither zero
  std::size_t signed_zeros = 0;         // zeros of opposite sign; equal as numbers
  std::size_t rounded_to_zero = 0;      // zero where the expected value is not
  Worst max_abs, max_rel, max_ulp;      // over pairs of finite values; relative to |expected|, where that is not 0
  Worst bound_used;                     // largest error / bound; infinity for an error over a bound of 0
  bool accepts_same_non_finite = false;

  /// True if something was compared and every pair is within its bound. Empty input is not a success.
  bool ok() const;
  /// Everything above on a few lines, coordinates included.
  std::string report() const;
};

Comparison compare(const Values<double>& expected, const Values<double>& actual, const CompareOptions& options = {});
Comparison compare(const Values<float>& expected, const Values<float>& actual, const CompareOptions& options = {});
Comparison compare(const Values<double>& expected, const Values<float>& actual, const CompareOptions& options = {});

}  // namespace moeaudit::test
