#include "audit/traces/npy.h"

#include <array>
#include <utility>

#include "audit/tensors/tensor_store.h"

namespace moeaudit {
namespace {

constexpr std::array<std::pair<std::string_view, DType>, 9> kDTypes = {{{"|u1", DType::kU8},
                                                                        {"|i1", DType::kI8},
                                                                        {"<u2", DType::kU16},
                                                                        {"<i2", DType::kI16},
                                                                        {"<u4", DType::kU32},
                                                                        {"<i4", DType::kI32},
                                                                        {"<u8", DType::kU64},
                                                                        {"<i8", DType::kI64},
                                                                        {"|b1", DType::kBool}}};

/// The Python dict of the header: {'descr': '<i2', 'fortran_order': False, 'shape': (3, 4), }
class HeaderText {
 public:
  explicit HeaderText(std::string_view text) : text_(text) {}

  bool parse(std::string* descr, bool* fortran, std::vector<std::int64_t>* shape) {
    if (!take('{')) return false;
    int keys = 0;
    while (!take('}')) {
      std::string key;
      if (!string(&key) || !take(':')) return false;
      const bool known = key == "descr"           ? string(descr)
                         : key == "fortran_order" ? boolean(fortran)
                         : key == "shape"         ? tuple(shape)
                                                  : false;
      if (!known) return false;
      ++keys;
      if (!take(',') && !peek('}')) return false;
    }
    return keys == 3;
  }

 private:
  void skip() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool peek(char c) {
    skip();
    return at_ < text_.size() && text_[at_] == c;
  }
  bool take(char c) {
    if (!peek(c)) return false;
    ++at_;
    return true;
  }
  bool string(std::string* out) {
    if (!peek('\'') && !peek('"')) return false;
    const char quote = text_[at_++];
    const std::size_t end = text_.find(quote, at_);
    if (end == std::string_view::npos) return false;
    *out = text_.substr(at_, end - at_);
    at_ = end + 1;
    return true;
  }
  bool boolean(bool* out) {
    skip();
    for (const bool value : {false, true}) {
      const std::string_view word = value ? "True" : "False";
      if (!text_.substr(at_).starts_with(word)) continue;
      *out = value;
      at_ += word.size();
      return true;
    }
    return false;
  }
  bool tuple(std::vector<std::int64_t>* out) {
    if (!take('(')) return false;
    while (!take(')')) {
      skip();
      std::int64_t value = 0;
      std::size_t digits = 0;
      for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_, ++digits) {
        if (digits >= 18) return false;
        value = value * 10 + (text_[at_] - '0');
      }
      if (digits == 0 || out->size() >= 32) return false;
      out->push_back(value);
      if (!take(',') && !peek(')')) return false;
    }
    return true;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

bool parse_npy_header(std::string_view start, std::int64_t file_size, NpyHeader* out, std::string* why) {
  const auto fail = [&](std::string what) {
    *why = std::move(what);
    return false;
  };
  const auto byte = [&](std::size_t i) { return static_cast<std::int64_t>(static_cast<unsigned char>(start[i])); };
  if (start.size() < 12 || !start.starts_with("\x93NUMPY")) return fail("is no .npy file");
  const std::int64_t version = byte(6);
  const std::size_t before = version == 1 ? 10 : 12;
  std::int64_t length = byte(8) | byte(9) << 8;
  if (version != 1) length |= byte(10) << 16 | byte(11) << 24;
  if (version < 1 || version > 3) return fail("is a .npy file of version " + std::to_string(version));
  out->data = static_cast<std::int64_t>(before) + length;
  if (out->data > static_cast<std::int64_t>(start.size()))
    return fail("its header of " + std::to_string(length) +
                " bytes is longer than the file or than any array of numbers needs");
  std::string descr;
  bool fortran = false;
  out->shape.clear();
  if (!HeaderText(start.substr(before, static_cast<std::size_t>(length))).parse(&descr, &fortran, &out->shape)) {
    return fail("its header is not what numpy.save writes for an array of numbers");
  }
  if (fortran) return fail("is in Fortran order");
  out->dtype = DType::kUnknown;
  for (const auto& [name, dtype] : kDTypes) {
    if (name == descr) out->dtype = dtype;
  }
  if (out->dtype == DType::kUnknown) return fail("holds values of type '" + descr.substr(0, 20) + "', not integers (of little-endian order)");
  out->bytes = size_of(out->dtype);
  for (const std::int64_t n : out->shape) {
    if (__builtin_mul_overflow(out->bytes, n, &out->bytes)) return fail("its shape overflows");
  }
  if (out->bytes > file_size - out->data) {
    return fail("needs " + std::to_string(out->bytes) + " bytes of values, the file has " +
                std::to_string(file_size - out->data));
  }
  return true;
}

}  // namespace moeaudit
