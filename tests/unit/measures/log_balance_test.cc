// What the numbers of a log leave open, against intervals worked out by hand.
#include "audit/measures/log_balance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "audit/measures/log_numbers.h"

namespace moeaudit {
namespace {

PrintedDigits digits(std::initializer_list<double> values) {
  PrintedDigits d;
  for (const double v : values) d.add(v);
  return d;
}

TEST(PrintedDigits, FixedDecimals) {
  const PrintedDigits d = digits({10.2512, 9.1234, 0.5});  // "%.4f", trailing zeros lost
  EXPECT_DOUBLE_EQ(d.unit(10.2512), 1e-4);
  EXPECT_DOUBLE_EQ(d.unit(9.1234), 1e-4);
  EXPECT_DOUBLE_EQ(d.unit(0.5), 1e-4);
}

TEST(PrintedDigits, SignificantDigits) {
  const PrintedDigits d = digits({1.234567e-3, 1.234567e1});  // "%.6E"
  EXPECT_NEAR(d.unit(1.234567e1), 1e-5, 1e-18);
  EXPECT_NEAR(d.unit(1.234567e-3), 1e-9, 1e-18);
}

TEST(PrintedDigits, Bfloat16) {
  const PrintedDigits d = digits({2.140625, 2.15625, 2.171875});
  EXPECT_DOUBLE_EQ(d.unit(2.15625), 1.0 / 64);  // 8 bits of 2.x
  EXPECT_LT(digits({2.140625, 2.15625, 2.1718}).unit(2.0), 1e-5) << "one value that is none";
}

TEST(PrintedDigits, WrittenWithTrailingZeros) {
  PrintedDigits d = digits({1.0});
  EXPECT_GE(d.unit(1.0), 1.0 / 128);
  d.at_least(7);
  EXPECT_DOUBLE_EQ(d.unit(1.0), 1e-6);
}

double printed(double v, int decimals) {
  char text[32];
  std::snprintf(text, sizeof text, "%.*f", decimals, v);
  return std::strtod(text, nullptr);
}

FactSheet log_of(double coefficient, double n, int decimals, double z_in_loss = 0) {
  LogTable log;
  std::mt19937 rng(7);
  std::uniform_real_distribution<double> noise(0, 1);
  for (int i = 0; i < 20; ++i) {
    const double ce = 4 + noise(rng), aux = 2 + 0.3 * noise(rng), z = 10 + noise(rng);
    log.step.push_back(i + 1);
    log.line.push_back(i + 1);
    log.loss.push_back(printed(ce + n * coefficient * aux + z_in_loss * z, decimals));
    log.ce.push_back(ce);
    log.aux_loss.push_back(aux);
    log.z_loss.push_back(z);
  }
  log.has_loss = log.has_ce = log.has_aux_loss = std::vector<char>(20, 1);
  log.has_z_loss = std::vector<char>(20, z_in_loss > 0);
  log.has_grad_norm = log.has_eval_loss = std::vector<char>(20, 0);
  log.grad_norm = log.eval_loss = std::vector<double>(20, std::nan(""));
  FactSheet f;
  f.log.set(std::move(log), Origin::kMeasured, {});
  f.aux_coefficient.set(coefficient, Origin::kStated, {});
  return f;
}

TEST(LogBalance, OneNumberFitsEveryEntry) {
  for (const double n : {0.0, 0.125, 1.0, 2.0, 8.0, 64.0}) {
    std::string why;
    const auto b = balance_in(log_of(0.02, n, 4), &why);
    ASSERT_TRUE(b) << n;
    EXPECT_TRUE(b->solved);
    EXPECT_EQ(b->entries, 20);
    EXPECT_LE(b->least, 0.02 * n);
    EXPECT_GE(b->greatest, 0.02 * n);
    EXPECT_LT(b->greatest - b->least, 5e-5) << "one entry leaves 1e-4 / 2 open";
  }
}

TEST(LogBalance, NothingWhereAConstantFitsAsWell) {
  std::string why;
  EXPECT_FALSE(balance_in(log_of(0.02, 1, 2), &why)) << "0.040 to 0.046 in two decimals: 0.043 does, too";
  EXPECT_FALSE(balance_in(log_of(0.001, 1, 2), &why)) << "0.002 to 0.0023 beside 0.005 of rounding";
}

TEST(LogBalance, ZLossOnceOrWithTheFactor) {
  std::string why;
  FactSheet once = log_of(0.02, 8, 4, 0.001);
  once.z_coefficient.set(0.001, Origin::kStated, {});
  const auto b = balance_in(once, &why);
  ASSERT_TRUE(b);
  EXPECT_EQ(b->z, "once");
  EXPECT_NEAR(b->least, 0.16, 1e-4);
  FactSheet with = log_of(0.02, 8, 4, 0.008);
  with.z_coefficient.set(0.001, Origin::kStated, {});
  const auto c = balance_in(with, &why);
  ASSERT_TRUE(c);
  EXPECT_EQ(c->z, "n times");
  EXPECT_NEAR(c->least, 0.16, 1e-4);
}

TEST(LogBalance, NothingWhereEntriesDisagree) {
  FactSheet f = log_of(0.02, 1, 4);
  LogTable log = f.log.value();
  log.loss[11] += 0.01;
  f.log.set(std::move(log), Origin::kMeasured, {});
  std::string why;
  EXPECT_FALSE(balance_in(f, &why));
  EXPECT_NE(why.find("no one multiple"), std::string::npos);
}

TEST(LogBalance, BoundedByTheCrossEntropy) {
  // modelscope/ms-swift issue 5627, as logged
  LogTable log;
  log.step = {1, 5, 10, 15};
  log.line = {1, 2, 3, 4};
  log.loss = {930.53393555, 930.2043457, 927.21035156, 924.36416016};
  log.aux_loss = {4.01051664, 4.01045179, 4.00914497, 4.00620689};
  log.has_loss = log.has_aux_loss = std::vector<char>(4, 1);
  log.has_ce = log.has_z_loss = log.has_grad_norm = log.has_eval_loss = std::vector<char>(4, 0);
  log.ce = log.z_loss = log.grad_norm = log.eval_loss = std::vector<double>(4, std::nan(""));
  FactSheet f;
  f.log.set(std::move(log), Origin::kMeasured, {});
  std::string why;
  const auto b = balance_in(f, &why);
  ASSERT_TRUE(b);
  EXPECT_FALSE(b->solved);
  EXPECT_NEAR(b->least / 0.9, 253.65, 0.01);     // (930.53393555 - 15) / 4.01051664
  EXPECT_NEAR(b->greatest / 0.9, 256.37, 0.01);  // 924.36416016 / 4.00620689
}

}  // namespace
}  // namespace moeaudit
