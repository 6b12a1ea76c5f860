// What a quantised tensor stands for: codes and, in side tensors, their scales. Everything a file says is checked
// against the sizes of the tensors before it is used.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "audit/tensors/tensor_store.h"

namespace moeaudit {

/// How the values of one tensor are read.
///
///   plain     the tensor holds them one by one in a float type: decode() of tensor_store.h. Also 8-bit floats without
///             scales beside them.
///   coded     value = code * scale, both taken exactly to float64 and multiplied there (one rounding, and none where
///   the
///             product has at most 53 bits):
///               nf4, fp4  bitsandbytes: quant_map[code] * absmax[i / blocksize]; with double quantisation absmax is
///                         float32(float32(nested_quant_map[q] * nested_absmax[j / nested_blocksize]) + nested_offset).
///                         The first of two values is in the high half of the byte.
///               mxfp4     gpt-oss X_blocks, X_scales: e2m1[code] * 2^(scale - 127), 32 values a scale, low half first.
///               nvfp4     e2m1[code] * e4m3 scale of 16 values, and * weight_scale_2 (ModelOpt) or /
///               weight_global_scale
///                         (compressed-tensors), low half first.
///               float8    code * scale, int8 code * scale: one scale a tensor, a row, or a block of rows and columns
///                         (weight_scale_inv: 128 x 128).
///               int8      bitsandbytes: code * (SCB[row] / 127), row-major weights only.
///   opaque    codes that cannot be decoded (GPTQ, AWQ, ...), indices, flags: bytes without values.
///
/// What frameworks compute from the same tensors is this, rounded to their dtype.
class StoredValues {
 public:
  static StoredValues of(const TensorStore& store, const TensorView& tensor);

  enum class Kind { kPlain, kCoded, kOpaque };
  Kind kind() const { return kind_; }
  /// "nf4", "mxfp4", ...; empty for plain and opaque tensors.
  std::string_view scheme() const { return scheme_; }
  std::int64_t elements() const { return elements_; }  // values; bytes of an opaque tensor
  std::int64_t columns() const { return columns_; }    // length of a row of values, 0 if opaque
  bool two_a_byte() const { return code_ == Code::kE2M1 || code_ == Code::kTable; }
  /// The tensors that the values depend on besides the codes.
  const std::vector<const TensorView*>& side() const { return side_; }

  /// Values [first, first + count) of a coded tensor; first and count even where two are in a byte.
  void decode(std::int64_t first, std::int64_t count, double* out) const;

 private:
  enum class Code { kNone, kE2M1, kTable, kFloat8, kInt8 };
  bool try_bitsandbytes_4bit(const TensorStore& store);
  bool try_mxfp4(const TensorStore& store);
  bool try_nvfp4(const TensorStore& store);
  bool try_scaled(const TensorStore& store);
  bool lay_out(std::int64_t rows, std::int64_t columns, const TensorView& scale);
  double scale_at(std::int64_t i) const;

  Kind kind_ = Kind::kOpaque;
  Code code_ = Code::kNone;
  std::string_view scheme_;
  std::vector<const TensorView*> side_;
  const TensorView* tensor_ = nullptr;
  std::int64_t elements_ = 0, columns_ = 0;
  // scale of (row, column) of matrix m: scales[(m * scale_rows + row / row_block) * scale_columns + column /
  // column_block]
  std::int64_t rows_ = 1, row_block_ = 1, column_block_ = 1, scale_rows_ = 1, scale_columns_ = 1;
  const TensorView* scales_ = nullptr;
  enum class Scale { kValue, kExponent, kNested } scale_kind_ = Scale::kValue;
  double factor_ = 1, divisor_ = 1;
  const TensorView *nested_absmax_ = nullptr, *nested_map_ = nullptr;
  std::int64_t nested_block_ = 1;
  float nested_offset_ = 0;
  const TensorView* quant_map_ = nullptr;  // kTable: its 16 values
};

}  // namespace moeaudit
