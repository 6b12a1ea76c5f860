// exp, log and friends against the C library in long double (64 bits of significand, 11 more than double).
#include "kernels/host/elementary.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host/expert_load.h"
#include "kernels/host/low_precision.h"
#include "tests/support/on_every_target.h"

namespace moeaudit::kernels {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// Error in units in the last place of the exact value. The long double value is itself good to 2^-11 of such a unit.
double places(double got, long double exact) {
  return std::fabs(
      static_cast<double>((static_cast<long double>(got) - exact) / spacing(static_cast<double>(exact), Float::kF64)));
}

TEST(Elementary, ExpWithinOnePlace) {
  double worst = 0;
  for (int i = -74500; i <= 70970; ++i) {
    const double x = i * 0.01 + 1e-5 * (i % 17);
    worst = std::max(worst, places(exp_exact_order(x), std::exp(static_cast<long double>(x))));
  }
  for (int i = 0; i < 200000; ++i) {
    const double x = -1.0 + i * 1e-5;
    worst = std::max(worst, places(exp_exact_order(x), std::exp(static_cast<long double>(x))));
  }
  EXPECT_LE(worst, 1.0);
}

TEST(Elementary, ExpAtItsLimits) {
  EXPECT_EQ(exp_exact_order(0.0), 1.0);
  EXPECT_EQ(exp_exact_order(-kInf), 0.0);
  EXPECT_EQ(exp_exact_order(kInf), kInf);
  EXPECT_EQ(exp_exact_order(710.0), kInf);
  EXPECT_EQ(exp_exact_order(-746.0), 0.0);
  EXPECT_GT(exp_exact_order(-745.0), 0.0);  // a subnormal
  EXPECT_TRUE(std::isnan(exp_exact_order(std::nan(""))));
}

TEST(Elementary, TanhWithinFourPlaces) {
  double worst = 0;
  for (int i = -400000; i <= 400000; ++i) {
    for (const double x : {i * 1e-5 + 1e-9 * (i % 13), i * 5e-5, std::ldexp(i, -700)}) {
      if (x != 0) worst = std::max(worst, places(tanh_exact_order(x), std::tanh(static_cast<long double>(x))));
    }
  }
  EXPECT_LE(worst, 4.0);
  EXPECT_EQ(tanh_exact_order(0.0), 0.0);
  EXPECT_EQ(tanh_exact_order(kInf), 1.0);
  EXPECT_EQ(tanh_exact_order(-kInf), -1.0);
  EXPECT_TRUE(std::isnan(tanh_exact_order(std::nan(""))));
}

TEST(Elementary, Float32ExpAndSigmoid) {
  double of_exp = 0, of_sigmoid = 0;
  const auto off = [](double got, double exact) { return std::fabs(got - exact) / spacing(exact, Float::kF32); };
  float before = 2;
  for (std::uint32_t bits = 0x80000000u; bits <= 0xc2d00000u; bits += 1009) {  // from -0 to -104
    const float x = std::bit_cast<float>(bits), e = exp_of_non_positive(x);
    of_exp = std::max(of_exp, off(e, std::exp(static_cast<double>(x))));
    EXPECT_LE(e, before) << x;
    before = e;
    for (const float y : {x, -x})
      of_sigmoid = std::max(of_sigmoid, off(sigmoid_float(y), 1 / (1 + std::exp(-static_cast<double>(y)))));
  }
  EXPECT_LE(of_exp, 1.0);      // 0.92 over every float32
  EXPECT_LE(of_sigmoid, 2.5);  // gamma_5 is 5 half places at most
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(exp_of_non_positive(0.0f), 1.0f);
  EXPECT_EQ(exp_of_non_positive(-infinity), 0.0f);
  EXPECT_GT(exp_of_non_positive(-103.0f), 0.0f);  // a subnormal
  EXPECT_TRUE(std::isnan(exp_of_non_positive(std::nanf(""))));
  EXPECT_EQ(sigmoid_float(infinity), 1.0f);
  EXPECT_EQ(sigmoid_float(-infinity), 0.0f);
  EXPECT_TRUE(std::isnan(sigmoid_float(std::nanf(""))));
}

TEST(Elementary, LogWithinTwoPlaces) {
  double worst = 0;
  for (int i = 1; i < 400000; ++i) {
    for (const double x : {i * 1e-5, 1.0 + (i - 200000) * 1e-9, std::ldexp(1.0 + i * 1e-6, i % 2000 - 1000)}) {
      if (x != 1.0) worst = std::max(worst, places(log_exact_order(x), std::log(static_cast<long double>(x))));
    }
  }
  EXPECT_LE(worst, 2.0);
  EXPECT_EQ(log_exact_order(1.0), 0.0);
  EXPECT_EQ(log_exact_order(0.0), -kInf);
  EXPECT_EQ(log_exact_order(kInf), kInf);
  EXPECT_TRUE(std::isnan(log_exact_order(-1.0)));
  EXPECT_TRUE(std::isnan(log_exact_order(std::nan(""))));
}

TEST(Elementary, Log1pKeepsSmallNumbers) {
  for (int e = -1070; e < 60; ++e) {
    const double y = std::ldexp(1.2345, e);
    // bounds.h counts 6 roundings, that is 6 half places, between y and the result.
    EXPECT_LE(places(log1p_exact_order(y), std::log1p(static_cast<long double>(y))), 3.0) << y;
  }
  EXPECT_EQ(log1p_exact_order(0.0), 0.0);
  EXPECT_EQ(log1p_exact_order(kInf), kInf);
}

TEST(Elementary, TheEntropyOfATokenHasTheBitsOfScalarLogarithmsOnEveryTarget) {
  const double odd[] = {0.0,       1.0,       0.5,    0.70710678118654746, 0.70710678118654757,
                        0x1p-1022, 0x1p-1030, 5e-324, 1 - 0x1p-53,         1e-200};
  std::vector<double> p;
  for (int i = 0; i < 4000; ++i)
    p.push_back(i % 7 == 3 ? odd[i / 7 % 10] : std::exp(-0.013 * i) * (1 + 1e-3 * (i % 31)));
  std::vector<float> narrow(p.begin(), p.end());
  const auto entropy = [](const auto* values, std::int64_t experts) {
    RoutingStatisticsArgs<std::decay_t<decltype(*values)>> a;
    const std::int32_t chosen = 0;
    a.probabilities = values, a.chosen = &chosen;
    a.tokens = a.top_k = 1;
    a.experts = experts;
    RoutingStatistics out;
    EXPECT_EQ(routing_statistics(a, &out), Status::kOk);
    const double sums[1] = {1};
    EXPECT_EQ(std::bit_cast<std::uint64_t>(out.token_entropy),
              std::bit_cast<std::uint64_t>(finish_routing_statistics(sums, 1, token_entropy(a, 0), 0, 1).token_entropy /
                                           log_exact_order(static_cast<double>(experts))))
        << experts;
  };
  const int seen = test::on_every_target([&] {
    for (std::int64_t first = 0; first + 70 < 4000; first += 37) {
      for (const std::int64_t experts : {2, 5, 8, 64, 70}) {
        entropy(p.data() + first, experts);
        entropy(narrow.data() + first, experts);
      }
    }
  });
  EXPECT_GE(seen, 2) << "only one instruction set could be tried";
}

TEST(Elementary, SigmoidAndSqrtSoftplus) {
  EXPECT_EQ(sigmoid_exact_order(0.0), 0.5);
  EXPECT_EQ(sigmoid_exact_order(kInf), 1.0);
  EXPECT_EQ(sigmoid_exact_order(-kInf), 0.0);
  EXPECT_EQ(sigmoid_exact_order(-800.0), 0.0);
  EXPECT_EQ(sqrt_softplus_exact_order(25.0), 5.0);  // above 20 softplus is the identity
  EXPECT_EQ(sqrt_softplus_exact_order(-kInf), 0.0);
  EXPECT_EQ(sqrt_softplus_exact_order(kInf), kInf);
  for (double x = -700; x < 20; x += 0.37) {
    const long double l = x;
    EXPECT_LE(places(sigmoid_exact_order(x), 1 / (1 + std::exp(-l))), 2.0) << x;  // gamma_4 is 2 places at most
    EXPECT_LE(places(sqrt_softplus_exact_order(x), std::sqrt(std::log1p(std::exp(l)))), 2.5) << x;
  }
}

}  // namespace
}  // namespace moeaudit::kernels
