// The safetensors header: JSON of {"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {string: string}}.
#include "audit/tensors/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "audit/tensors/huge_pages.h"
#include "audit/text/json_pull.h"

namespace moeaudit {
namespace {

using Token = JsonPull::Token;

constexpr int kMaxDepth = 8;  // the format needs 3; keys that are not of the format may nest a little
constexpr std::size_t kMaxFaults = 20;
constexpr std::size_t kMaxDimensions = 64;  // PyTorch's limit; without one, a header of zeros would take gigabytes

struct NamedDType {
  std::string_view text;
  DTypeInfo info;
};
// safetensors 0.8, tensor.rs, enum Dtype. The two FNUZ types have a size, and no reader here.
constexpr NamedDType kDTypes[] = {
    {"BF16", {DType::kBF16, 16}},
    {"F32", {DType::kF32, 32}},
    {"F16", {DType::kF16, 16}},
    {"F8_E4M3", {DType::kF8E4M3, 8}},
    {"F8_E5M2", {DType::kF8E5M2, 8}},
    {"F8_E8M0", {DType::kF8E8M0, 8}},
    {"U8", {DType::kU8, 8}},
    {"I8", {DType::kI8, 8}},
    {"F4", {DType::kF4, 4}},
    {"F6_E2M3", {DType::kF6E2M3, 6}},
    {"F6_E3M2", {DType::kF6E3M2, 6}},
    {"I16", {DType::kI16, 16}},
    {"U16", {DType::kU16, 16}},
    {"I32", {DType::kI32, 32}},
    {"U32", {DType::kU32, 32}},
    {"I64", {DType::kI64, 64}},
    {"U64", {DType::kU64, 64}},
    {"F64", {DType::kF64, 64}},
    {"BOOL", {DType::kBool, 8}},
    {"C64", {DType::kC64, 64}},
    {"F8_E4M3FNUZ", {DType::kUnknown, 8}},
    {"F8_E5M2FNUZ", {DType::kUnknown, 8}},
};

std::string number(std::int64_t v) { return std::to_string(v); }

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size() && i < 8; ++i) text += (i ? ", " : "") + number(shape[i]);
  return text + (shape.size() > 8 ? ", ...]" : "]");
}

/// Digits only, up to 2^63 - 1. (from_chars would take "-0", and takes three times as long.)
bool whole_number(std::string_view text, std::int64_t* value) {
  std::uint64_t v = 0;
  for (const char c : text) {
    if (c < '0' || c > '9' || v > (std::uint64_t{1} << 63) / 10) return false;
    v = v * 10 + static_cast<std::uint64_t>(c - '0');
  }
  *value = static_cast<std::int64_t>(v);
  return v < std::uint64_t{1} << 63;
}

/// Collects faults up to a bound, and then only counts: a file can have as many as it has tensors.
class Faults {
 public:
  explicit Faults(std::vector<SafetensorsFault>* out) : out_(out) {}
  void add(std::int64_t offset, std::string_view tensor, std::string what) {
    if (out_->size() < kMaxFaults)
      out_->push_back({offset, std::string(tensor), std::move(what)});
    else
      ++more_;
  }
  void close() {
    if (more_ > 0) out_->push_back({-1, "", "and " + number(more_) + " more faults in this header"});
  }

 private:
  std::vector<SafetensorsFault>* out_;
  std::int64_t more_ = 0;
};

class HeaderParser {
 public:
  HeaderParser(std::string_view text, std::int64_t file_size)
      : pull_(text, kMaxDepth),
        data_begin_(8 + static_cast<std::int64_t>(text.size())),
        file_size_(file_size),
        faults_(&header_.faults) {
    header_.tensors.reserve(text.size() / 120);  // an entry takes about 130 bytes; only a guess
    header_.shapes.reserve(text.size() / 60);
    prefer_huge_pages(header_.tensors.data(), header_.tensors.capacity() * sizeof(SafetensorsTensor));
  }

  SafetensorsHeader parse() {
    if (!entries()) {
      header_.tensors.clear();
    } else {
      auto& tensors = header_.tensors;
      if (!std::is_sorted(tensors.begin(), tensors.end(), before)) std::sort(tensors.begin(), tensors.end(), before);
      check_layout();
    }
    faults_.close();
    return std::move(header_);
  }

 private:
  static bool before(const SafetensorsTensor& a, const SafetensorsTensor& b) {
    if (a.begin != b.begin) return a.begin < b.begin;
    if (a.end != b.end) return a.end < b.end;
    return a.at < b.at;
  }

  std::int64_t here() const { return 8 + static_cast<std::int64_t>(pull_.offset()); }

  bool broken() {
    const TextError& e = pull_.error();
    const std::string place = "line " + number(e.line) + ", column " + number(e.column);
    faults_.add(here(), "", "the header is not JSON (" + place + " of the header): " + e.what);
    return false;
  }

