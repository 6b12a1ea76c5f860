// NF4 and row-wise int8 by hand.
#include "kernels/host/quantised_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/host/gaussian.h"

namespace moeaudit::kernels {
namespace {

TEST(Nf4, BlocksOf64ShareTheirLargestMagnitude) {
  std::vector<float> w(130, 0.0f), out(130);
  w[0] = 2.0f;    // block 0: scale 2
  w[1] = -1.0f;   // -0.5 -> nearest of -0.5250730514526367, -0.39491748809814453
  w[2] = 0.25f;   // 0.125 -> 0.16093... is 0.036 away, 0.0796 is 0.045 away
  w[64] = -3.0f;  // block 1: scale 3
  w[128] = 0.5f;  // block 2, two elements long
  nf4_round_trip(w.data(), 130, out.data());
  EXPECT_EQ(out[0], 2.0f);
  EXPECT_EQ(out[1], 2.0f * -0.5250730514526367f);
  EXPECT_EQ(out[2], 2.0f * 0.16093020141124725f);
  EXPECT_EQ(out[3], 0.0f);
  EXPECT_EQ(out[64], -3.0f);
  EXPECT_EQ(out[128], 0.5f);
  EXPECT_EQ(out[129], 0.0f);
}

TEST(Nf4, EveryValueOfTheTableIsItsOwnAndZerosStay) {
  std::vector<float> w(64, 0.0f), out(64, 1.0f);
  nf4_round_trip(w.data(), 64, out.data());
  EXPECT_EQ(out, w);
  for (int i = 0; i < 64; ++i) w[i] = kNf4Values[i % 16];
  nf4_round_trip(w.data(), 64, out.data());
  EXPECT_EQ(out, w);
}

TEST(Nf4, NeverFurtherThanHalfTheWidestGap) {
  std::vector<float> w(6400), out(6400);
  unit_gaussians(3, 0, 0, 6400, w.data());
  nf4_round_trip(w.data(), 6400, out.data());
  for (int block = 0; block < 100; ++block) {
    float scale = 0;
    for (int i = 0; i < 64; ++i) scale = std::max(scale, std::fabs(w[block * 64 + i]));
    // The widest gap of the table is that from -1 to -0.696.
    for (int i = 0; i < 64; ++i) EXPECT_LE(std::fabs(out[block * 64 + i] - w[block * 64 + i]), 0.1520f * scale);
  }
}

TEST(Int8, RowsShareTheirLargestMagnitude) {
  const std::vector<float> w = {127.0f, -63.5f, 1.0f, 0.4f, 0, 0, 0, 0};
  std::vector<float> out(8, 9.0f);
  int8_row_round_trip(w.data(), 2, 4, out.data());
  const float step = 127.0f * (1.0f / 127.0f);
  EXPECT_EQ(out[0], 127.0f * step);
  EXPECT_EQ(out[1], -64.0f * step);  // -63.5 is halfway: to even
  EXPECT_EQ(out[2], 1.0f * step);
  EXPECT_EQ(out[3], 0.0f);
  for (int i = 4; i < 8; ++i) EXPECT_EQ(out[i], 0.0f);  // a row of zeros has no scale
}

}  // namespace
}  // namespace moeaudit::kernels
