// Quantised weights: from codes and scales to values, and what a matrix is worth after a trip through a quantiser of
// bitsandbytes and back. Host kernels.
//
// Symbols: value i of the row-major tensor [matrices, rows, columns] is code[i] * scale; row r and column c of matrix m
// have scale number (m * ceil(rows / row_block) + r / row_block) * ceil(columns / column_block) + c / column_block.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/host/low_precision.h"
#include "kernels/host/router.h"

namespace moeaudit::kernels {

/// What a code stands for. The first three take a byte; of the others two are in a byte.
enum class WeightCode {
  kE4M3,   // OCP 8-bit floating point (arXiv 2209.05433), float8_e4m3fn: no infinities, S.1111.111 is NaN
  kE5M2,   // float8_e5m2: the upper half of a binary16
  kInt8,   // two's complement
  kE2M1,   // OCP Microscaling 1.0 (arXiv 2310.10537): 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign
  kTable,  // a number from 0 to 15 of the table beside it: nf4 and fp4 of bitsandbytes
};
constexpr bool two_a_byte(WeightCode code) { return code == WeightCode::kE2M1 || code == WeightCode::kTable; }

enum class ScaleType {
  kF64,
  kF32,
  kBF16,
  kF16,
  kE4M3,    // nvfp4
  kE8M0,    // 2^(byte - 127), 255 is NaN: mxfp4
  kNested,  // double quantisation (QLoRA, arXiv 2305.14314 section 3): float32(float32(nested_map[byte] *
            // nested_absmax[i / nested_block]) + nested_offset)
};

/// The formats in these terms (scales that are one for all: row_block = rows, column_block = columns):
///   nf4, fp4  kTable, high_half_first, one row of all values; column_block = blocksize; kF32 or kNested.
///             bitsandbytes 0.46.1, functional.py dequantize_4bit
///   float8    kE4M3 or kE5M2; 128 x 128 blocks of weight_scale_inv (DeepSeek-V3, inference/kernel.py weight_dequant;
///             the last block of a row or column may be shorter), one scale a row, or one for all
///   mxfp4     kE2M1, column_block = 32, kE8M0. gpt-oss; transformers 5.23.0 integrations/mxfp4.py takes scale 255 for
///             2^128, where the standard and this have NaN
///   nvfp4     kE2M1, column_block = 16, kE4M3; factor = weight_scale_2 (ModelOpt) or divisor = weight_global_scale
///             (compressed-tensors 0.12.2)
///   int8      kInt8, row_block = 1, column_block = columns, kF32; divisor = 127 for SCB of bitsandbytes
struct QuantisedWeights {
  const std::uint8_t* codes = nullptr;
  WeightCode code = WeightCode::kE4M3;
  bool high_half_first = false;  // of a byte with two codes: the first value is in its high half
  const void* table = nullptr;   // [16] float32; kTable alone
  std::int64_t matrices = 1, rows = 0, columns = 0;
  std::int64_t row_block = 1, column_block = 1;
  const void* scales = nullptr;  // of scale_type; kNested: bytes
  ScaleType scale_type = ScaleType::kF32;
  double factor = 1, divisor = 1;       // of every scale: scale * factor / divisor
  const void* nested_map = nullptr;     // [256] float32; kNested alone, as the next three
  const void* nested_absmax = nullptr;  // [ceil(scales / nested_block)] float32
  std::int64_t nested_block = 1;
  float nested_offset = 0;
};

/// out[j] = value first + j, for j < count. Nothing is added up: a value depends on its code and scale alone, and every
/// backend, vector width and split gives the same bits. NaN is the quiet NaN of positive sign, whatever it came from.
///
///   double  code and scale exactly, scale * factor / divisor and code * scale each rounded to float64: one rounding
///           where factor and divisor are 1, none where the product has at most 53 bits. The truth.
///   float   what frameworks compute: scale, factor and divisor as float32, every product rounded to it; int8 with a
///           divisor d is (code * scale) * float32(factor / d), as bitsandbytes' int8_vectorwise_dequant has it.
///           round_values() then gives their bfloat16 and float16.
///
/// On the host scales and tables may lie at any address. kBadShape: sizes or blocks below 1, a range beyond the tensor;
/// kNullPointer.
Status dequantise(const QuantisedWeights& weights, std::int64_t first, std::int64_t count, double* out);
Status dequantise(const QuantisedWeights& weights, std::int64_t first, std::int64_t count, float* out);

// ---- one code, one scale, one value: both sides
// ------------------------------------------------------------------------

constexpr float kQuietNaN = std::numeric_limits<float>::quiet_NaN();

/// A binary format of at most 16 bits with `kExponent` and `kMantissa` of them: sign, exponent, mantissa. Exact.
/// kInfinities: the largest exponent holds infinities and NaN, as IEEE has it; otherwise all ones alone is NaN.
template <int kExponent, int kMantissa, bool kInfinities>
MOE_AUDIT_HOST_DEVICE constexpr float small_float_value(unsigned bits) {
  constexpr unsigned kAll = (1u << (kExponent + kMantissa)) - 1, kTop = (1u << kExponent) - 1,
                     kFraction = (1u << kMantissa) - 1;
  constexpr unsigned kBias = (1u << (kExponent - 1)) - 1;
  const unsigned magnitude = bits & kAll, exponent = magnitude >> kMantissa, fraction = magnitude & kFraction;
  if (kInfinities ? exponent == kTop && fraction != 0 : magnitude == kAll) return kQuietNaN;
  const unsigned sign = bits >> (kExponent + kMantissa) << 31;
  if (kInfinities && exponent == kTop) return std::bit_cast<float>(sign | 0x7f800000u);
  // Subnormal: fraction * 2^(1 - bias - mantissa).
  const float size = exponent == 0
                         ? static_cast<float>(fraction) * std::bit_cast<float>((128u - kBias - kMantissa) << 23)
                         : std::bit_cast<float>((exponent + 127u - kBias) << 23 | fraction << (23 - kMantissa));
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(size) | sign);
}
MOE_AUDIT_HOST_DEVICE constexpr float e4m3_value(unsigned bits) { return small_float_value<4, 3, false>(bits & 255); }
MOE_AUDIT_HOST_DEVICE constexpr float e5m2_value(unsigned bits) { return small_float_value<5, 2, true>(bits & 255); }
MOE_AUDIT_HOST_DEVICE constexpr float f16_value(unsigned bits) { return small_float_value<5, 10, true>(bits & 65535); }
/// All 16 are finite: the sign, and half of 0, 1, 2, 3, 4, 6, 8, 12.
MOE_AUDIT_HOST_DEVICE constexpr float e2m1_value(unsigned bits) {
  const unsigned exponent = bits >> 1 & 3, fraction = bits & 1;
  const float size = exponent == 0 ? 0.5f * static_cast<float>(fraction)
                                   : std::bit_cast<float>((exponent + 126u) << 23 | fraction << 22);
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(size) | (bits & 8) << 28);
}
MOE_AUDIT_HOST_DEVICE constexpr float e8m0_value(unsigned bits) {
  if (bits == 255) return kQuietNaN;
  return std::bit_cast<float>(bits == 0 ? 0x00400000u : bits << 23);
}

