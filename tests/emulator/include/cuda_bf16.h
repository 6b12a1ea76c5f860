// Stand-in for the bfloat16 of CUDA: rounded to nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  std::uint16_t bits = 0;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) {
    const auto b = std::bit_cast<std::uint32_t>(v);
    bits = v != v ? 0x7fff : static_cast<std::uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
/// Rounded once: to float32 with the last bit set where something was cut off (round to odd), then to bfloat16.
inline __nv_bfloat16 __double2bfloat16(double v) {
  auto f = static_cast<float>(v);
  if (f != f || static_cast<double>(f) == v) return __nv_bfloat16(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(v)) f = std::nextafter(f, 0.0f);
  return __nv_bfloat16(std::bit_cast<float>(std::bit_cast<std::uint32_t>(f) | 1u));
}
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