  /// False if the header as a whole cannot be used.
  bool entries() {
    const Token first = pull_.next();
    if (first == Token::kError) return broken();
    if (first != Token::kObjectBegin) {
      faults_.add(here(), "", "the header is not a JSON object of tensors");
      return false;
    }
    for (;;) {
      const Token token = pull_.next();
      if (token == Token::kObjectEnd) break;
      if (token != Token::kKey) return broken();
      if (!(pull_.text() == "__metadata__" ? metadata() : tensor())) return broken();
    }
    return pull_.next() == Token::kEnd || broken();
  }

  bool metadata() {
    const Token token = pull_.next();
    if (token == Token::kNull) return true;
    if (token != Token::kObjectBegin) {
      if (token != Token::kError) faults_.add(here(), "", "__metadata__ is not a JSON object of strings");
      return rest_of_value(token);
    }
    for (;;) {
      const Token key = pull_.next();
      if (key == Token::kObjectEnd) return true;
      if (key != Token::kKey) return false;
      const Token value = pull_.next();
      if (value == Token::kString) continue;
      if (value != Token::kError) faults_.add(here(), "", "__metadata__ has a value that is not a string");
      if (!rest_of_value(value)) return false;
    }
  }

  bool rest_of_value(Token token) {
    if (token == Token::kObjectBegin || token == Token::kArrayBegin) return pull_.skip();
    return token != Token::kError;
  }

  struct Fields {
    bool dtype = false, shape = false, offsets = false;
    std::string wrong;  // first thing wrong with the entry itself
  };

  bool tensor() {
    SafetensorsTensor t;
    t.at = here();
    t.name = keep(pull_.text());
    t.shape_begin = header_.shapes.size();
    const Token token = pull_.next();
    if (token != Token::kObjectBegin) {
      if (token != Token::kError) faults_.add(t.at, t.name, "its entry is not a JSON object");
      return rest_of_value(token);
    }
    Fields fields;
    for (;;) {
      const Token key = pull_.next();
      if (key == Token::kObjectEnd) break;
      if (key != Token::kKey || !field(&t, &fields)) return false;
    }
    finish(t, fields);
    return true;
  }

  /// A name written without escapes stays where it is, in the header text.
  std::string_view keep(std::string_view name) {
    return pull_.decoded() ? std::string_view(header_.decoded.emplace_back(name)) : name;
  }

  bool field(SafetensorsTensor* t, Fields* fields) {
    const std::string_view key = pull_.text();
    if (key == "dtype") {
      const Token token = pull_.next();
      note_if(fields->dtype, "dtype is there twice", fields);
      fields->dtype = true;
      note_if(token != Token::kString, "dtype is not a string", fields);
      if (token != Token::kString) return rest_of_value(token);
      t->dtype_text = keep(pull_.text());
      return true;
    }
    if (key == "shape") {
      note_if(fields->shape, "shape is there twice", fields);
      fields->shape = true;
      t->shape_begin = header_.shapes.size();
      const bool ok = integers(&header_.shapes, "shape", fields);
      t->shape_size = header_.shapes.size() - t->shape_begin;
      return ok;
    }
    if (key == "data_offsets") {
      note_if(fields->offsets, "data_offsets is there twice", fields);
      fields->offsets = true;
      offsets_.clear();
      if (!integers(&offsets_, "data_offsets", fields)) return false;
      note_if(offsets_.size() != 2, "data_offsets has not two numbers", fields);
      if (offsets_.size() == 2) t->begin = offsets_[0], t->end = offsets_[1];
      return true;
    }
    return rest_of_value(pull_.next());  // the library ignores other keys, too
  }

  static void note_if(bool wrong, const char* what, Fields* fields) {
    if (wrong && fields->wrong.empty()) fields->wrong = what;
  }

  bool integers(std::vector<std::int64_t>* out, const char* key, Fields* fields) {
    const std::size_t begin = out->size();
    const Token first = pull_.next();
    if (first != Token::kArrayBegin) {
      if (fields->wrong.empty()) fields->wrong = std::string(key) + " is not a list";
      return rest_of_value(first);
    }
    for (;;) {
      const Token token = pull_.next();
      if (token == Token::kArrayEnd) return true;
      if (token == Token::kError) return false;
      std::int64_t value = 0;
      const bool good = token == Token::kNumber && whole_number(pull_.text(), &value);
      if (!good && fields->wrong.empty()) {
        fields->wrong = std::string(key) + " has a value that is not a whole number from 0 to 2^63 - 1";
      }
      if (out->size() - begin < kMaxDimensions) {
        out->push_back(good ? value : 0);
      } else if (fields->wrong.empty()) {
        fields->wrong = std::string(key) + " has more than " + std::to_string(kMaxDimensions) + " values";
      }
      if (!rest_of_value(token)) return false;
    }
  }

