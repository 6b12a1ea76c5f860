// bfloat16 as stored, and the types that kernels calculate in.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/host/low_precision.h"

namespace moeaudit::kernels {

/// The upper half of a float32.
struct BFloat16 {
  std::uint16_t bits = 0;
};

template <class T>
struct WideOf {
  using Type = T;
};
template <>
struct WideOf<BFloat16> {
  using Type = float;
};
/// What values of T are multiplied and added in where a header says no more: T itself, float32 for bfloat16.
template <class T>
using Wide = typename WideOf<T>::Type;

MOE_AUDIT_HOST_DEVICE inline float widen(float v) { return v; }
MOE_AUDIT_HOST_DEVICE inline double widen(double v) { return v; }
MOE_AUDIT_HOST_DEVICE inline float widen(BFloat16 v) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16);
}

MOE_AUDIT_HOST_DEVICE inline BFloat16 round_to_bfloat16(float v) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(v);
  if (v != v) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
struct Narrow {
  template <class From>
  MOE_AUDIT_HOST_DEVICE static T from(From v) {
    return static_cast<T>(v);
  }
};
template <>
struct Narrow<BFloat16> {
  MOE_AUDIT_HOST_DEVICE static BFloat16 from(float v) { return round_to_bfloat16(v); }
  MOE_AUDIT_HOST_DEVICE static BFloat16 from(double v) {
    return round_to_bfloat16(static_cast<float>(round_to(v, Float::kBF16)));
  }
};
/// v rounded once to T, to nearest, ties to even.
template <class T, class From>
MOE_AUDIT_HOST_DEVICE inline T narrow(From v) {
  return Narrow<T>::from(v);
}

}  // namespace moeaudit::kernels
