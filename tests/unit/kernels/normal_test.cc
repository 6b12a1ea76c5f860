// The normal distribution against two forms in long double: the C library's erfc near zero, the continued fraction of
// Mills' ratio in the tail.
#include "kernels/host/normal.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/host/bounds.h"

namespace moeaudit::kernels {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double places(double got, long double exact) {
  return std::fabs(
      static_cast<double>((static_cast<long double>(got) - exact) / spacing(static_cast<double>(exact), Float::kF64)));
}

/// u exact in 26 bits, so that u * u is exact in long double, too.
long double tail(double u) {
  const long double v = u;
  if (u < 2) return std::erfc(v / std::sqrt(2.0L)) / 2;
  long double s = 0;  // 1 / (u + 1 / (u + 2 / (u + ...
  for (int n = 600; n > 0; --n) s = n / (v + s);
  const long double half = v * v / 2, whole = std::floor(half);
  return std::exp(-whole) * std::exp(whole - half) / (v + s) / std::sqrt(2 * 3.14159265358979323846264L);
}

TEST(Normal, TailWithinFivePlaces) {
  double worst = 0;
  for (int i = 0; i <= 37 * 1024; ++i) {
    const double u = i / 1024.0;
    worst = std::max(worst, places(normal_tail_exact_order(u), tail(u)));
  }
  EXPECT_LE(worst, 5.0);
  EXPECT_LE(worst, bounds::normal_cdf() / unit_roundoff(Float::kF64));  // a relative error e is at most e / u places
}

TEST(Normal, TheTwoFormsOfTheTestAgree) {
  // At the seam both hold to 1e-17 or so: the continued fraction converges like exp(-2 u sqrt(2 n)).
  const long double u = 2.0L, by_erfc = std::erfc(u / std::sqrt(2.0L)) / 2;
  EXPECT_LE(std::fabs(static_cast<double>((tail(2.0) - by_erfc) / by_erfc)), 1e-17);
}

TEST(Normal, CdfDensityAndLimits) {
  EXPECT_NEAR(normal_cdf_exact_order(0.0), 0.5, 2e-16);
  EXPECT_EQ(normal_cdf_exact_order(kInf), 1.0);
  EXPECT_EQ(normal_cdf_exact_order(-kInf), 0.0);
  EXPECT_EQ(normal_cdf_exact_order(9.0), 1.0);
  EXPECT_EQ(normal_cdf_exact_order(-39.0), 0.0);
  EXPECT_GT(normal_cdf_exact_order(-38.4), 0.0);  // a subnormal
  EXPECT_TRUE(std::isnan(normal_cdf_exact_order(std::nan(""))));
  EXPECT_EQ(normal_density_exact_order(kInf), 0.0);
  EXPECT_EQ(normal_density_exact_order(-kInf), 0.0);
  EXPECT_TRUE(std::isnan(normal_density_exact_order(std::nan(""))));
  for (double u = -37; u < 37; u += 0.0625) {
    // The two tails add up to one, and the function never falls.
    EXPECT_NEAR(normal_cdf_exact_order(u) + normal_cdf_exact_order(-u), 1.0, 3e-16) << u;
    EXPECT_LE(normal_cdf_exact_order(u), normal_cdf_exact_order(u + 0.0625)) << u;
    const long double v = u;
    EXPECT_LE(places(normal_density_exact_order(u), std::exp(-v * v / 2) / std::sqrt(2 * 3.14159265358979323846264L)),
              4.0)
        << u;
  }
}

TEST(Normal, Softplus) {
  EXPECT_EQ(softplus_exact_order(21.0), 21.0);
  EXPECT_EQ(softplus_exact_order(-kInf), 0.0);
  EXPECT_EQ(softplus_exact_order(kInf), kInf);
  for (double x = -700; x < 20; x += 0.37)
    EXPECT_LE(places(softplus_exact_order(x), std::log1p(std::exp(static_cast<long double>(x)))), 4.0) << x;
  EXPECT_EQ(softplus_slope_exact_order(0.0), 0.5);
  EXPECT_EQ(softplus_slope_exact_order(30.0), 1.0);
}

}  // namespace
}  // namespace moeaudit::kernels
