#include "audit/tensors/stored_values.h"

#include <algorithm>
#include <string>

#include "audit/text/text.h"

namespace moeaudit {

namespace k = kernels;

namespace {

constexpr std::int64_t kMostQuantState = 1 << 16;  // bytes of bitsandbytes' JSON; it has some hundred

bool is_value_type(DType d) { return d == DType::kF64 || d == DType::kF32 || d == DType::kBF16 || d == DType::kF16; }
bool is_float8(DType d) { return d == DType::kF8E4M3 || d == DType::kF8E5M2; }

/// Length of the blocks of which `count` cover `n`; 0 if that is no regular cut. 128 is tried first: the last block of
/// weight_scale_inv may be shorter.
std::int64_t block_length(std::int64_t n, std::int64_t count) {
  if (count == 1) return n;
  if (count == n) return 1;
  if (k::blocks_of(n, 128) == count) return 128;
  return count > 0 && n % count == 0 ? n / count : 0;
}

std::string without(std::string_view name, std::string_view end) {
  return std::string(name.substr(0, name.size() - end.size()));
}

/// Bytes are exponents.
k::ScaleType scale_type_of(DType d) {
  switch (d) {
    case DType::kF64: return k::ScaleType::kF64;
    case DType::kBF16: return k::ScaleType::kBF16;
    case DType::kF16: return k::ScaleType::kF16;
    case DType::kF8E4M3: return k::ScaleType::kE4M3;
    case DType::kU8:
    case DType::kF8E8M0: return k::ScaleType::kE8M0;
    default: return k::ScaleType::kF32;
  }
}
const std::uint8_t* codes_of(const TensorView& t) { return reinterpret_cast<const std::uint8_t*>(t.bytes.data()); }

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
  const std::int64_t scales = k::blocks_of(elements_, block);
  if (absmax->elements() < scales) return false;
  coded_ = {.codes = codes_of(*tensor_),
            .code = k::WeightCode::kTable,
            .high_half_first = true,
            .table = map->bytes.data(),
            .rows = 1,  // blocks run through the whole tensor
            .columns = elements_,
            .column_block = block,
            .scales = absmax->bytes.data()};
  side_ = {absmax, map, state};
  if (absmax->dtype == DType::kU8) {
    const TensorView* nested_absmax = store.find(name + ".nested_absmax");
    const TensorView* nested_map = store.find(name + ".nested_quant_map");
    const std::int64_t nested_block = integer("nested_blocksize");
    const Node* offset = json.find("nested_offset");
    if (!nested_absmax || !nested_map || nested_block < 1 || offset == nullptr || !offset->as_double()) return false;
    if (nested_absmax->dtype != DType::kF32 || nested_map->dtype != DType::kF32 || nested_map->elements() != 256 ||
        nested_absmax->elements() < k::blocks_of(scales, nested_block)) {
      return false;
    }
    coded_.scale_type = k::ScaleType::kNested;
    coded_.nested_map = nested_map->bytes.data();
    coded_.nested_absmax = nested_absmax->bytes.data();
    coded_.nested_block = nested_block;
    coded_.nested_offset = static_cast<float>(*offset->as_double());
    side_.push_back(nested_absmax);
    side_.push_back(nested_map);
  } else if (absmax->dtype != DType::kF32) {
    return false;
  }
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
  elements_ = 2 * bytes;
  columns_ = 2 * inner * groups;
  coded_ = {.codes = codes_of(*tensor_),
            .code = k::WeightCode::kE2M1,
            .rows = 1,
            .columns = elements_,
            .column_block = 2 * inner,
            .scales = scales->bytes.data(),
            .scale_type = scale_type_of(scales->dtype)};
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
  coded_ = {.codes = codes_of(*tensor_),
            .code = k::WeightCode::kE2M1,
            .rows = 1,
            .columns = elements_,
            .column_block = 16,
            .scales = scales->bytes.data(),
            .scale_type = scale_type_of(scales->dtype)};
  const TensorView* global = store.find(stem + "_scale_2");
  if (global != nullptr) {
    if (!one_value(global, &coded_.factor)) return false;
  } else if ((global = store.find(stem + "_global_scale")) != nullptr && !one_value(global, &coded_.divisor)) {
    return false;
  }
  if (global == nullptr) return false;
  scheme_ = "nvfp4";
  side_ = {scales, global};
  return true;
}

/// The layout of scales over matrices [rows, columns], the last two dimensions of the tensor.
bool StoredValues::lay_out(std::int64_t rows, std::int64_t columns, const TensorView& scale) {
  if (rows < 1 || columns < 1) return false;
  k::QuantisedWeights& c = coded_;
  const std::int64_t matrices = elements_ / (rows * columns), n = scale.elements();
  c.matrices = matrices, c.rows = rows, c.columns = columns;
  if (n == 1) {  // one for all: one matrix of all rows
    c.matrices = 1;
    c.rows = c.row_block = std::max<std::int64_t>(elements_ / columns, 1);
    c.column_block = columns;
    return true;
  }
  const auto shape = scale.shape;
  std::int64_t scale_rows = 1, scale_columns = 1;
  if (n == matrices) {
    scale_rows = 1;
  } else if (shape.size() == 1 && n == rows && matrices == 1) {
    scale_rows = rows;
  } else if (shape.size() >= 2 && shape.size() == tensor_->shape.size()) {
    scale_rows = shape[shape.size() - 2];
    scale_columns = shape.back();
  } else {
    return false;
  }
  c.row_block = block_length(rows, scale_rows);
  c.column_block = block_length(columns, scale_columns);
  std::int64_t expected = 0;
  return c.row_block > 0 && c.column_block > 0 &&
         !__builtin_mul_overflow(matrices, scale_rows * scale_columns, &expected) && expected == n;
}

/// Two FP4 codes in an int8, the low half first, 32 of them a scale: experts of DeepSeek-V4 in transformers
/// (5.23.0 integrations/finegrained_fp8.py, Fp8Dequantize).
bool StoredValues::try_packed_fp4(const TensorView& scales) {
  if (columns_ % 16 != 0 || scales.elements() != elements_ / 16) return false;
  scheme_ = "mxfp4";
  elements_ *= 2;
  columns_ *= 2;
  coded_ = {.codes = codes_of(*tensor_),
            .code = k::WeightCode::kE2M1,
            .rows = 1,
            .columns = elements_,
            .column_block = 32,
            .scales = scales.bytes.data(),
            .scale_type = scale_type_of(scales.dtype)};
  side_ = {&scales};
  return true;
}

bool StoredValues::try_scaled(const TensorStore& store) {
  const DType d = tensor_->dtype;
  const std::string name(tensor_->name);
  if (d == DType::kU8 || tensor_->shape.size() < 2) return false;
  elements_ = tensor_->elements();
  columns_ = tensor_->shape.back();
  const std::int64_t rows = tensor_->shape[tensor_->shape.size() - 2];
  coded_ = {.codes = codes_of(*tensor_),
            .code = d == DType::kI8       ? k::WeightCode::kInt8
                    : d == DType::kF8E4M3 ? k::WeightCode::kE4M3
                                          : k::WeightCode::kE5M2};
  for (const char* end : {"_scale_inv", "_scale"}) {
    const TensorView* scales = store.find(name + end);
    if (scales == nullptr) continue;
    if (d == DType::kI8 && scales->dtype == DType::kF8E8M0) {
      if (!try_packed_fp4(*scales)) continue;
      return true;
    }
    if (!lay_out(rows, columns_, *scales)) continue;
    const bool powers = is_float8(d) && (scales->dtype == DType::kF8E8M0 || scales->dtype == DType::kU8);  // MXFP8
    if (!powers && !is_value_type(scales->dtype)) continue;
    scheme_ = d == DType::kI8 ? "int8" : "float8";
    coded_.scales = scales->bytes.data();
    coded_.scale_type = scale_type_of(scales->dtype);
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
  coded_.matrices = coded_.row_block = 1;
  coded_.rows = rows;
  coded_.columns = coded_.column_block = columns_;
  coded_.scales = scb->bytes.data();
  coded_.divisor = 127;
  side_ = {scb};
  if (format != nullptr) side_.push_back(format);
  return true;
}

}  // namespace moeaudit
