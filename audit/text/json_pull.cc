// The JSON grammar (RFC 8259, and Python's NaN, Infinity, -Infinity) as one forward pass over the bytes.
#include "audit/text/json_pull.h"

#include <bit>
#include <cstring>

#include "audit/text/utf8.h"

namespace moeaudit {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

/// Offset from `at` on of the first byte that ends a run of plain string bytes: '"', '\\', a control character or a
/// byte of a multi-byte character. Eight bytes at a time; the usual trick (x - 1) & ~x & 0x80 finds zero bytes, and it
/// is exact for the lowest one, which is the only one used.
std::size_t plain_run_end(std::string_view text, std::size_t at) {
  constexpr std::uint64_t kOnes = 0x0101010101010101u, kHigh = 0x8080808080808080u;
  if constexpr (std::endian::native == std::endian::little) {
    while (at + 8 <= text.size()) {
      std::uint64_t w;
      std::memcpy(&w, text.data() + at, 8);
      const std::uint64_t quote = w ^ (kOnes * '"'), slash = w ^ (kOnes * '\\');
      const std::uint64_t control = (w - kOnes * 0x20) & ~w;
      const std::uint64_t stop = (((quote - kOnes) & ~quote) | ((slash - kOnes) & ~slash) | control | w) & kHigh;
      if (stop) return at + static_cast<std::size_t>(std::countr_zero(stop)) / 8;
      at += 8;
    }
  }
  for (; at < text.size(); ++at) {
    const unsigned char c = static_cast<unsigned char>(text[at]);
    if (c == '"' || c == '\\' || c < 0x20 || c >= 0x80) break;
  }
  return at;
}

int hex_digit(char c) {
  if (is_digit(c)) return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

/// Four hex digits at text[at], or -1.
int hex4(std::string_view text, std::size_t at) {
  if (at + 4 > text.size()) return -1;
  int value = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    const int digit = hex_digit(text[at + i]);
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

}  // namespace

JsonPull::JsonPull(std::string_view text, int max_depth) : text_(text), max_depth_(max_depth) {}

std::string_view JsonPull::text() const { return token_; }
bool JsonPull::decoded() const { return !token_.empty() && token_.data() == scratch_.data(); }
std::size_t JsonPull::offset() const { return token_offset_; }
const TextError& JsonPull::error() const { return error_; }

int JsonPull::line() const {
  locate(token_offset_);
  return line_;
}

int JsonPull::column() const {
  locate(token_offset_);
  return static_cast<int>(token_offset_ - line_start_) + 1;
}

void JsonPull::locate(std::size_t offset) const {
  if (offset < line_offset_) {
    line_offset_ = line_start_ = 0;
    line_ = 1;
  }
  while (line_offset_ < offset) {
    const void* hit = std::memchr(text_.data() + line_offset_, '\n', offset - line_offset_);
    if (!hit) break;
    line_offset_ = line_start_ = static_cast<std::size_t>(static_cast<const char*>(hit) - text_.data()) + 1;
    ++line_;
  }
  line_offset_ = offset;
}

JsonPull::Token JsonPull::fail(std::size_t at, std::string what) {
  failed_ = true;
  locate(at);
  error_ = {line_, static_cast<int>(at - line_start_) + 1, std::move(what)};
  return Token::kError;
}

void JsonPull::skip_space() {
  const char* const text = text_.data();
  std::size_t at = pos_;  // a local: the members could alias the text
  while (at < text_.size() && is_space(text[at])) ++at;
  pos_ = at;
}

JsonPull::Token JsonPull::next() {
  if (failed_) return Token::kError;
  skip_space();
  token_ = {};
  token_offset_ = pos_;
  if (expect_ == Expect::kAfterValue) {
    after_comma_ = false;
    if (stack_.empty()) return end();
    const bool in_object = stack_.back() == '{';
    const char c = here();
    if (c == (in_object ? '}' : ']')) return close_container(c);
    if (c != ',') return unexpected(in_object ? "',' or '}'" : "',' or ']'");
    ++pos_;
    skip_space();
    token_offset_ = pos_;
    after_comma_ = true;
    expect_ = in_object ? Expect::kKey : Expect::kValue;
  }
  const char c = here();
  const bool at_end = pos_ >= text_.size();
  switch (expect_) {
    case Expect::kValue: return at_end ? unexpected("a value") : value(c);
    case Expect::kValueOrClose:
      if (c == ']') return close_container(c);
      return at_end ? unexpected("a value or ']'") : value(c);
    case Expect::kKeyOrClose:
      if (c == '}') return close_container(c);
      return c == '"' ? key() : unexpected("a key in double quotes or '}'");
    case Expect::kKey: return c == '"' ? key() : unexpected("a key in double quotes");
    case Expect::kAfterValue:
    case Expect::kFinished: break;
  }
  return Token::kEnd;
}

JsonPull::Token JsonPull::end() {
  if (pos_ < text_.size()) {
    return fail(pos_, "text after the end of the JSON value, from " + describe_byte(text_, pos_) + " on");
  }
  expect_ = Expect::kFinished;
  return Token::kEnd;
}

JsonPull::Token JsonPull::value(char c) {
  expect_ = Expect::kAfterValue;
  switch (c) {
    case '{':
    case '[': return open_container(c);
    case '"': return string() ? Token::kString : Token::kError;
    case 't': return literal("true", Token::kTrue);
    case 'f': return literal("false", Token::kFalse);
    case 'n': return literal("null", Token::kNull);
    case 'N': return literal("NaN", Token::kNumber);
    case 'I': return literal("Infinity", Token::kNumber);
    case '-':
      if (pos_ + 1 < text_.size() && text_[pos_ + 1] == 'I') return literal("-Infinity", Token::kNumber);
      return number();
    default: return is_digit(c) ? number() : unexpected("a value");
  }
}

JsonPull::Token JsonPull::key() {
  if (!string()) return Token::kError;
  skip_space();
  if (here() != ':') {
    return fail(pos_, "expected ':' after the key, found " + describe_byte(text_, pos_));
  }
  ++pos_;
  expect_ = Expect::kValue;
  after_comma_ = false;
  return Token::kKey;
}

JsonPull::Token JsonPull::open_container(char c) {
  if (stack_.size() >= static_cast<std::size_t>(max_depth_)) {
    return fail(pos_, "nested deeper than " + std::to_string(max_depth_) + " levels");
  }
  stack_.push_back(c);
  ++pos_;
  after_comma_ = false;
  expect_ = c == '{' ? Expect::kKeyOrClose : Expect::kValueOrClose;
  return c == '{' ? Token::kObjectBegin : Token::kArrayBegin;
}

JsonPull::Token JsonPull::close_container(char c) {
  stack_.pop_back();
  ++pos_;
  expect_ = Expect::kAfterValue;
  return c == '}' ? Token::kObjectEnd : Token::kArrayEnd;
}

JsonPull::Token JsonPull::literal(std::string_view word, Token token) {
  if (text_.substr(pos_, word.size()) != word) return unexpected("a value");
  token_ = text_.substr(pos_, word.size());
  pos_ += word.size();
  return token;
}

/// Says what was wanted and what is there, and names the mistakes that people and Python's str() make.
JsonPull::Token JsonPull::unexpected(std::string_view wanted) {
  const std::string_view rest = text_.substr(pos_);
  const auto starts = [&](std::string_view word) { return rest.substr(0, word.size()) == word; };
  std::string hint;
  if (rest.empty() && text_.find_first_not_of(" \n\t\r") == std::string_view::npos) {
    return fail(pos_, "no JSON value: the text is empty");
  }
  if (pos_ == 0 && starts("\xEF\xBB\xBF")) {
    return fail(pos_, "starts with a UTF-8 byte order mark; save it as UTF-8 without one");
  }
  if (pos_ == 0 && (starts("\xFF\xFE") || starts("\xFE\xFF"))) {
    return fail(pos_, "starts with a UTF-16 byte order mark; save it as UTF-8");
  }
  if (after_comma_ && (starts("}") || starts("]")))
    hint = ": a comma before it is one too many";
  else if (starts("'"))
    hint = ": JSON strings are in double quotes";
  else if (starts("//") || starts("/*") || starts("#"))
    hint = ": JSON has no comments";
  else if (starts("True") || starts("False") || starts("None"))
    hint = ": JSON writes true, false, null";
  else if (starts("nan") || starts("inf"))
    hint = ": Python's json writes NaN and Infinity";
  return fail(pos_, "expected " + std::string(wanted) + ", found " + describe_byte(text_, pos_) + hint);
}

bool JsonPull::string() {
  const std::size_t begin = pos_ + 1;
  pos_ = plain_run_end(text_, begin);
  if (pos_ < text_.size() && text_[pos_] == '"') {  // nearly every string
    token_ = text_.substr(begin, pos_ - begin);
    ++pos_;
    return true;
  }
  return string_tail(begin);
}

bool JsonPull::string_tail(std::size_t begin) {
  bool copied = false;
  for (std::size_t run = begin;;) {
    if (pos_ >= text_.size()) {
      fail(token_offset_, "string without its closing quote");
      return false;
    }
    const unsigned char c = static_cast<unsigned char>(text_[pos_]);
    if (c >= 0x80) {
      const std::size_t n = utf8_length(text_, pos_);
      if (n == 0) {
        fail(pos_, "not UTF-8: " + describe_byte(text_, pos_) + " in a string");
        return false;
      }
      pos_ += n;
    } else if (c < 0x20) {
      fail(pos_, "control character in a string (" + describe_byte(text_, pos_) + "): write it as an escape");
      return false;
    } else {  // '"' or '\\'
      if (c == '"' && !copied) {
        token_ = text_.substr(begin, pos_ - begin);
        ++pos_;
        return true;
      }
      if (!copied) scratch_.clear();
      copied = true;
      scratch_.append(text_, run, pos_ - run);
      ++pos_;
      if (c == '"') {
        token_ = scratch_;
        return true;
      }
      if (!escape()) return false;
      run = pos_;
    }
    pos_ = plain_run_end(text_, pos_);
  }
}

/// pos_ is behind the backslash. Half a surrogate pair is refused: Python would make a string that is not text.
bool JsonPull::escape() {
  const char c = pos_ < text_.size() ? text_[pos_] : '\0';
  constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
  if (const std::size_t i = kNames.find(c); c != '\0' && i != std::string_view::npos) {
    scratch_.push_back(kValues[i]);
    ++pos_;
    return true;
  }
  if (c != 'u') {
    fail(pos_ - 1, "unknown escape: a backslash before " + describe_byte(text_, pos_));
    return false;
  }
  const int unit = hex4(text_, pos_ + 1);
  if (unit < 0) {
    fail(pos_ - 1, "\\u needs four hexadecimal digits");
    return false;
  }
  std::uint32_t code_point = static_cast<std::uint32_t>(unit);
  std::size_t length = 5;
  if (unit >= 0xD800 && unit <= 0xDFFF) {
    const bool pair = text_.substr(pos_ + 5, 2) == "\\u";
    const int low = pair ? hex4(text_, pos_ + 7) : -1;
    if (unit >= 0xDC00 || low < 0xDC00 || low > 0xDFFF) {
      fail(pos_ - 1, "half a surrogate pair (\\" + std::string(text_.substr(pos_, 5)) + "): not a character");
      return false;
    }
    code_point = 0x10000 + ((code_point - 0xD800) << 10) + (static_cast<std::uint32_t>(low) - 0xDC00);
    length = 11;
  }
  utf8_append(code_point, &scratch_);
  pos_ += length;
  return true;
}

JsonPull::Token JsonPull::number() {
  const char* const text = text_.data();
  const std::size_t size = text_.size();
  std::size_t at = pos_;
  const auto digits = [&] {
    const std::size_t begin = at;
    while (at < size && is_digit(text[at])) ++at;
    return at - begin;
  };
  const auto is = [&](char c) { return at < size && text[at] == c; };
  const auto no_digit = [&](const char* where) {
    return fail(at, std::string("expected a digit ") + where + ", found " + describe_byte(text_, at));
  };
  if (is('-')) ++at;
  const std::size_t first = at;
  const std::size_t whole = digits();
  if (whole == 0) return no_digit("after '-'");
  if (whole > 1 && text[first] == '0') return fail(token_offset_, "a number must not start with a zero");
  if (is('.')) {
    ++at;
    if (digits() == 0) return no_digit("after '.'");
  }
  if (is('e') || is('E')) {
    ++at;
    if (is('+') || is('-')) ++at;
    if (digits() == 0) return no_digit("in the exponent");
  }
  pos_ = at;
  token_ = text_.substr(token_offset_, at - token_offset_);
  return Token::kNumber;
}

bool JsonPull::skip() {
  const bool after_key = expect_ == Expect::kValue;
  std::size_t depth = stack_.size();
  if (!after_key) --depth;
  do {
    const Token token = next();
    if (token == Token::kError || token == Token::kEnd) return false;
  } while (stack_.size() > depth);
  return true;
}

}  // namespace moeaudit
