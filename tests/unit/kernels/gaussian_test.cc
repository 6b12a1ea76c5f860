// The generator: known answers of Philox, known quantiles, and moments.
#include "kernels/host/gaussian.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace moeaudit::kernels {
namespace {

// Known answers of the authors' library Random123 (tests/kat_vectors, philox4x32 10).
TEST(Gaussian, PhiloxKnownAnswers) {
  using Block = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Test values of the paper (Wichura 1988, table 1): p = 0.25, 0.001, 1e-20.
TEST(Gaussian, QuantilesOfThePaper) {
  EXPECT_NEAR(normal_quantile(0.25), -0.6744897501960817, 1e-15);
  EXPECT_NEAR(normal_quantile(0.001), -3.090232306167814, 4e-15);
  EXPECT_NEAR(normal_quantile(1e-20), -9.262340089798408, 1e-14);
  EXPECT_EQ(normal_quantile(0.5), 0.0);
}

// The second derivation: erfc of the C library undoes it. d(quantile)/dp = 1 / density, so an error of a few 1e-16
// relative in p is one of (a few 1e-16) p / density in the quantile.
TEST(Gaussian, QuantileUndoesErfc) {
  for (double z = -6.3; z <= 6.3; z += 0.01) {
    const double p = 0.5 * std::erfc(-z / std::sqrt(2.0));
    const double density = std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0));
    EXPECT_NEAR(normal_quantile(p), z, 8e-16 * (1 + std::fabs(z) + p / density)) << z;
  }
}

TEST(Gaussian, AnyPartIsThePartOfTheWhole) {
  std::vector<float> whole(1000), part(1000);
  unit_gaussians(7, 3, 0, 1000, whole.data());
  for (const std::int64_t first : {0, 1, 2, 3, 4, 5, 331}) {
    unit_gaussians(7, 3, first, 1000 - first, part.data());
    for (std::int64_t i = first; i < 1000; ++i) ASSERT_EQ(part[i - first], whole[i]);
  }
  unit_gaussians(7, 4, 0, 1000, part.data());
  EXPECT_NE(part, whole);
  unit_gaussians(8, 3, 0, 1000, part.data());
  EXPECT_NE(part, whole);
}

// n draws: the mean has deviation 1/sqrt(n), the variance sqrt(2/n), the fourth moment sqrt(96/n); five of them are
// allowed.
TEST(Gaussian, Moments) {
  const std::int64_t n = 400000;
  std::vector<float> g(n);
  unit_gaussians(20240607, 0, 0, n, g.data());
  double m1 = 0, m2 = 0, m4 = 0;
  for (const float v : g) {
    const double d = v;
    m1 += d / n;
    m2 += d * d / n;
    m4 += d * d * d * d / n;
  }
  EXPECT_NEAR(m1, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(m2, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(m4, 3, 5 * std::sqrt(96.0 / n));
}

}  // namespace
}  // namespace moeaudit::kernels
