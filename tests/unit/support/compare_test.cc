// The comparator itself: what must never pass, does not.
#include "tests/support/compare.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace moeaudit::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Comparison compare_vectors(const std::vector<double>& expected, const std::vector<double>& actual,
                           CompareOptions o = {}) {
  return compare(Values<double>{{static_cast<std::int64_t>(expected.size())}, expected},
                 Values<double>{{static_cast<std::int64_t>(actual.size())}, actual}, o);
}
CompareOptions within(double bound) {
  CompareOptions o;
  o.bound = [bound](std::size_t, double) { return bound; };
  return o;
}

TEST(Compare, EqualIsOk) {
  const Comparison c = compare_vectors({1, -2, 0}, {1, -2, 0});
  EXPECT_TRUE(c.ok()) << c.report();
  EXPECT_EQ(c.max_abs.value, 0);
}

TEST(Compare, NanNeverPassesAnyBound) {
  for (const double bound : {0.0, 1e300, kInf, kNan}) {
    EXPECT_FALSE(compare_vectors({1}, {kNan}, within(bound)).ok());
    EXPECT_FALSE(compare_vectors({kNan}, {1}, within(bound)).ok());
    EXPECT_FALSE(compare_vectors({kNan}, {kNan}, within(bound)).ok());
  }
  EXPECT_EQ(compare_vectors({1}, {kNan}).non_finite_one_side, 1u);
  EXPECT_EQ(compare_vectors({kNan}, {kNan}).non_finite_same, 1u);
}

TEST(Compare, NanBoundAcceptsNothing) { EXPECT_FALSE(compare_vectors({1}, {1}, within(kNan)).ok()); }

TEST(Compare, InfinitiesMatchOnlyWhenAskedAndOnlyTheirOwnSign) {
  CompareOptions o = within(kInf);
  EXPECT_FALSE(compare_vectors({kInf}, {kInf}, o).ok());
  o.same_non_finite_is_equal = true;
  EXPECT_TRUE(compare_vectors({kInf, -kInf, kNan}, {kInf, -kInf, kNan}, o).ok());
  EXPECT_FALSE(compare_vectors({kInf}, {-kInf}, o).ok());
  EXPECT_FALSE(compare_vectors({kInf}, {kNan}, o).ok());
  EXPECT_FALSE(compare_vectors({kInf}, {1e308}, o).ok());
  EXPECT_EQ(compare_vectors({kInf}, {-kInf}, o).non_finite_differ, 1u);
}

TEST(Compare, SignsAndZeros) {
  const Comparison c = compare_vectors({1e-9, 0.0, 1e-9}, {-1e-9, -0.0, 0.0}, within(1e-6));
  EXPECT_TRUE(c.ok()) << c.report();
  EXPECT_EQ(c.sign_flips, 1u);
  EXPECT_EQ(c.signed_zeros, 1u);
  EXPECT_EQ(c.rounded_to_zero, 1u);
  EXPECT_FALSE(compare_vectors({1}, {-1}, within(1.9)).ok());
}

TEST(Compare, EmptyIsNoSuccess) {
  const Comparison c = compare_vectors({}, {});
  EXPECT_FALSE(c.ok());
  EXPECT_NE(c.report().find("nothing to compare"), std::string::npos);
}

TEST(Compare, TransposedIsFound) {
  const std::vector<double> a = {1, 2, 3, 4, 5, 6}, transposed = {1, 4, 2, 5, 3, 6};
  EXPECT_FALSE(compare(Values<double>{{2, 3}, a}, Values<double>{{3, 2}, transposed}, within(1e9)).ok());
  const std::vector<double> square = {1, 2, 3, 4}, turned = {1, 3, 2, 4};
  const Comparison c = compare(Values<double>{{2, 2}, square}, Values<double>{{2, 2}, turned}, within(0.5));
  EXPECT_EQ(c.over_bound, 2u);
  EXPECT_FALSE(c.ok());
}

TEST(Compare, ShapeMustFitTheData) {
  const std::vector<double> a = {1, 2};
  EXPECT_FALSE(compare(Values<double>{{3}, a}, Values<double>{{3}, a}).ok());
}

TEST(Compare, SaysWhereAndHowMuchOfTheBound) {
  const std::vector<double> expected = {1, 2, 4, 8, 16, 32}, actual = {1, 2, 4, 8, 16, 32.5};
  const Comparison c = compare(Values<double>{{2, 3}, expected}, Values<double>{{2, 3}, actual}, within(2));
  EXPECT_TRUE(c.ok());
  EXPECT_EQ(c.max_abs.at, 5u);
  EXPECT_DOUBLE_EQ(c.max_abs.value, 0.5);
  EXPECT_DOUBLE_EQ(c.max_rel.value, 0.5 / 32);
  EXPECT_DOUBLE_EQ(c.bound_used.value, 0.25);
  EXPECT_NE(c.report().find("[1, 2]"), std::string::npos) << c.report();
}

TEST(Compare, CountsPlacesOfTheFormatAsked) {
  CompareOptions o = within(1);
  o.format = kernels::Float::kBF16;  // neighbours of 1.0 in bfloat16 are 2^-7 apart
  EXPECT_DOUBLE_EQ(compare_vectors({1.0}, {1.0 + 1.0 / 64}, o).max_ulp.value, 2.0);
  o.format = kernels::Float::kF64;
  EXPECT_DOUBLE_EQ(compare_vectors({1.0}, {std::nextafter(1.0, 2.0)}, o).max_ulp.value, 1.0);
}

TEST(Compare, ErrorOverABoundOfZeroUsesInfinitelyMuch) {
  EXPECT_EQ(compare_vectors({1}, {2}).bound_used.value, kInf);
  EXPECT_FALSE(compare_vectors({1}, {2}).ok());
}

TEST(Compare, FloatAgainstDouble) {
  const std::vector<double> expected = {0.1};
  const std::vector<float> actual = {0.1f};
  EXPECT_FALSE(compare(Values<double>{{1}, expected}, Values<float>{{1}, actual}).ok());
  EXPECT_TRUE(compare(Values<double>{{1}, expected}, Values<float>{{1}, actual}, within(std::fabs(0.1f - 0.1))).ok());
}

}  // namespace
}  // namespace moeaudit::test
