// Names of recorded numbers: simplest first, what is as simple beside it, and none where none fits.
#include "audit/variants/naming.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace moeaudit::variants {
namespace {

const Factor* find(const std::vector<Factor>& all, double value) {
  for (const Factor& f : all) {
    if (std::fabs(f.value - value) <= 1e-12 * std::fabs(value)) return &f;
  }
  return nullptr;
}

TEST(Naming, FactorsAreProductsQuotientsAndInverses) {
  const std::vector<Symbol> symbols = {{"M", 7}, {"k", 2}, {"E", 8}, {"W", 1}, {"c", 0.02, true}};
  const auto all = factors_of(symbols);
  EXPECT_EQ(find(all, 1.0)->text, "");
  EXPECT_EQ(find(all, 7.0)->text, "M");
  EXPECT_EQ(find(all, 1 / 7.0)->text, "1 / M");
  EXPECT_EQ(find(all, 14.0)->text, "M k");
  EXPECT_EQ(find(all, 3.5)->text, "M / k");
  EXPECT_EQ(find(all, 4.0)->text, "k^2");
  EXPECT_EQ(find(all, 4.0)->equals, "E / k") << "2 x 2 is 8 / 2";
  EXPECT_EQ(find(all, 0.02)->text, "c");
  EXPECT_EQ(find(all, 0.14), nullptr) << "c stands alone";
  EXPECT_EQ(find(all, 0.0)->text, "0");
  for (const Factor& f : all) EXPECT_EQ(f.text.find('W'), std::string::npos) << "a size of 1 shows nothing";
}

Name name(std::vector<double> recorded, std::vector<Formula> formulas, double band = 1e-6) {
  const std::vector<Symbol> symbols = {{"M", 4}, {"W", 4}, {"L", 3}};
  const std::vector<double> bands(recorded.size(), band);
  return name_formula("aux_loss", {recorded, bands}, formulas, factors_of(symbols));
}

TEST(Naming, OneFormulaAndOneFactorMustFitEveryObservation) {
  const std::vector<Formula> formulas = {{"", "right", {1.0, 2.0}}, {"A8", "other", {1.1, 1.7}}};
  Name n = name({3.3, 5.1}, formulas);
  EXPECT_TRUE(n.found);
  EXPECT_EQ(n.id, "A8");
  EXPECT_EQ(n.factor, "L");
  EXPECT_DOUBLE_EQ(n.factor_value, 3);
  n = name({3.3, 6.0}, formulas);  // the first by one, the second by the other
  EXPECT_FALSE(n.found);
  EXPECT_FALSE(n.runner_up.empty());
  EXPECT_GT(n.runner_up_fit, 1);
}

TEST(Naming, TheSimplestComesFirstAndWhatIsAsSimpleStandsBesideIt) {
  // 4 times the right value is M, and W, and what A7 gives; A7 times L / L is none.
  Name n = name({4.0}, {{"", "right", {1.0}}, {"A7", "first choice", {4.0}}});
  ASSERT_TRUE(n.found);
  EXPECT_EQ(n.id, "A22");  // of a factor M in this quantity
  EXPECT_EQ(n.factor, "M");
  EXPECT_NE(n.also.find("A7 first choice"), std::string::npos) << n.also;
  EXPECT_NE(n.also.find("a factor of W"), std::string::npos) << n.also;
  n = name({1.0}, {{"", "right", {1.0}}, {"A7", "first choice", {1.0}}});
  EXPECT_EQ(n.id, "");
  EXPECT_EQ(n.also, "");
}

TEST(Naming, ZeroNanAndInfinity) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  EXPECT_EQ(name({0.0, 0.0}, {{"", "right", {1.0, 2.0}}}).factor, "0");
  EXPECT_FALSE(name({0.0, 1e-9}, {{"", "right", {1.0, 2.0}}}).found) << "a small number is no zero";
  EXPECT_FALSE(name({nan}, {{"", "right", {1.0}}}).found);
  EXPECT_EQ(name({inf}, {{"", "right", {1.0}}, {"Z13", "not shifted", {inf}}}).id, "Z13");
  EXPECT_FALSE(name({2.5}, {{"", "right", {1.0}}, {"A19", "not recorded", {nan}}}).found);
  EXPECT_FALSE(name({1.0}, {}).found);
}

}  // namespace
}  // namespace moeaudit::variants