/// Element i from an address that may be misaligned on the host.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T element_at(const void* from, std::int64_t i) {
#ifdef __CUDA_ARCH__
  return static_cast<const T*>(from)[i];
#else
  T v;
  std::memcpy(&v, static_cast<const char*>(from) + i * static_cast<std::int64_t>(sizeof v), sizeof v);
  return v;
#endif
}

MOE_AUDIT_HOST_DEVICE inline float code_value(const QuantisedWeights& w, std::int64_t i) {
  if (!two_a_byte(w.code)) {
    const unsigned byte = w.codes[i];
    return w.code == WeightCode::kE4M3   ? e4m3_value(byte)
           : w.code == WeightCode::kE5M2 ? e5m2_value(byte)
                                         : static_cast<float>(static_cast<std::int8_t>(byte));
  }
  const unsigned byte = w.codes[i / 2], half = w.high_half_first == (i % 2 == 0) ? byte >> 4 : byte & 15;
  return w.code == WeightCode::kE2M1 ? e2m1_value(half) : element_at<float>(w.table, half);
}

/// Scale i in the arithmetic T. float and kInt8: without factor and divisor, which come last (see product()).
template <class T>
MOE_AUDIT_HOST_DEVICE inline T scale_value(const QuantisedWeights& w, std::int64_t i) {
  T s = 0;
  switch (w.scale_type) {
    case ScaleType::kF64: s = static_cast<T>(element_at<double>(w.scales, i)); break;
    case ScaleType::kF32: s = static_cast<T>(element_at<float>(w.scales, i)); break;
    case ScaleType::kBF16:
      s = static_cast<T>(
          std::bit_cast<float>(static_cast<std::uint32_t>(element_at<std::uint16_t>(w.scales, i)) << 16));
      break;
    case ScaleType::kF16: s = static_cast<T>(f16_value(element_at<std::uint16_t>(w.scales, i))); break;
    case ScaleType::kE4M3: s = static_cast<T>(e4m3_value(element_at<std::uint8_t>(w.scales, i))); break;
    case ScaleType::kE8M0: s = static_cast<T>(e8m0_value(element_at<std::uint8_t>(w.scales, i))); break;
    case ScaleType::kNested: {
      const float product = element_at<float>(w.nested_map, element_at<std::uint8_t>(w.scales, i)) *
                            element_at<float>(w.nested_absmax, i / w.nested_block);
      s = static_cast<T>(product + w.nested_offset);
      break;
    }
  }
  if (std::is_same_v<T, float> && w.code == WeightCode::kInt8) return s;
  if (w.factor != 1) s = s * static_cast<T>(w.factor);
  if (w.divisor != 1) s = s / static_cast<T>(w.divisor);
  return s;
}

