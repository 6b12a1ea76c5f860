// YAML 1.1 text into tokens, with the reading of PyYAML 6.0's scanner.py wherever the specification leaves or took a
// choice: where a tab may stand, what ends a plain scalar in a flow collection, how long a simple key may be.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "audit/text/text.h"

namespace moeaudit {

/// Thrown inside the YAML reader only; parse_yaml() catches it.
struct YamlFault {
  TextError error;
};

struct YamlMark {
  std::size_t at = 0;          // byte
  std::size_t line_start = 0;  // byte at which its line starts
  int line = 0;                // from 0
  int column() const { return static_cast<int>(at - line_start) + 1; }
};

struct YamlToken {
  enum class Kind : std::uint8_t {
    kStreamStart,
    kStreamEnd,
    kDirective,
    kDocumentStart,
    kDocumentEnd,
    kBlockSequenceStart,
    kBlockMappingStart,
    kBlockEnd,
    kFlowSequenceStart,
    kFlowSequenceEnd,
    kFlowMappingStart,
    kFlowMappingEnd,
    kBlockEntry,
    kFlowEntry,
    kKey,
    kValue,
    kAlias,
    kAnchor,
    kTag,
    kScalar
  };
  Kind kind = Kind::kStreamStart;
  YamlMark mark;
  std::string text;    // scalar value; name of an anchor, alias or directive; suffix of a tag; prefix of %TAG
  std::string handle;  // of a tag ("" where it has none) or of %TAG
  bool has_handle = false;
  bool plain = false;     // scalar without quotes and not a block
  int major_version = 0;  // %YAML
};
const char* name_of(YamlToken::Kind kind);

class YamlScanner {
 public:
  /// `max_depth` bounds flow collections and indentation levels each.
  YamlScanner(std::string_view text, int max_depth);
  const YamlToken& peek();
  YamlToken take();

 private:
  struct SimpleKey {
    std::size_t token_number = 0, index = 0;
    long column = 0;
    bool required = false;
    YamlMark mark;
  };
  using Kind = YamlToken::Kind;

  // characters; `k` counts bytes from the current place, and '\0' is what stands at the end
  char at(std::size_t k = 0) const { return pos_ + k < text_.size() ? text_[pos_ + k] : '\0'; }
  std::size_t break_length(std::size_t k = 0) const;  // bytes of the line break there, 0 if none
  bool break_or_end(std::size_t k = 0) const { return at(k) == '\0' || break_length(k) > 0; }
  bool blank_or_end(std::size_t k = 0) const { return at(k) == ' ' || at(k) == '\t' || break_or_end(k); }
  bool space_or_end(std::size_t k = 0) const { return at(k) == ' ' || break_or_end(k); }
  bool document_marker() const;
  void forward(std::size_t bytes);
  YamlMark mark() const { return {pos_, line_start_, line_}; }
  [[noreturn]] void fail(std::string what) const { fail_at(mark(), std::move(what)); }
  [[noreturn]] static void fail_at(const YamlMark& mark, std::string what);
  std::string here() const;  // what stands here, for messages
  void check_characters();

  // tokens
  bool need_more();
  void fetch();
  void fetch_indicator(char c);
  void add(Kind kind, std::size_t bytes);
  void fetch_stream_end();
  void fetch_directive();
  void fetch_document_indicator(Kind kind);
  void fetch_flow_start(Kind kind);
  void fetch_flow_end(Kind kind);
  void fetch_flow_entry();
  void fetch_block_entry();
  void fetch_key();
  void fetch_value();
  void fetch_scalar(YamlToken token);
  bool plain_starts_here() const;

  // simple keys and indentation
  void drop_stale_keys();
  void save_key();
  void remove_key();
  void unwind_indent(long column);
  bool add_indent(long column);

  // scanning
  void skip_to_token();
  void skip_comment();
  void rest_of_line(const char* what);
  std::string line_break();
  YamlToken scan_directive();
  YamlToken scan_anchor(Kind kind);
  YamlToken scan_tag();
  std::string scan_tag_handle();
  std::string scan_tag_uri();
  std::string scan_uri_escapes();
  YamlToken scan_block_scalar(bool folded);
  void scan_block_header(int* chomping, int* increment);
  std::string block_breaks(long indent);
  YamlToken scan_quoted(char quote);
  void quoted_text(char quote, std::string* out);
  void quoted_escape(std::string* out);
  void quoted_spaces(const YamlMark& start, std::string* out);
  std::string quoted_breaks();
  YamlToken scan_plain();
  std::optional<std::string> plain_spaces();

  std::string_view text_;
  std::size_t pos_ = 0, index_ = 0, line_start_ = 0;  // index_ counts characters
  int line_ = 0;
  long column_ = 0;  // in characters, as indentation is compared
  std::size_t max_depth_;
  bool done_ = false, allow_key_ = true;
  std::size_t flow_level_ = 0, tokens_taken_ = 0;
  long indent_ = -1;
  std::vector<long> indents_;
  std::deque<YamlToken> tokens_;
  std::vector<std::optional<SimpleKey>> keys_{1};  // by flow level
};

}  // namespace moeaudit
