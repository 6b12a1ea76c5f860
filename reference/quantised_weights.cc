// Quantised weights on LibTorch.
#include "reference/quantised_weights.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace moeaudit::reference {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// 2^n for int64 n from -1000 to 1000, exactly: at::pow may be off by a place.
at::Tensor power_of_two(const at::Tensor& n) {
  at::Tensor table = at::empty({2001}, at::kDouble);
  for (int i = 0; i <= 2000; ++i) table[i] = std::ldexp(1.0, i - 1000);
  return table.index({n + 1000});
}

at::Tensor to_blocks(const at::Tensor& t, std::int64_t dim, std::int64_t block, std::int64_t length) {
  return t.repeat_interleave(block, dim).narrow(dim, 0, length);
}

}  // namespace

at::Tensor small_float_values(const at::Tensor& codes, int exponent_bits, int mantissa_bits, Specials specials) {
  const std::int64_t fractions = std::int64_t{1} << mantissa_bits, exponents = std::int64_t{1} << exponent_bits;
  const std::int64_t bias = exponents / 2 - 1;
  const at::Tensor c = codes.to(at::kLong), fraction = c.remainder(fractions),
                   exponent = c.floor_divide(fractions).remainder(exponents),
                   negative = c.floor_divide(fractions * exponents).remainder(2);
  const at::Tensor normal = exponent.gt(0);
  const at::Tensor significand = fraction.to(at::kDouble) / static_cast<double>(fractions) + normal.to(at::kDouble);
  at::Tensor size = significand * power_of_two(exponent.clamp_min(1) - bias);
  const at::Tensor top = exponent.eq(exponents - 1);
  if (specials == Specials::kAllOnes)
    size = at::where(top & fraction.eq(fractions - 1), at::full_like(size, kNaN), size);
  if (specials == Specials::kIeee) {
    size = at::where(top, at::where(fraction.eq(0), at::full_like(size, INFINITY), at::full_like(size, kNaN)), size);
  }
  return size * (1 - 2 * negative).to(at::kDouble);
}

at::Tensor exponent_values(const at::Tensor& codes) {
  const at::Tensor value = power_of_two(codes.to(at::kLong) - 127);
  return at::where(codes.eq(255), at::full_like(value, kNaN), value);
}

at::Tensor halves(const at::Tensor& bytes, bool high_half_first) {
  const at::Tensor b = bytes.flatten().to(at::kLong), high = b.floor_divide(16), low = b.remainder(16);
  return at::stack({high_half_first ? high : low, high_half_first ? low : high}, 1).flatten();
}

at::Tensor nested_scales(const at::Tensor& bytes, const at::Tensor& map, const at::Tensor& absmax, std::int64_t block,
                         float offset) {
  const at::Tensor each = to_blocks(absmax.to(at::kFloat), 0, block, bytes.numel());
  return map.to(at::kFloat).index({bytes.flatten().to(at::kLong)}) * each + at::full({}, offset, at::kFloat);
}

at::Tensor block_scaled(const at::Tensor& values, const at::Tensor& scales, std::int64_t row_block,
                        std::int64_t column_block) {
  return values * to_blocks(to_blocks(scales, 1, row_block, values.size(1)), 2, column_block, values.size(2));
}

at::Tensor nf4_values() {
  const double offset = 0.9677083;
  const auto quantiles = [&](std::int64_t points) {
    return std::sqrt(2.0) * at::erfinv(2 * at::linspace(offset, 0.5, points + 1, at::kDouble) - 1).narrow(0, 0, points);
  };
  const at::Tensor all = std::get<0>(at::cat({quantiles(8), -quantiles(7), at::zeros({1}, at::kDouble)}).sort());
  return all / all.max();
}

}  // namespace moeaudit::reference
