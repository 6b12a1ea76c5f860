// Quantised weights on LibTorch, by the definitions of the formats: the truth that kernels/host/quantised_weights.h
// answers to. LibTorch 1.13 has no 8-bit floats, so they are put together from sign, exponent and mantissa.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

/// What the largest codes mean: nothing special, NaN where all bits are ones, or infinities and NaN as in IEEE 754.
enum class Specials { kNone, kAllOnes, kIeee };

/// codes (uint8, any shape) -> float64: (-1)^s 2^(e - bias) (1 + m / 2^M), for e = 0 (-1)^s 2^(1 - bias) m / 2^M.
/// E4M3 is (4, 3, kAllOnes), E5M2 (5, 2, kIeee), E2M1 (2, 1, kNone).
at::Tensor small_float_values(const at::Tensor& codes, int exponent_bits, int mantissa_bits, Specials specials);
/// E8M0: 2^(code - 127), 255 is NaN.
at::Tensor exponent_values(const at::Tensor& codes);
/// Two codes a byte, one after the other: [n] -> [2 n].
at::Tensor halves(const at::Tensor& bytes, bool high_half_first);
/// Scales of double quantisation, each product and sum in float32: map [256], absmax [ceil(n / block)].
at::Tensor nested_scales(const at::Tensor& bytes, const at::Tensor& map, const at::Tensor& absmax, std::int64_t block,
                         float offset);
/// values [M, R, C] * scales [M, ceil(R / row_block), ceil(C / column_block)], in the dtype of the arguments.
at::Tensor block_scaled(const at::Tensor& values, const at::Tensor& scales, std::int64_t row_block,
                        std::int64_t column_block);
/// NF4 by its definition (arXiv 2305.14314, appendix E, with the offset of bitsandbytes' create_normal_map): quantiles
/// of the normal distribution at 8 and 7 points between 0.9677083 and 1/2, zero, all divided by the largest.
at::Tensor nf4_values();

}  // namespace moeaudit::reference
