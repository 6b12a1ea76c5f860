// What a weight matrix is worth after a trip through a quantiser of bitsandbytes and back.
#pragma once

#include <cstdint>

namespace moeaudit::kernels {

/// The 16 values of NF4 (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E).
extern const float kNf4Values[16];
inline constexpr std::int64_t kNf4Block = 64;

/// out = w through NF4 and back: runs of 64 consecutive elements (of the row-major matrix; the last run may be shorter)
/// share the scale s = max |w|, kept in float32; each w * (1 / s) goes to the nearest of the 16 values, the lower one
/// when it lies halfway; out = value * s. A run of zeros stays zero. Double quantisation of the scales is not modelled.
void nf4_round_trip(const float* w, std::int64_t count, float* out);

/// out = w through the row-wise int8 of LLM.int8() (Dettmers et al., arXiv:2208.07339) and back: s = max |row|,
/// q = round_to_even(w * (127 / s)), out = q * (s * (1 / 127)), each product in float32. A row of zeros stays zero. The
/// outlier columns that LLM.int8() takes out of the activations, and the rounding of the activations themselves, are
/// not modelled.
void int8_row_round_trip(const float* w, std::int64_t rows, std::int64_t columns, float* out);

}  // namespace moeaudit::kernels