  /// Checks what can be checked of one entry, turns its offsets into places of the file, and keeps it if it is sound.
  void finish(SafetensorsTensor t, const Fields& fields) {
    std::string wrong = fields.wrong;
    if (wrong.empty() && !(fields.dtype && fields.shape && fields.offsets)) {
      wrong = std::string("its entry has no ") + (!fields.dtype ? "dtype" : !fields.shape ? "shape" : "data_offsets");
    }
    if (wrong.empty() && t.begin > t.end) {
      wrong = "data_offsets run backwards: " + number(t.begin) + " to " + number(t.end);
    }
    if (wrong.empty()) {
      const DTypeInfo info = dtype_info(t.dtype_text);
      t.dtype = info.dtype;
      wrong = size_fault(t, info.bits);
    }
    if (wrong.empty() && t.end > std::numeric_limits<std::int64_t>::max() - data_begin_) {
      wrong = "data_offsets end at " + number(t.end) + ", beyond any file";
    }
    if (!wrong.empty()) {
      faults_.add(t.at, t.name, std::move(wrong));
      entry_dropped_ = true;
      return;
    }
    t.begin += data_begin_;
    t.end += data_begin_;
    header_.tensors.push_back(t);
  }

  /// Empty if shape x dtype takes exactly the bytes of data_offsets. Of an unknown dtype only the product is checked.
  std::string size_fault(const SafetensorsTensor& t, int bits) const {
    const std::span<const std::int64_t> shape = header_.shape(t);
    std::uint64_t product = bits == 0 ? 1 : static_cast<std::uint64_t>(bits);
    for (const std::int64_t extent : shape) {
      if (__builtin_mul_overflow(product, static_cast<std::uint64_t>(extent), &product)) {
        return "the size of shape " + shape_text(shape) + " in " + std::string(t.dtype_text) + " overflows 64 bits";
      }
    }
    if (bits == 0) return "";
    if (product % 8 == 0 && product / 8 == static_cast<std::uint64_t>(t.end - t.begin)) return "";
    const std::string what = "shape " + shape_text(shape) + " in " + std::string(t.dtype_text);
    if (product % 8 != 0) return what + " does not end on a byte";
    return what + " takes " + std::to_string(product / 8) + " bytes, data_offsets give " + number(t.end - t.begin);
  }

  /// The tensors, in order of begin, must cover the data exactly. Those beyond the end of the file are dropped.
  void check_layout() {
    std::int64_t covered = data_begin_, beyond = 0, last_end = data_begin_;
    const SafetensorsTensor* owner = nullptr;  // of the byte before `covered`
    const SafetensorsTensor* first_beyond = nullptr;
    for (const SafetensorsTensor& t : header_.tensors) {
      if (t.begin < covered && !(owner && owner->name == t.name)) {
        faults_.add(t.begin, t.name, "its data overlaps that of " + std::string(owner ? owner->name : "the header"));
      } else if (t.begin > covered && !entry_dropped_) {  // a dropped entry leaves a hole that is no second fault
        faults_.add(covered, "", "a hole of " + number(t.begin - covered) + " bytes before " + std::string(t.name));
      }
      if (t.end > covered) covered = t.end, owner = &t;
      if (t.end > file_size_) {
        if (!first_beyond) first_beyond = &t;
        ++beyond;
      }
      last_end = std::max(last_end, t.end);
    }
    if (beyond > 0) {
      faults_.add(file_size_, first_beyond->name,
                  "the file is cut short: it has " + number(file_size_) + " bytes, its header describes " +
                      number(last_end) + "; " + number(beyond) +
                      " tensors reach beyond the end, this one is the first");
      std::erase_if(header_.tensors, [&](const auto& t) { return t.end > file_size_; });
    } else if (last_end < file_size_ && !entry_dropped_) {
      faults_.add(last_end, "", number(file_size_ - last_end) + " bytes after the last tensor belong to none");
    }
  }

  JsonPull pull_;
  std::int64_t data_begin_, file_size_;
  SafetensorsHeader header_;
  Faults faults_;
  std::vector<std::int64_t> offsets_;
  bool entry_dropped_ = false;
};

}  // namespace

DTypeInfo dtype_info(std::string_view text) {
  for (const NamedDType& row : kDTypes) {
    if (row.text == text) return row.info;
  }
  return {};
}

std::int64_t safetensors_header_length(std::string_view start, std::int64_t file_size,
                                       std::vector<SafetensorsFault>* faults) {
  const auto refuse = [&](std::string what) {
    faults->push_back({0, "", std::move(what)});
    return std::int64_t{-1};
  };
  if (start.starts_with("version https://git-lfs")) {
    return refuse("this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`");
  }
  if (file_size < 8 || start.size() < 8) {
    return refuse("the file has " + number(file_size) + " bytes; a safetensors file has 8 or more");
  }
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(start[static_cast<std::size_t>(i)]);
  if (length > static_cast<std::uint64_t>(file_size - 8)) {
    return refuse("header length " + std::to_string(length) + " exceeds the file size " + number(file_size) +
                  (length >> 48 ? ": not a safetensors file" : ""));
  }
  if (length > static_cast<std::uint64_t>(kMaxSafetensorsHeader)) {
    return refuse("header length " + std::to_string(length) + " is over the format's limit of " +
                  number(kMaxSafetensorsHeader));
  }
  return static_cast<std::int64_t>(length);
}

SafetensorsHeader parse_safetensors_header(std::string_view text, std::int64_t file_size) {
  return HeaderParser(text, file_size).parse();
}

}  // namespace moeaudit
