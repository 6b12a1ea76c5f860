// exp, log and what routers build from them, in plain IEEE operations: the C library picks its own variant by CPU
// (with or without FMA), and its bits change with its version; these do not.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host/low_precision.h"

namespace moeaudit::kernels {

namespace exp_double {
inline constexpr double kMagic =
    6755399441055744.0;  // 1.5 * 2^52: rounds to an integer, which then sits in the low bits

/// e^x = p 2^k for x in [-746, 710]: returns p, within (0.7, 1.5); *shifted is k + kMagic. x = k ln 2 + r with |r| <=
/// ln(2)/2 and ln 2 split in two parts so that k * high is exact (Cody and Waite); the Taylor sum to r^13 leaves
/// r^14/14! < 5e-18.
MOE_AUDIT_HOST_DEVICE inline double significand(double x, double* shifted) {
  *shifted = x * 1.4426950408889634 + kMagic;
  const double k = *shifted - kMagic;
  const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return 1.0 + (r + (r * r) * p);
}
}  // namespace exp_double

/// e^x within 1 unit in the last place (tests/unit/kernels/elementary_test.cc holds it against long double). 2^k goes
/// in as two factors so that results below 2^-1022 round once.
MOE_AUDIT_HOST_DEVICE inline double exp_exact_order(double x) {
  double shifted = 0;
  const double p = exp_double::significand(x < -746.0 ? -746.0 : (x > 710.0 ? 710.0 : x), &shifted);
  const double k = shifted - exp_double::kMagic;
  const double first = k < -1000.0 ? -1000.0 : (k > 1000.0 ? 1000.0 : k);
  const auto two_to = [](double n) {
    return std::bit_cast<double>((std::bit_cast<std::uint64_t>(n + (exp_double::kMagic + 1023.0)) & 0xfff) << 52);
  };
  return x != x ? x : p * two_to(first) * two_to(k - first);
}

/// ln x for x > 0, within 2 units in the last place: x = 2^e m with m in [sqrt(1/2), sqrt 2), ln m = 2
/// atanh((m-1)/(m+1)).
MOE_AUDIT_HOST_DEVICE inline double log_exact_order(double x) {
  if (!(x > 0.0)) return x == 0.0 ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  if (x > 1.7976931348623157e308) return x;
  int e = 0;
  double m = std::frexp(x, &e);  // [0.5, 1), exact
  if (m < 0.70710678118654757) {
    m *= 2.0;
    --e;
  }
  const double f = m - 1.0;  // exact
  const double s = f / (m + 1.0);
  const double z = s * s;  // <= 0.0295; the first left-out term z^12/25 < 2e-20
  double p = 2.0 / 23.0;
  for (int n = 21; n >= 3; n -= 2) p = p * z + 2.0 / n;
  // ln m = f - f^2/2 + s (f^2/2 + z p): the small corrections are added to the exact f last.
  const double half = 0.5 * f * f;
  const double high = e * 6.93147180369123816490e-01;  // exact
  const double low = e * 1.90821492927058770002e-10;
  return high - ((half - (s * (half + z * p) + low)) - f);
}

/// ln(1 + y) for y >= 0; the second term gives back what 1 + y lost.
MOE_AUDIT_HOST_DEVICE inline double log1p_exact_order(double y) {
  if (!(y < std::numeric_limits<double>::infinity())) return y;
  const double u = 1.0 + y;
  return log_exact_order(u) + (y - (u - 1.0)) / u;
}

/// tanh x, within 4 units in the last place. Near 0, where 1 - e^-2x would cancel, Lambert's continued fraction
/// x / (1 + x^2 / (3 + x^2 / (5 + ...))): at 1/2 and up to 17, what it leaves out is below 2e-19.
MOE_AUDIT_HOST_DEVICE inline double tanh_exact_order(double x) {
  const double size = x < 0.0 ? -x : x;
  if (size < 0.5) {
    double below = 17.0;
    for (int odd = 15; odd >= 1; odd -= 2) below = odd + x * x / below;
    return x / below;
  }
  const double e = exp_exact_order(-2.0 * size), t = (1.0 - e) / (1.0 + e);
  return x < 0.0 ? -t : t;
}

MOE_AUDIT_HOST_DEVICE inline double sigmoid_exact_order(double x) { return 1.0 / (1.0 + exp_exact_order(-x)); }

/// ln(1 + e^x); above 20 x itself, as torch.nn.functional.softplus has it (2.1e-9 less).
MOE_AUDIT_HOST_DEVICE inline double softplus_exact_order(double x) {
  return x > 20.0 ? x : log1p_exact_order(exp_exact_order(x));
}
MOE_AUDIT_HOST_DEVICE inline double sqrt_softplus_exact_order(double x) { return std::sqrt(softplus_exact_order(x)); }
/// The same of tensors of `dtype`: softplus is one, too, and rounded to it (transformers' sqrtsoftplus is
/// torch.sqrt(softplus(x))). The root is the caller's to round. kF64: nothing is rounded.
MOE_AUDIT_HOST_DEVICE inline double sqrt_softplus_in(double x, Float dtype) {
  return std::sqrt(round_to(softplus_exact_order(x), dtype));
}

// ---- float32: what a softmax or a sigmoid of float32 logits costs a token is mostly this

/// a b + c rounded once, on every machine (where there is no such instruction the C library does it in integers).
MOE_AUDIT_HOST_DEVICE inline float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

namespace exp_float {
inline constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which then sits in the low bits
inline constexpr float kLowest = -104.0f;     // e^-104 is less than half of the smallest float32
inline constexpr float kLog2e = 1.44269502f, kLn2High = 0.693147182f, kLn2Low = -1.90465421e-9f;

/// e^x = p 2^k for x in [kLowest, 0]: returns p; *shifted is k + kMagic. x = k ln 2 + r, Taylor to r^7 (r^8/8! < 6e-9,
/// a tenth of a unit in the last place).
MOE_AUDIT_HOST_DEVICE inline float significand(float x, float* shifted) {
  *shifted = fused(x, kLog2e, kMagic);
  const float k = *shifted - kMagic;
  const float r = fused(k, -kLn2Low, fused(k, -kLn2High, x));
  float p = 1.0f / 5040;
  p = fused(p, r, 1.0f / 720);
  p = fused(p, r, 1.0f / 120);
  p = fused(p, r, 1.0f / 24);
  p = fused(p, r, 1.0f / 6);
  p = fused(p, r, 0.5f);
  p = fused(p, r, 1.0f);
  return fused(p, r, 1.0f);
}
}  // namespace exp_float

/// e^x for x <= 0, within 1 unit in the last place (elementary_test.cc). 2^k goes in as two factors so that results
/// below 2^-126 round once. NaN stays NaN.
MOE_AUDIT_HOST_DEVICE inline float exp_of_non_positive(float x) {
  float shifted = 0;
  const float p = exp_float::significand(x < exp_float::kLowest ? exp_float::kLowest : x, &shifted);
  const float k = shifted - exp_float::kMagic, first = k < -100.0f ? -100.0f : k;
  const auto two_to = [](float n) {
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(n + (exp_float::kMagic + 127.0f)) << 23);
  };
  return p * two_to(first) * two_to(k - first);
}

/// 1 / (1 + e^-x), within 3 units in the last place; neither side overflows.
MOE_AUDIT_HOST_DEVICE inline float sigmoid_float(float x) {
  const float e = exp_of_non_positive(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/// The same names for both types.
MOE_AUDIT_HOST_DEVICE inline float exp_shifted(float x) { return exp_of_non_positive(x); }
MOE_AUDIT_HOST_DEVICE inline double exp_shifted(double x) { return exp_exact_order(x); }
MOE_AUDIT_HOST_DEVICE inline float sigmoid_of(float x) { return sigmoid_float(x); }
MOE_AUDIT_HOST_DEVICE inline double sigmoid_of(double x) { return sigmoid_exact_order(x); }

// ---- sums over experts or words

/// Lanes of such a sum: value i belongs to lane i mod kLanes, a lane adds its values in their order, from 0. What a
/// warp does at once, and the host with vectors of any width.
inline constexpr int kLanes = 32;

/// The sum of the lanes by halving: lane i takes lane i + 16, then lane i + 8, and so on, as the butterfly of a warp
/// does. Where only the first `used` hold anything, and nothing negative, the others need not be added.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T add_lanes(T* lane, int used = kLanes) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step && i + step < used; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}

}  // namespace moeaudit::kernels
