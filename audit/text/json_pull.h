// A pull parser for JSON: one pass, no tree, no allocation per value. The safetensors header reader (94,000 tensors,
// 13 MB) and parse_json() in text.h are both written on it, so there is one grammar in the project.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "audit/text/text.h"

namespace moeaudit {

class JsonPull {
 public:
  enum class Token : std::uint8_t {
    kObjectBegin,
    kObjectEnd,
    kArrayBegin,
    kArrayEnd,
    kKey,
    kString,
    kNumber,
    kTrue,
    kFalse,
    kNull,
    kEnd,
    kError
  };
  JsonPull(std::string_view text, int max_depth = 64);

  Token next();                   // kEnd after the one top-level value; kError is sticky
  std::string_view text() const;  // key or string, escapes decoded (valid until next()); number as written
  bool decoded() const;           // text() had escapes and lies in the parser's own memory, not in the input
  std::size_t offset() const;     // byte offset of the token
  int line() const;               // computed when asked: costs a scan since the last call
  int column() const;
  const TextError& error() const;
  bool skip();  // after kObjectBegin/kArrayBegin (or kKey): skips the whole value; false on error

 private:
  enum class Expect : std::uint8_t { kValue, kValueOrClose, kKey, kKeyOrClose, kAfterValue, kFinished };
  Token fail(std::size_t at, std::string what);
  char here() const { return pos_ < text_.size() ? text_[pos_] : '\0'; }  // a NUL in the text is refused anyway
  void skip_space();
  Token end();
  Token value(char c);
  Token key();
  Token open_container(char c);
  Token close_container(char c);
  Token literal(std::string_view word, Token token);
  Token unexpected(std::string_view wanted);
  bool string();
  bool string_tail(std::size_t begin);
  bool escape();
  Token number();
  void locate(std::size_t offset) const;

  std::string_view text_;
  std::size_t pos_ = 0, token_offset_ = 0;
  std::string_view token_;
  std::string scratch_;  // a string that had escapes, decoded
  std::string stack_;    // '{' or '[' per open container
  int max_depth_;
  Expect expect_ = Expect::kValue;
  bool failed_ = false, after_comma_ = false;
  TextError error_;
  mutable std::size_t line_offset_ = 0, line_start_ = 0;  // line_ is right for line_offset_
  mutable int line_ = 1;
};

}  // namespace moeaudit