/// code * scale, NaN made one; `last` is last_factor().
template <class T>
MOE_AUDIT_HOST_DEVICE inline T product(float code, T scale, T last) {
  const T v = static_cast<T>(code) * scale * last;
  return v == v ? v : static_cast<T>(kQuietNaN);
}
template <class T>
MOE_AUDIT_HOST_DEVICE inline T last_factor(const QuantisedWeights& w) {
  return std::is_same_v<T, float> && w.code == WeightCode::kInt8 ? static_cast<T>(w.factor / w.divisor) : T(1);
}

/// Where value i lies: its scale, and how many values from it on share that scale before the row or block ends.
struct ScalePlace {
  std::int64_t scale, left;
};
MOE_AUDIT_HOST_DEVICE inline std::int64_t blocks_of(std::int64_t n, std::int64_t block) {
  return n / block + (n % block != 0);
}
MOE_AUDIT_HOST_DEVICE inline std::int64_t first_scale_of_row(const QuantisedWeights& w, std::int64_t row) {
  return (row / w.rows * blocks_of(w.rows, w.row_block) + row % w.rows / w.row_block) *
         blocks_of(w.columns, w.column_block);
}
MOE_AUDIT_HOST_DEVICE inline ScalePlace place_of(const QuantisedWeights& w, std::int64_t i) {
  const std::int64_t row = i / w.columns, column = i % w.columns, block = column / w.column_block;
  const std::int64_t in_block = w.column_block - column % w.column_block, in_row = w.columns - column;
  return {first_scale_of_row(w, row) + block, in_block < in_row ? in_block : in_row};
}

/// One value, the long way.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T dequantised(const QuantisedWeights& w, std::int64_t i) {
  return product(code_value(w, i), scale_value<T>(w, place_of(w, i).scale), last_factor<T>(w));
}

/// What is wrong with the arguments; kOk if nothing.
inline Status check_dequantise(const QuantisedWeights& w, std::int64_t first, std::int64_t count, const void* out) {
  std::int64_t elements = 0;
  if (w.matrices < 1 || w.rows < 1 || w.columns < 1 || w.row_block < 1 || w.column_block < 1 || w.nested_block < 1)
    return Status::kBadShape;
  if (__builtin_mul_overflow(w.matrices, w.rows, &elements) || __builtin_mul_overflow(elements, w.columns, &elements))
    return Status::kBadShape;
  if (first < 0 || count < 0 || first > elements || count > elements - first) return Status::kBadShape;
  if (count == 0) return Status::kOk;
  if (out == nullptr || w.codes == nullptr || w.scales == nullptr) return Status::kNullPointer;
  if (w.code == WeightCode::kTable && w.table == nullptr) return Status::kNullPointer;
  const bool nested = w.scale_type == ScaleType::kNested;
  return nested && (w.nested_map == nullptr || w.nested_absmax == nullptr) ? Status::kNullPointer : Status::kOk;
}

// ---- there and back
// ----------------------------------------------------------------------------------------------------

/// The 16 values of NF4 (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E).
extern const float kNf4Values[16];
inline constexpr std::int64_t kNf4Block = 64;

/// out = w through NF4 and back: runs of 64 consecutive elements (of the row-major matrix; the last run may be shorter)
/// share the scale s = max |w|, kept in float32; each w / s goes to the nearest of the 16 values, the lower one when it
/// lies halfway; out = value * s. A run of zeros stays zero. That is bitsandbytes on a CPU; its CUDA kernel has w * (1
/// / s), which may round to the other side of halfway. Double quantisation of the scales is not modelled.
void nf4_round_trip(const float* w, std::int64_t count, float* out);

/// out = w through the row-wise int8 of LLM.int8() (Dettmers et al., arXiv:2208.07339) and back: s = max |row|,
/// q = round_to_even(w * (127 / s)), out = q * (s * (1 / 127)), each product in float32. A row of zeros stays zero. The
/// outlier columns that LLM.int8() takes out of the activations, and the rounding of the activations themselves, are
/// not modelled.
void int8_row_round_trip(const float* w, std::int64_t rows, std::int64_t columns, float* out);

}  // namespace moeaudit::kernels
