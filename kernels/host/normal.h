// The normal distribution in plain IEEE operations, the same bits on every CPU and device (elementary.h says why).
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/host/elementary.h"

namespace moeaudit::kernels {

/// e^(-u^2/2). u = h + l with 26 significant bits in h: h^2 is exact, and l (u + h) / 2 is below 5e-5, so that its
/// roundings do not show; rounding u^2 itself would cost u^2/2 half places, 700 of them in the far tail.
MOE_AUDIT_HOST_DEVICE inline double gaussian_exact_order(double u) {
  if (u > 40.0 || u < -40.0) return 0.0;
  const double h = std::bit_cast<double>(std::bit_cast<std::uint64_t>(u) & ~((std::uint64_t{1} << 27) - 1));
  return exp_exact_order(-0.5 * (h * h)) * exp_exact_order(-0.5 * ((u - h) * (u + h)));
}

/// Density of the standard normal distribution at u.
MOE_AUDIT_HOST_DEVICE inline double normal_density_exact_order(double u) {
  return 0.3989422804014327 * gaussian_exact_order(u);
}

/// Probability that a standard normal number exceeds u >= 0: the density times Mills' ratio M(u). (u + 4) M(u) falls
/// from 5.01 to 1 and is smooth in t = (u - 4) / (u + 4); the 26 Chebyshev coefficients here come from its values to 50
/// digits at the roots of T_60, and the ones left out add up to 5e-18. Clenshaw's recurrence from the last.
MOE_AUDIT_HOST_DEVICE inline double normal_tail_exact_order(double u) {
  constexpr double kMills[] = {
      2.43256042851504057,      -1.88425457457948346,     0.556956649096381649,     -0.121615972144204572,
      0.0173607081437277714,    -0.000803621200729965605, -0.000252034934805435325, 4.73837192705811735e-5,
      2.53258913659882581e-6,   -1.54040698399129992e-6,  -8.47496063006169589e-9,  5.18533860109467226e-8,
      -2.82812932766024977e-10, -1.9486566378891076e-9,   -2.49194549682756712e-11, 7.95724871944884639e-11,
      4.61841417915521927e-12,  -3.29085612422438493e-12, -4.36538404380972995e-13, 1.23007118392327742e-13,
      3.24141735820867813e-14,  -3.05323955873256653e-15, -2.01837402757073532e-15, -7.17019550142258764e-17,
      1.01695523980385421e-16,  1.7562442280533559e-17};
  if (u > 40.0) return 0.0;  // below 2^-1074 from 38.6
  const double t = (u - 4.0) / (u + 4.0), twice = 2.0 * t;
  double b = 0.0, next = 0.0;  // b_(k+1), b_(k+2)
  for (int k = 25; k >= 1; --k) {
    const double now = (twice * b - next) + kMills[k];
    next = b;
    b = now;
  }
  return normal_density_exact_order(u) * (((t * b - next) + kMills[0]) / (u + 4.0));
}

/// Probability that a standard normal number is at most u. Error: bounds.h normal_cdf(); measured, 4.3 units in the
/// last place over the whole range, the far tail included (tests/unit/kernels/normal_test.cc).
MOE_AUDIT_HOST_DEVICE inline double normal_cdf_exact_order(double u) {
  return u <= 0.0 ? normal_tail_exact_order(-u) : 1.0 - normal_tail_exact_order(u);
}

/// The slope of softplus_exact_order().
MOE_AUDIT_HOST_DEVICE inline double softplus_slope_exact_order(double x) {
  return x > 20.0 ? 1.0 : sigmoid_exact_order(x);
}

}  // namespace moeaudit::kernels
