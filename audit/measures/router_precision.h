// Parts of the router-precision measure that stand on their own.
#pragma once

#include <cstdint>
#include <utility>

namespace moeaudit {

/// 95 % Wilson score interval of a share (Wilson, JASA 22, 1927): centre and half width solve
/// |p - hits/n| = 1.96 sqrt(p (1 - p) / n). {0, 1} for n = 0.
std::pair<double, double> wilson_interval(double hits, double n);

/// Work of the whole measure, for choosing the number of tokens.
struct RouterWork {
  std::int64_t routers = 0;
  std::int64_t experts = 0;
  std::int64_t hidden = 0;
  int wide_modes = 0;   // GEMMs with float64 sums
  int float_modes = 0;  // GEMMs in float32
};
/// Tokens per router, at most 4,096 and at least 48, so that the whole takes about 3 s on two cores (speeds below are
/// of a 3.7 GHz AVX-512 core; no clock is asked, so the answer is the same everywhere).
std::int64_t affordable_tokens(const RouterWork& work);
/// What one token of all routers takes on one core of the host, in seconds.
double core_seconds_a_token(const RouterWork& work);

}  // namespace moeaudit
