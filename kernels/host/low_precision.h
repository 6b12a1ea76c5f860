// Round-to-nearest-even to bfloat16 and float16, from double in one step, and what the formats are.
#pragma once

#include <bit>
#include <cstdint>

// These formulas are compiled for CUDA too (with -fmad=false), so that both sides compute the same bits.
#ifdef __CUDACC__
#define MOE_AUDIT_HOST_DEVICE __host__ __device__
#else
#define MOE_AUDIT_HOST_DEVICE
#endif

namespace moeaudit::kernels {

/// The dtype a value is rounded to. kF64 leaves it alone.
enum class Float { kF64, kF32, kBF16, kF16 };

/// A binary format: `bits` of significand (the hidden one included), exponents `min_exp`..`max_exp` of normal numbers.
struct FloatFormat {
  int bits;
  int min_exp;
  int max_exp;
};
MOE_AUDIT_HOST_DEVICE constexpr FloatFormat format_of(Float f) {
  switch (f) {
    case Float::kF64: return {53, -1022, 1023};
    case Float::kF32: return {24, -126, 127};
    case Float::kBF16: return {8, -126, 127};
    case Float::kF16: return {11, -14, 15};
  }
  return {53, -1022, 1023};
}
const char* name_of(Float f);  // "float64", "float32", "bfloat16", "float16"

/// Half the distance between neighbours: |round_to(v) - v| <= unit_roundoff * |v| for values in the normal range.
constexpr double unit_roundoff(Float f) { return 1.0 / static_cast<double>(std::int64_t{1} << format_of(f).bits); }

/// 2^e as a double, for normal e.
MOE_AUDIT_HOST_DEVICE inline double power_of_two(int e) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(e + 1023) << 52);
}

/// Distance between the neighbours of v in the format (v finite): that of subnormals near zero, and beyond the largest
/// finite value the distance there would be if there were one more exponent.
MOE_AUDIT_HOST_DEVICE inline double spacing(double v, Float f) {
  const FloatFormat format = format_of(f);
  int e = static_cast<int>(std::bit_cast<std::uint64_t>(v) >> 52 & 0x7ff) - 1023;
  e = e < format.min_exp ? format.min_exp : e;
  e = f != Float::kF64 && e > format.max_exp + 1 ? format.max_exp + 1 : e;
  return power_of_two(e) * power_of_two(1 - format.bits);
}

/// v rounded once, to nearest, ties to even; beyond the largest finite value to infinity; NaN and the sign of zero
/// kept. Adding and subtracting 1.5 * 2^52 spacings lets the adder of the machine do the rounding; both steps are exact
/// otherwise, and there is no detour through float, which would round twice.
MOE_AUDIT_HOST_DEVICE inline double round_to(double v, Float f) {
  if (f == Float::kF64) return v;
  if (f == Float::kF32) return static_cast<double>(static_cast<float>(v));
  constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
  const FloatFormat format = format_of(f);
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(v);
  const double size = std::bit_cast<double>(bits & ~kSign);
  const double shift = 1.5 * 4503599627370496.0 * spacing(v, f);
  double r = (size + shift) - shift;
  r = r >= power_of_two(format.max_exp) * 2.0 ? std::bit_cast<double>(std::uint64_t{0x7ff} << 52) : r;
  r = size - size == 0.0 ? r : size;  // NaN and infinities as they are
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(r) | (bits & kSign));
}

}  // namespace moeaudit::kernels
