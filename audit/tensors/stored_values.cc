#include "audit/tensors/stored_values.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "audit/text/text.h"

namespace moeaudit {
namespace {

constexpr double kE2M1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
constexpr std::int64_t kMostQuantState = 1 << 16;  // bytes of bitsandbytes' JSON; it has some hundred

bool is_value_type(DType d) { return d == DType::kF64 || d == DType::kF32 || d == DType::kBF16 || d == DType::kF16; }
bool is_float8(DType d) { return d == DType::kF8E4M3 || d == DType::kF8E5M2; }

std::int64_t blocks(std::int64_t n, std::int64_t block) { return n / block + (n % block != 0); }

/// Length of the blocks of which `count` cover `n`; 0 if that is no regular cut. 128 is tried first: the last block of
/// weight_scale_inv may be shorter.
std::int64_t block_length(std::int64_t n, std::int64_t count) {
  if (count == 1) return n;
  if (count == n) return 1;
  if (blocks(n, 128) == count) return 128;
  return count > 0 && n % count == 0 ? n / count : 0;
}

std::string without(std::string_view name, std::string_view end) {
  return std::string(name.substr(0, name.size() - end.size()));
}

/// What each byte is worth in a format of 8 bits.
const double* byte_values(DType dtype) {
  using Table = std::array<double, 256>;
  static const auto make = [](DType d) {
    std::array<std::byte, 256> codes;
    for (int i = 0; i < 256; ++i) codes[static_cast<std::size_t>(i)] = static_cast<std::byte>(i);
    TensorView view;
    view.dtype = d;
    view.bytes = codes;
    Table table;
    moeaudit::decode(view, 0, 256, table.data());
    return table;
  };
  static const Table e4m3 = make(DType::kF8E4M3), e5m2 = make(DType::kF8E5M2), e8m0 = make(DType::kF8E8M0),
                     i8 = make(DType::kI8);
  return (dtype == DType::kF8E4M3 ? e4m3 : dtype == DType::kF8E5M2 ? e5m2 : dtype == DType::kF8E8M0 ? e8m0 : i8).data();
}

bool one_value(const TensorView* t, double* out) {
  return t != nullptr && is_value_type(t->dtype) && t->elements() == 1 && decode(*t, 0, 1, out);
}

}  // namespace

StoredValues StoredValues::of(const TensorStore& store, const TensorView& tensor) {
  StoredValues v;
  v.tensor_ = &tensor;
  const DType d = tensor.dtype;
  const bool may_be_coded = d == DType::kU8 || d == DType::kI8 || is_float8(d);
  if (may_be_coded &&
      (v.try_bitsandbytes_4bit(store) || v.try_mxfp4(store) || v.try_nvfp4(store) || v.try_scaled(store))) {
    v.kind_ = Kind::kCoded;
    return v;
  }
  StoredValues plain;
  plain.tensor_ = &tensor;
  if (is_value_type(d) || is_float8(d)) {
    plain.kind_ = Kind::kPlain;
    plain.elements_ = tensor.elements();
    plain.columns_ = tensor.shape.empty() ? 1 : tensor.shape.back();
  } else {
    plain.elements_ = static_cast<std::int64_t>(tensor.bytes.size());
  }
  return plain;
}

bool StoredValues::try_bitsandbytes_4bit(const TensorStore& store) {
  const std::string name(tensor_->name);
  if (tensor_->dtype != DType::kU8) return false;
  const TensorView* absmax = store.find(name + ".absmax");
  const TensorView* map = store.find(name + ".quant_map");
  const TensorView* state = nullptr;
  for (const char* type : {"nf4", "fp4"}) {
    if (state != nullptr) break;
    state = store.find(name + ".quant_state.bitsandbytes__" + type);
    scheme_ = type;
  }
  if (!absmax || !map || !state || map->dtype != DType::kF32 || map->elements() != 16) return false;
  if (static_cast<std::int64_t>(state->bytes.size()) > kMostQuantState) return false;
  Node json;
  TextError error;
  const std::string_view text(reinterpret_cast<const char*>(state->bytes.data()), state->bytes.size());
  if (!parse_json(text, &json, nullptr, &error) || !json.is_map()) return false;
  const auto integer = [&](const char* key) {
    const Node* node = json.find(key);
    return node ? node->as_int().value_or(0) : 0;
  };
  const std::int64_t block = integer("blocksize"), stored = static_cast<std::int64_t>(tensor_->bytes.size());
  const Node* shape = json.find("shape");
  if (block < 2 || block % 2 != 0 || shape == nullptr || !shape->is_list() || shape->items.empty()) return false;
  elements_ = 1;
  for (const Node& extent : shape->items) {
    columns_ = extent.as_int().value_or(-1);
    if (columns_ < 0 || __builtin_mul_overflow(elements_, columns_, &elements_)) return false;
  }
  if (elements_ / 2 + elements_ % 2 != stored) return false;
  scale_columns_ = blocks(elements_, block);
  if (absmax->elements() < scale_columns_) return false;
  scales_ = absmax;
  side_ = {absmax, map, state};
  if (absmax->dtype == DType::kU8) {
    nested_absmax_ = store.find(name + ".nested_absmax");
    nested_map_ = store.find(name + ".nested_quant_map");
    nested_block_ = integer("nested_blocksize");
    const Node* offset = json.find("nested_offset");
    if (!nested_absmax_ || !nested_map_ || nested_block_ < 1 || offset == nullptr || !offset->as_double()) return false;
    if (nested_absmax_->dtype != DType::kF32 || nested_map_->dtype != DType::kF32 || nested_map_->elements() != 256 ||
        nested_absmax_->elements() < blocks(scale_columns_, nested_block_)) {
      return false;
    }
    nested_offset_ = static_cast<float>(*offset->as_double());
    scale_kind_ = Scale::kNested;
    side_.push_back(nested_absmax_);
    side_.push_back(nested_map_);
  } else if (absmax->dtype != DType::kF32) {
    return false;
  }
  quant_map_ = map;
  code_ = Code::kTable;
  // Blocks run through the whole tensor: one row.
  column_block_ = block;
  return true;
}

bool StoredValues::try_mxfp4(const TensorStore& store) {
  const std::string_view end = "_blocks";
  if (tensor_->dtype != DType::kU8 || !tensor_->name.ends_with(end) || tensor_->shape.size() < 2) return false;
  const TensorView* scales = store.find(without(tensor_->name, end) + "_scales");
  const std::int64_t bytes = static_cast<std::int64_t>(tensor_->bytes.size());
  const std::int64_t inner = tensor_->shape.back(), groups = tensor_->shape[tensor_->shape.size() - 2];
  if (scales == nullptr || (scales->dtype != DType::kU8 && scales->dtype != DType::kF8E8M0) || inner < 1) return false;
  if (scales->elements() != bytes / inner) return false;
  scheme_ = "mxfp4";
  code_ = Code::kE2M1;
  elements_ = 2 * bytes;
  columns_ = 2 * inner * groups;
  column_block_ = 2 * inner;
  scale_columns_ = scales->elements();
  scales_ = scales;
  scale_kind_ = Scale::kExponent;
  side_ = {scales};
  return true;
}

bool StoredValues::try_nvfp4(const TensorStore& store) {
  const std::string_view name = tensor_->name, packed = "weight_packed";
  if (tensor_->dtype != DType::kU8 || tensor_->shape.empty()) return false;
  const std::string stem = name.ends_with(packed) ? without(name, packed) + "weight" : std::string(name);
  const TensorView* scales = store.find(stem + "_scale");
  if (scales == nullptr || scales->dtype != DType::kF8E4M3) return false;
  elements_ = 2 * static_cast<std::int64_t>(tensor_->bytes.size());
  columns_ = 2 * tensor_->shape.back();
  if (columns_ % 16 != 0 || scales->elements() != elements_ / 16) return false;
  const TensorView* global = store.find(stem + "_scale_2");
  if (global != nullptr) {
    if (!one_value(global, &factor_)) return false;
  } else if ((global = store.find(stem + "_global_scale")) != nullptr && !one_value(global, &divisor_)) {
    return false;
  }
  if (global == nullptr) return false;
  scheme_ = "nvfp4";
  code_ = Code::kE2M1;
  column_block_ = 16;
  scale_columns_ = scales->elements();
  scales_ = scales;
  side_ = {scales, global};
  return true;
}

/// The layout of scales over matrices [rows, columns], the last two dimensions of the tensor.
bool StoredValues::lay_out(std::int64_t rows, std::int64_t columns, const TensorView& scale) {
  if (rows < 1 || columns < 1) return false;
  const std::int64_t matrices = elements_ / (rows * columns), n = scale.elements();
  rows_ = rows;
  scale_columns_ = scale_rows_ = 1;
  if (n == 1) {  // one for all: one matrix of all rows
    rows_ = row_block_ = std::max<std::int64_t>(elements_ / columns, 1);
    column_block_ = columns;
    return true;
  }
  const auto shape = scale.shape;
  if (n == matrices) {
    scale_rows_ = 1;
  } else if (shape.size() == 1 && n == rows && matrices == 1) {
    scale_rows_ = rows;
  } else if (shape.size() >= 2 && shape.size() == tensor_->shape.size()) {
    scale_rows_ = shape[shape.size() - 2];
    scale_columns_ = shape.back();
  } else {
    return false;
  }
  row_block_ = block_length(rows, scale_rows_);
  column_block_ = block_length(columns, scale_columns_);
  std::int64_t expected = 0;
  return row_block_ > 0 && column_block_ > 0 &&
         !__builtin_mul_overflow(matrices, scale_rows_ * scale_columns_, &expected) && expected == n;
}

bool StoredValues::try_scaled(const TensorStore& store) {
  const DType d = tensor_->dtype;
  const std::string name(tensor_->name);
  if (d == DType::kU8 || tensor_->shape.size() < 2) return false;
  elements_ = tensor_->elements();
  columns_ = tensor_->shape.back();
  const std::int64_t rows = tensor_->shape[tensor_->shape.size() - 2];
  code_ = d == DType::kI8 ? Code::kInt8 : Code::kFloat8;
  for (const char* end : {"_scale_inv", "_scale"}) {
    const TensorView* scales = store.find(name + end);
    if (scales == nullptr || !is_value_type(scales->dtype) || !lay_out(rows, columns_, *scales)) continue;
    scheme_ = d == DType::kI8 ? "int8" : "float8";
    scales_ = scales;
    side_ = {scales};
    return true;
  }
  if (d != DType::kI8 || !name.ends_with("weight") || tensor_->shape.size() != 2) return false;
  const TensorView* scb = store.find(without(name, "weight") + "SCB");
  const TensorView* format = store.find(without(name, "weight") + "weight_format");
  if (scb == nullptr || scb->dtype != DType::kF32 || scb->elements() != rows) return false;
  if (format != nullptr && (format->bytes.size() != 1 || format->bytes[0] != std::byte{0}))
    return false;  // 0: row-major
  scheme_ = "int8";
  rows_ = scale_rows_ = rows;
  column_block_ = columns_;
  divisor_ = 127;
  scales_ = scb;
  side_ = {scb};
  if (format != nullptr) side_.push_back(format);
  return true;
}

double StoredValues::scale_at(std::int64_t i) const {
  const std::byte* const at = scales_->bytes.data() + i * size_of(scales_->dtype);
  switch (scale_kind_) {
    case Scale::kValue: {
      double s = 0;
      if (scales_->dtype == DType::kF8E4M3) {  // one for 16 values: worth the short cut
        s = byte_values(DType::kF8E4M3)[std::to_integer<int>(*at)];
      } else {
        moeaudit::decode(*scales_, i, 1, &s);
      }
      return s * factor_ / divisor_;
    }
    case Scale::kExponent: return byte_values(DType::kF8E8M0)[std::to_integer<int>(*at)];
    case Scale::kNested: {
      float map = 0, absmax = 0;
      moeaudit::decode(*nested_map_, std::to_integer<int>(*at), 1, &map);
      moeaudit::decode(*nested_absmax_, i / nested_block_, 1, &absmax);
      const float product = map * absmax;
      return product + nested_offset_;
    }
  }
  return 0;
}

void StoredValues::decode(std::int64_t first, std::int64_t count, double* out) const {
  const auto* codes = reinterpret_cast<const std::uint8_t*>(tensor_->bytes.data());
  const double* bytes = two_a_byte() ? nullptr : byte_values(tensor_->dtype);
  double table[16];
  if (code_ == Code::kTable)
    moeaudit::decode(*quant_map_, 0, 16, table);
  else
    std::copy(std::begin(kE2M1), std::end(kE2M1), table);
  // Where the scales run through the whole tensor it is one row.
  const std::int64_t row_length = two_a_byte() ? std::max<std::int64_t>(elements_, 1) : columns_;
  const int first_shift = code_ == Code::kTable ? 4 : 0;
  while (count > 0) {  // a row of the tensor, or what is wanted of it
    const std::int64_t row = first / row_length;
    const std::int64_t scale_row = row / rows_ * scale_rows_ + row % rows_ / row_block_;
    std::int64_t column = first % row_length, left = std::min(count, row_length - column);
    count -= left;
    for (std::int64_t block = column / column_block_; left > 0; ++block) {  // values of one scale
      const std::int64_t n = std::min(left, (block + 1) * column_block_ - column);
      const double scale = scale_at(scale_row * scale_columns_ + block);
      if (two_a_byte()) {
        double scaled[16];
        for (int code = 0; code < 16; ++code) scaled[code] = table[code] * scale;
        const std::uint8_t* from = codes + first / 2;
        for (std::int64_t i = 0; i + 1 < n; i += 2, ++from) {
          out[i] = scaled[*from >> first_shift & 15];
          out[i + 1] = scaled[*from >> (4 - first_shift) & 15];
        }
        if (n % 2 != 0) out[n - 1] = scaled[*from >> first_shift & 15];
      } else {
        for (std::int64_t i = 0; i < n; ++i) out[i] = bytes[codes[first + i]] * scale;
      }
      first += n;
      column += n;
      out += n;
      left -= n;
    }
  }
}

}  // namespace moeaudit
