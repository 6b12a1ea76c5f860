// The weight scan: kernels/host against reference/ in float64, within bounds.h; reference/ against closed forms.
#define BOOST_TEST_MODULE weight_scan
#include "kernels/host/weight_scan.h"

#include <ATen/ATen.h>

#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/weight_scan.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using k::Stored;

struct Type {
  Stored stored;
  at::ScalarType scalar;
  const char* name;
};
const Type kTypes[] = {{Stored::kF64, at::kDouble, "float64"},
                       {Stored::kF32, at::kFloat, "float32"},
                       {Stored::kBF16, at::kBFloat16, "bfloat16"},
                       {Stored::kF16, at::kHalf, "float16"},
                       {Stored::kI8, at::kChar, "int8"}};  // LibTorch before 2.1 has no float8

/// Gaussian values of width `scale`, every `bad`-th one NaN or an infinity (0: none), every 13th a zero.
at::Tensor values(std::int64_t count, double scale, std::int64_t bad, at::ScalarType type) {
  std::vector<float> v(static_cast<std::size_t>(count));
  k::unit_gaussians(5, 1, 0, count, v.data());
  at::Tensor t = at::from_blob(v.data(), {count}, at::kFloat).to(at::kDouble) * scale;
  for (std::int64_t i = 0; i < count; i += 13) t[i] = i % 2 == 0 ? 0.0 : -0.0;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (std::int64_t i = bad; bad > 0 && i < count && type != at::kChar; i += bad) {
    t[i] = i % 3 == 0 ? std::numeric_limits<double>::quiet_NaN() : i % 3 == 1 ? kInf : -kInf;
  }
  return t.to(type);
}

void check(const Type& type, const at::Tensor& t, const std::string& what) {
  const std::int64_t n = t.numel();
  k::ScanResult got;
  BOOST_REQUIRE(k::scan(type.stored, t.data_ptr(), n, &got) == k::Status::kOk);
  const ref::WeightScan want = ref::weight_scan(t);
  BOOST_CHECK_MESSAGE(got.non_finite == want.non_finite, what << ": non-finite");
  BOOST_CHECK_MESSAGE(got.first_non_finite == want.first_non_finite, what << ": first non-finite");
  BOOST_CHECK_MESSAGE(got.zeros == want.zeros, what << ": zeros");
  const auto equal = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  BOOST_CHECK_MESSAGE(equal(got.min, want.min) && equal(got.max, want.max), what << ": extremes");
  const double rounded_squares = type.stored == Stored::kF64 ? 1 : 0;
  const double sum_bound =
      bounds::scan_sum(type.stored, n, want.absolute) + bounds::sum_in_any_order(n, 0, want.absolute);
  const double square_bound = bounds::scan_squares(type.stored, n, want.sum_of_squares) +
                              bounds::sum_in_any_order(n, rounded_squares, want.sum_of_squares);
  BOOST_CHECK_MESSAGE(std::fabs(got.sum - want.sum) <= sum_bound,
                      what << ": sum " << got.sum << " against " << want.sum << ", bound " << sum_bound);
  BOOST_CHECK_MESSAGE(
      std::fabs(got.sum_of_squares - want.sum_of_squares) <= square_bound,
      what << ": squares " << got.sum_of_squares << " against " << want.sum_of_squares << ", bound " << square_bound);
}

BOOST_AUTO_TEST_CASE(kernel_against_reference) {
  for (const Type& type : kTypes) {
    for (const std::int64_t count : {1, 15, 16, 17, 1000, 8191, 8192, 20'001, 600'000, 1'200'003}) {
      if (count > 30'000 && type.scalar == at::kHalf) continue;  // the same loop, and LibTorch is slow on it
      for (const double scale : {0.02, 30.0}) {
        const std::string what = std::string(type.name) + " x " + std::to_string(count) + " x " + std::to_string(scale);
        check(type, values(count, scale, 0, type.scalar), what);
        if (count < 30'000) check(type, values(count, scale, 101, type.scalar), what + " with non-finite values");
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(magnitudes_at_the_ends) {
  for (const Type& type : kTypes) {
    if (type.scalar == at::kChar) continue;
    for (const double scale : {1e-44, 1e-38, 1e-7, 1e4, 1e30}) {
      check(type, values(5000, scale, 0, type.scalar),
            std::string(type.name) + " of width " + std::to_string(std::log10(scale)));
    }
  }
}

/// 64 Mi equal values: where at::norm of LibTorch 1.13 is 5 % off, the scan is exact.
BOOST_AUTO_TEST_CASE(constant_tensors_are_exact) {
  const at::Tensor t = at::full({1 << 24}, 200.0, at::kBFloat16);
  k::ScanResult got;
  k::scan(Stored::kBF16, t.data_ptr(), t.numel(), &got);
  BOOST_CHECK_EQUAL(got.sum, 200.0 * (1 << 24));
  BOOST_CHECK_EQUAL(got.sum_of_squares, 40000.0 * (1 << 24));
}

/// 1 + ... + n and its squares, and what is empty or never finite.
BOOST_AUTO_TEST_CASE(reference_against_closed_forms) {
  const ref::WeightScan r = ref::weight_scan(at::arange(1, 1001, at::kFloat));
  BOOST_CHECK_EQUAL(r.sum, 500500.0);
  BOOST_CHECK_EQUAL(r.sum_of_squares, 333833500.0);
  BOOST_CHECK_EQUAL(r.min, 1.0);
  BOOST_CHECK_EQUAL(r.max, 1000.0);
  const ref::WeightScan nan = ref::weight_scan(at::full({7}, std::numeric_limits<double>::quiet_NaN()));
  BOOST_CHECK_EQUAL(nan.non_finite, 7);
  BOOST_CHECK_EQUAL(nan.first_non_finite, 0);
  BOOST_CHECK(std::isnan(nan.min));
  BOOST_CHECK_EQUAL(ref::weight_scan(at::empty({0})).non_finite, 0);
}

}  // namespace
