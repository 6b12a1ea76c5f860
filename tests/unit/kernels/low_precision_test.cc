// Rounding to bfloat16 and float16, against a search for the nearest value that shares no code with it.
#include "kernels/host/low_precision.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host/gaussian.h"
#include "kernels/host/router.h"

namespace moeaudit::kernels {
namespace {

/// All finite non-negative values of the format, from its definition: m * 2^e.
std::vector<double> all_values(int bits, int min_exp, int max_exp) {
  std::vector<double> values;
  const int steps = 1 << (bits - 1);
  for (int m = 0; m < steps; ++m) values.push_back(std::ldexp(m, min_exp - (bits - 1)));
  for (int e = min_exp; e <= max_exp; ++e) {
    for (int m = steps; m < 2 * steps; ++m) values.push_back(std::ldexp(m, e - (bits - 1)));
  }
  return values;
}

/// Nearest value, ties to the even one (even positions of the list are even significands); past the last by the rule of
/// IEEE 754: at or beyond the last plus half its spacing is infinity.
double nearest(const std::vector<double>& values, double v) {
  const double size = std::fabs(v);
  const auto above = std::lower_bound(values.begin(), values.end(), size);
  double r;
  if (above == values.end()) {
    const double last = values.back(), half = (last - values[values.size() - 2]) / 2;
    r = size >= last + half ? std::numeric_limits<double>::infinity() : last;
  } else if (*above == size || above == values.begin()) {
    r = *above;
  } else {
    const double low = *(above - 1), up = size - low, down = *above - size;
    r = up < down || (up == down && (above - 1 - values.begin()) % 2 == 0) ? low : *above;
  }
  return std::copysign(r, v);
}

struct Format {
  Float name;
  std::vector<double> values;
};
const std::vector<Format>& formats() {
  static const std::vector<Format> f = {{Float::kBF16, all_values(8, -126, 127)},
                                        {Float::kF16, all_values(11, -14, 15)}};
  return f;
}

void expect_rounds_like_search(const Format& f, double v) {
  const double want = nearest(f.values, v), got = round_to(v, f.name);
  ASSERT_EQ(got, want) << name_of(f.name) << " of " << v;
  ASSERT_EQ(std::signbit(got), std::signbit(want)) << v;
  if (static_cast<double>(static_cast<float>(v)) ==
      v) {  // the vector code for float32, 40 copies to fill whole vectors
    const std::vector<float> in(40, static_cast<float>(v));
    std::vector<float> out(40);
    round_values(in.data(), 40, f.name, out.data());
    for (const float o : out) {
      ASSERT_EQ(static_cast<double>(o), want) << name_of(f.name) << " of float " << v;
      ASSERT_EQ(std::signbit(o), std::signbit(want)) << v;
    }
  }
}

TEST(LowPrecision, EveryValueIsItsOwn) {
  for (const Format& f : formats()) {
    for (const double v : f.values) {
      ASSERT_EQ(round_to(v, f.name), v);
      ASSERT_EQ(round_to(-v, f.name), -v);
    }
  }
}

TEST(LowPrecision, HalfwayAndJustBesideIt) {
  for (const Format& f : formats()) {
    for (std::size_t i = 0; i + 1 < f.values.size(); ++i) {
      const double half = (f.values[i] + f.values[i + 1]) / 2;
      for (const double v : {half, std::nextafter(half, 0.0), std::nextafter(half, 1e300)})
        expect_rounds_like_search(f, v);
      if (i % 7 == 0) expect_rounds_like_search(f, -half);
    }
  }
}

TEST(LowPrecision, RandomValuesOfEverySize) {
  std::vector<float> g(4096);
  unit_gaussians(1, 2, 0, 4096, g.data());
  for (const Format& f : formats()) {
    for (int e = -160; e <= 140; ++e) {
      for (int i = 0; i < 12; ++i)
        expect_rounds_like_search(f, std::ldexp(static_cast<double>(g[(e + 160) * 12 + i]), e));
    }
  }
}

TEST(LowPrecision, NoDetourThroughFloat32) {
  // Just above halfway between 1 and 1 + 2^-7; rounding to float32 first would make it exactly halfway, and then
  // even: 1.
  EXPECT_EQ(round_to(1.0 + 0x1p-8 + 0x1p-40, Float::kBF16), 1.0 + 0x1p-7);
  EXPECT_EQ(round_to(1.0 + 0x1p-11 + 0x1p-50, Float::kF16), 1.0 + 0x1p-10);
}

TEST(LowPrecision, Limits) {
  const double inf = std::numeric_limits<double>::infinity();
  EXPECT_EQ(round_to(65504.0, Float::kF16), 65504.0);  // largest float16
  EXPECT_EQ(round_to(65519.99, Float::kF16), 65504.0);
  EXPECT_EQ(round_to(65520.0, Float::kF16), inf);
  EXPECT_EQ(round_to(-1e300, Float::kBF16), -inf);
  EXPECT_EQ(round_to(inf, Float::kBF16), inf);
  EXPECT_TRUE(std::isnan(round_to(std::nan(""), Float::kF16)));
  std::vector<float> special(33, std::numeric_limits<float>::quiet_NaN());
  special[1] = std::numeric_limits<float>::infinity();
  special[2] = std::numeric_limits<float>::max();
  for (const Float f : {Float::kBF16, Float::kF16}) {
    std::vector<float> out(33);
    round_values(special.data(), 33, f, out.data());
    EXPECT_TRUE(std::isnan(out[0]));
    EXPECT_EQ(out[1], std::numeric_limits<float>::infinity());
    EXPECT_EQ(out[2], std::numeric_limits<float>::infinity());
  }
}

TEST(LowPrecision, SpacingIsTheDistanceToTheNextValue) {
  EXPECT_EQ(spacing(1.5, Float::kBF16), 0x1p-7);
  EXPECT_EQ(spacing(-200.0, Float::kBF16), 1.0);
  EXPECT_EQ(spacing(0.0, Float::kF16), 0x1p-24);
  EXPECT_EQ(spacing(1.0, Float::kF64), std::nextafter(1.0, 2.0) - 1.0);
  EXPECT_EQ(unit_roundoff(Float::kBF16), 0x1p-8);
  EXPECT_EQ(unit_roundoff(Float::kF32), 0x1p-24);
  EXPECT_EQ(unit_roundoff(Float::kF64), 0x1p-53);
}

}  // namespace
}  // namespace moeaudit::kernels
