// What a quantised tensor stands for: codes and, in side tensors, their scales. Everything a file says is checked
// against the sizes of the tensors before it is used.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "audit/tensors/tensor_store.h"
#include "kernels/host/quantised_weights.h"

namespace moeaudit {

/// How the values of one tensor are read.
///
///   plain     the tensor holds them one by one in a float type: decode() of tensor_store.h. Also 8-bit floats without
///             scales beside them.
///   coded     value = code * scale by kernels/host/quantised_weights.h, both taken exactly to float64 and multiplied
///   there:
///               nf4, fp4  bitsandbytes, with and without double quantisation
///               mxfp4     gpt-oss X_blocks, X_scales; int8 X with E8M0 X_scale_inv
///               nvfp4     weight_scale_2 (ModelOpt) or weight_global_scale (compressed-tensors)
///               float8    one scale a tensor, a row, or a block of rows and columns (weight_scale_inv: 128 x 128)
///               int8      the same, or bitsandbytes' SCB, row-major weights only
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
  bool two_a_byte() const { return kind_ == Kind::kCoded && kernels::two_a_byte(coded_.code); }
  /// The tensors that the values depend on besides the codes.
  const std::vector<const TensorView*>& side() const { return side_; }

  /// Values [first, first + count) of a coded tensor.
  void decode(std::int64_t first, std::int64_t count, double* out) const {
    kernels::dequantise(coded_, first, count, out);
  }

 private:
  bool try_bitsandbytes_4bit(const TensorStore& store);
  bool try_mxfp4(const TensorStore& store);
  bool try_nvfp4(const TensorStore& store);
  bool try_scaled(const TensorStore& store);
  bool try_packed_fp4(const TensorView& scales);
  bool lay_out(std::int64_t rows, std::int64_t columns, const TensorView& scale);

  Kind kind_ = Kind::kOpaque;
  std::string_view scheme_;
  std::vector<const TensorView*> side_;
  const TensorView* tensor_ = nullptr;
  std::int64_t elements_ = 0, columns_ = 0;
  kernels::QuantisedWeights coded_;
};

}  // namespace moeaudit
