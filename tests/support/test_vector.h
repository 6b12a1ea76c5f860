// The closed-form test vector: z = 2 sin(0.7 (t+1)(e+1) + 1.3 l) + 0.5 cos(0.37 (t+1) + (e+1)) + (0.8 if e = 0); E = 8,
// k = 2, T = 16, two layers; sequences are halves. Its values were computed apart, in Python, with every formula written out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace moeaudit::test {

inline constexpr std::int64_t kE = 8, kT = 16, kK = 2;

inline std::vector<double> vector_logits(int layer) {
  std::vector<double> z;
  for (int t = 1; t <= kT; ++t) {
    for (int e = 1; e <= kE; ++e)
      z.push_back(2 * std::sin(0.7 * t * e + 1.3 * layer) + 0.5 * std::cos(0.37 * t + e) + (e == 1 ? 0.8 : 0.0));
  }
  return z;
}

/// Rows 12 to 15 are row 15 again, and padding.
inline std::vector<double> padded_logits() {
  std::vector<double> z = vector_logits(0);
  for (int t = 12; t < kT; ++t) std::copy_n(z.begin() + 15 * kE, kE, z.begin() + t * kE);
  return z;
}
inline std::vector<std::uint8_t> padding() {
  std::vector<std::uint8_t> m(kT, 1);
  std::fill(m.begin() + 12, m.end(), 0);
  return m;
}

/// The best two of every row, ties to the lower index.
inline std::vector<std::int32_t> top2(const std::vector<double>& choice) {
  std::vector<std::int32_t> out;
  for (std::size_t t = 0; t < choice.size(); t += kE) {
    std::vector<std::int32_t> order(kE);
    for (std::int32_t e = 0; e < kE; ++e) order[static_cast<std::size_t>(e)] = e;
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
      return choice[t + static_cast<std::size_t>(a)] > choice[t + static_cast<std::size_t>(b)];
    });
    out.insert(out.end(), order.begin(), order.begin() + kK);
  }
  return out;
}

/// Whether a number is another that was written down with ten digits, the last of them rounded; digits of the vector's
/// values differ in length by the place of the point.
inline bool nine_digits(double got, double want) { return std::fabs(got - want) <= 6e-10 * std::max(1.0, std::fabs(want)); }

}  // namespace moeaudit::test
