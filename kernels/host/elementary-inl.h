// elementary.h on vectors, once per instruction set (Highway's pattern for headers: included again for every target).
#if defined(MOE_AUDIT_KERNELS_HOST_ELEMENTARY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOE_AUDIT_KERNELS_HOST_ELEMENTARY_INL_H_
#undef MOE_AUDIT_KERNELS_HOST_ELEMENTARY_INL_H_
#else
#define MOE_AUDIT_KERNELS_HOST_ELEMENTARY_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "kernels/host/elementary.h"

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// exp_exact_order() on vectors: the same operations in the same order, and so the same bits.
template <class D>
HWY_INLINE hn::Vec<D> exp_lanes(D d, hn::Vec<D> x) {
  const hn::RebindToUnsigned<D> du;
  const auto c = [d](double v) { return hn::Set(d, v); };
  constexpr double kMagic = 6755399441055744.0;
  const auto clamped =
      hn::IfThenElse(hn::Lt(x, c(-746.0)), c(-746.0), hn::IfThenElse(hn::Gt(x, c(710.0)), c(710.0), x));
  const auto k = hn::Sub(hn::Add(hn::Mul(clamped, c(1.4426950408889634)), c(kMagic)), c(kMagic));
  const auto r =
      hn::Sub(hn::Sub(clamped, hn::Mul(k, c(6.93147180369123816490e-01))), hn::Mul(k, c(1.90821492927058770002e-10)));
  auto p = c(1.0 / 6227020800.0);
  for (const double next : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                            1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5}) {
    p = hn::Add(hn::Mul(p, r), c(next));
  }
  p = hn::Add(c(1.0), hn::Add(r, hn::Mul(hn::Mul(r, r), p)));
  const auto first =
      hn::IfThenElse(hn::Lt(k, c(-1000.0)), c(-1000.0), hn::IfThenElse(hn::Gt(k, c(1000.0)), c(1000.0), k));
  const auto two_to = [&](hn::Vec<D> n) {
    const auto bits = hn::And(hn::BitCast(du, hn::Add(n, c(kMagic + 1023.0))), hn::Set(du, std::uint64_t{0xfff}));
    return hn::BitCast(d, hn::ShiftLeft<52>(bits));
  };
  const auto result = hn::Mul(hn::Mul(p, two_to(first)), two_to(hn::Sub(k, first)));
  return hn::IfThenElse(hn::Eq(x, x), result, x);
}

/// log_exact_order() on vectors, for values from the smallest normal number to the largest finite one.
template <class D>
HWY_INLINE hn::Vec<D> log_lanes(D d, hn::Vec<D> x) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const auto c = [d](double v) { return hn::Set(d, v); };
  const auto bits = hn::BitCast(du, x);
  // frexp: x = 2^e m, m in [0.5, 1).
  auto m = hn::BitCast(d, hn::Or(hn::And(bits, hn::Set(du, 0x000fffffffffffffu)), hn::Set(du, 0x3fe0000000000000u)));
  auto e = hn::ConvertTo(d, hn::Sub(hn::BitCast(di, hn::ShiftRight<52>(bits)), hn::Set(di, 1022)));
  const auto low_half = hn::Lt(m, c(0.70710678118654757));
  m = hn::IfThenElse(low_half, hn::Mul(m, c(2.0)), m);
  e = hn::IfThenElse(low_half, hn::Sub(e, c(1.0)), e);
  const auto f = hn::Sub(m, c(1.0));
  const auto s = hn::Div(f, hn::Add(m, c(1.0)));
  const auto z = hn::Mul(s, s);
  auto p = c(2.0 / 23.0);
  for (int n = 21; n >= 3; n -= 2) p = hn::Add(hn::Mul(p, z), c(2.0 / n));
  const auto half = hn::Mul(hn::Mul(c(0.5), f), f);
  const auto high = hn::Mul(e, c(6.93147180369123816490e-01)), low = hn::Mul(e, c(1.90821492927058770002e-10));
  const auto rest = hn::Add(hn::Mul(s, hn::Add(half, hn::Mul(z, p))), low);
  return hn::Sub(high, hn::Sub(hn::Sub(half, rest), f));
}

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per target
