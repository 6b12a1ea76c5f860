// From the bytes of a tensor to double or float. Every conversion to double is exact, but for 64-bit integers beyond
// 2^53, which round to nearest.
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "audit/tensors/tensor_store.h"
#include "kernels/host/quantised_weights.h"

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian, and so is this reader");

namespace moeaudit {
namespace {

struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
struct F8E4M3 {
  std::uint8_t bits;
};
struct F8E5M2 {
  std::uint8_t bits;
};
struct F8E8M0 {
  std::uint8_t bits;
};
struct Bool {
  std::uint8_t bits;
};

float widen(BF16 v) { return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16); }

/// The exponent is moved by a multiplication with 2^112, which is exact for subnormals, too.
float widen(F16 v) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v.bits & 0x7FFFu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude | 0x7F800000u;
  const std::uint32_t bits = magnitude >= 0x0F800000u ? special : std::bit_cast<std::uint32_t>(finite);
  return std::bit_cast<float>(bits | sign);
}

constexpr std::array<float, 256> table_of_e4m3() {
  std::array<float, 256> table{};
  for (unsigned i = 0; i < 256; ++i) table[i] = kernels::e4m3_value(i);
  return table;
}
constexpr std::array<float, 256> kE4M3 = table_of_e4m3();

float widen(F8E4M3 v) { return kE4M3[v.bits]; }
/// The upper half of a binary16.
float widen(F8E5M2 v) { return widen(F16{static_cast<std::uint16_t>(v.bits << 8)}); }
float widen(F8E8M0 v) { return kernels::e8m0_value(v.bits); }
float widen(Bool v) { return v.bits ? 1.0f : 0.0f; }
template <class T>
requires std::is_arithmetic_v<T> T widen(T v) { return v; }

template <class Stored, class Out>
void convert(const std::byte* from, std::int64_t count, Out* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    Stored v;
    std::memcpy(&v, from + i * static_cast<std::int64_t>(sizeof v), sizeof v);  // may be misaligned
    out[i] = static_cast<Out>(widen(v));
  }
}

template <class Out>
bool decode_as(const TensorView& t, std::int64_t first, std::int64_t count, Out* out) {
  const std::int64_t size = size_of(t.dtype);
  if (size == 0 || first < 0 || count < 0) return false;
  const std::int64_t stored = static_cast<std::int64_t>(t.bytes.size()) / size;
  if (first > stored || count > stored - first) return false;
  const std::byte* from = t.bytes.data() + first * size;
  switch (t.dtype) {
    case DType::kF64: convert<double>(from, count, out); return true;
    case DType::kF32: convert<float>(from, count, out); return true;
    case DType::kBF16: convert<BF16>(from, count, out); return true;
    case DType::kF16: convert<F16>(from, count, out); return true;
    case DType::kF8E4M3: convert<F8E4M3>(from, count, out); return true;
    case DType::kF8E5M2: convert<F8E5M2>(from, count, out); return true;
    case DType::kF8E8M0: convert<F8E8M0>(from, count, out); return true;
    case DType::kI64: convert<std::int64_t>(from, count, out); return true;
    case DType::kI32: convert<std::int32_t>(from, count, out); return true;
    case DType::kI16: convert<std::int16_t>(from, count, out); return true;
    case DType::kI8: convert<std::int8_t>(from, count, out); return true;
    case DType::kU64: convert<std::uint64_t>(from, count, out); return true;
    case DType::kU32: convert<std::uint32_t>(from, count, out); return true;
    case DType::kU16: convert<std::uint16_t>(from, count, out); return true;
    case DType::kU8: convert<std::uint8_t>(from, count, out); return true;
    case DType::kBool: convert<Bool>(from, count, out); return true;
    case DType::kUnknown:
    case DType::kF4:
    case DType::kF6E2M3:
    case DType::kF6E3M2:
    case DType::kC64: return false;
  }
  return false;
}

}  // namespace

int size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
    case DType::kU64:
    case DType::kC64: return 8;
    case DType::kF32:
    case DType::kI32:
    case DType::kU32: return 4;
    case DType::kBF16:
    case DType::kF16:
    case DType::kI16:
    case DType::kU16: return 2;
    case DType::kF8E4M3:
    case DType::kF8E5M2:
    case DType::kF8E8M0:
    case DType::kI8:
    case DType::kU8:
    case DType::kBool: return 1;
    case DType::kUnknown:
    case DType::kF4:
    case DType::kF6E2M3:
    case DType::kF6E3M2: return 0;
  }
  return 0;
}

bool decode(const TensorView& tensor, std::int64_t first, std::int64_t count, double* out) {
  return decode_as(tensor, first, count, out);
}

bool decode(const TensorView& tensor, std::int64_t first, std::int64_t count, float* out) {
  return decode_as(tensor, first, count, out);
}

}  // namespace moeaudit
