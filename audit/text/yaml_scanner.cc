// The scanner: indentation and simple keys become explicit tokens. A simple key is one without '?', found to be a key
// only when its ':' is seen; it must lie on one line and within 1,024 characters, which bounds the look-ahead.
#include "audit/text/yaml_scanner.h"

#include <algorithm>

#include "audit/text/utf8.h"
#include "audit/text/yaml_characters.h"

namespace moeaudit {

using yaml::in;

namespace {

/// May this character stand in a YAML stream at all? (reader.py, NON_PRINTABLE)
bool printable(std::uint32_t c) {
  return c == 0x09 || c == 0x0A || c == 0x0D || (c >= 0x20 && c <= 0x7E) || c == 0x85 || (c >= 0xA0 && c <= 0xFFFD) ||
         c >= 0x10000;
}

}  // namespace

const char* name_of(YamlToken::Kind kind) {
  using Kind = YamlToken::Kind;
  switch (kind) {
    case Kind::kStreamStart: return "the start of the file";
    case Kind::kStreamEnd: return "the end of the file";
    case Kind::kDirective: return "a % directive";
    case Kind::kDocumentStart: return "'---'";
    case Kind::kDocumentEnd: return "'...'";
    case Kind::kBlockSequenceStart: return "a list";
    case Kind::kBlockMappingStart: return "a mapping";
    case Kind::kBlockEnd: return "a line that is indented less";
    case Kind::kFlowSequenceStart: return "'['";
    case Kind::kFlowSequenceEnd: return "']'";
    case Kind::kFlowMappingStart: return "'{'";
    case Kind::kFlowMappingEnd: return "'}'";
    case Kind::kBlockEntry: return "'-'";
    case Kind::kFlowEntry: return "','";
    case Kind::kKey: return "a key";
    case Kind::kValue: return "':'";
    case Kind::kAlias: return "an alias";
    case Kind::kAnchor: return "an anchor";
    case Kind::kTag: return "a tag";
    case Kind::kScalar: return "a value";
  }
  return "?";
}

YamlScanner::YamlScanner(std::string_view text, int max_depth)
    : text_(text), max_depth_(static_cast<std::size_t>(max_depth)) {
  check_characters();
  tokens_.emplace_back();  // the start of the stream
}

void YamlScanner::fail_at(const YamlMark& mark, std::string what) {
  throw YamlFault{{mark.line + 1, mark.column(), std::move(what)}};
}

std::string YamlScanner::here() const { return describe_byte(text_, pos_); }

void YamlScanner::check_characters() {
  if (text_.starts_with("\xFF\xFE") || text_.starts_with("\xFE\xFF")) fail("UTF-16: save the file as UTF-8");
  YamlMark m;
  while (m.at < text_.size()) {
    const std::size_t n = utf8_length(text_, m.at);
    if (n == 0) fail_at(m, "not UTF-8: " + describe_byte(text_, m.at));
    if (!printable(utf8_decode(text_, m.at, n)))
      fail_at(m, "a character that YAML does not allow: " + describe_byte(text_, m.at));
    const bool line_end = text_[m.at] == '\n';
    m.at += n;
    if (line_end) m.line_start = m.at, ++m.line;
  }
}

std::size_t YamlScanner::break_length(std::size_t k) const {
  switch (at(k)) {
    case '\n': return 1;
    case '\r': return at(k + 1) == '\n' ? 2 : 1;
    case '\xC2': return at(k + 1) == '\x85' ? 2 : 0;                                                  // NEL
    case '\xE2': return at(k + 1) == '\x80' && (at(k + 2) == '\xA8' || at(k + 2) == '\xA9') ? 3 : 0;  // U+2028, U+2029
    default: return 0;
  }
}

bool YamlScanner::document_marker() const {
  const std::string_view three = text_.substr(std::min(pos_, text_.size()), 3);
  return (three == "---" || three == "...") && blank_or_end(3);
}

void YamlScanner::forward(std::size_t bytes) {
  const std::size_t end = std::min(pos_ + bytes, text_.size());
  while (pos_ < end) {
    const std::size_t line_end = break_length();
    const bool half_of_crlf = text_[pos_] == '\r' && line_end == 2;
    const std::size_t n = std::max<std::size_t>(utf8_length(text_, pos_), 1);
    const bool byte_order_mark = text_.substr(pos_, 3) == "\xEF\xBB\xBF";
    pos_ += n;
    ++index_;
    if (line_end > 0 && !half_of_crlf) {
      ++line_;
      column_ = 0;
      line_start_ = pos_;
    } else if (!byte_order_mark) {
      ++column_;
    }
  }
}

const YamlToken& YamlScanner::peek() {
  while (need_more()) fetch();
  return tokens_.front();  // never empty: the end of the stream is never taken twice
}

YamlToken YamlScanner::take() {
  peek();
  if (tokens_.front().kind == Kind::kStreamEnd) return tokens_.front();
  YamlToken token = std::move(tokens_.front());
  tokens_.pop_front();
  ++tokens_taken_;
  return token;
}

bool YamlScanner::need_more() {
  if (done_) return false;
  if (tokens_.empty()) return true;
  drop_stale_keys();
  // The next token may be a simple key; only its ':' will tell.
  return std::any_of(keys_.begin(), keys_.end(),
                     [&](const auto& key) { return key && key->token_number == tokens_taken_; });
}

void YamlScanner::fetch() {
  skip_to_token();
  drop_stale_keys();
  unwind_indent(column_);
  const char c = at();
  if (c == '\0') return fetch_stream_end();
  if (column_ == 0) {
    if (c == '%') return fetch_directive();
    if (document_marker()) return fetch_document_indicator(c == '-' ? Kind::kDocumentStart : Kind::kDocumentEnd);
  }
  fetch_indicator(c);
}

void YamlScanner::fetch_indicator(char c) {
  switch (c) {
    case '[': return fetch_flow_start(Kind::kFlowSequenceStart);
    case '{': return fetch_flow_start(Kind::kFlowMappingStart);
    case ']': return fetch_flow_end(Kind::kFlowSequenceEnd);
    case '}': return fetch_flow_end(Kind::kFlowMappingEnd);
    case ',': return fetch_flow_entry();
    case '-':
      if (blank_or_end(1)) return fetch_block_entry();
      break;
    case '?':
      if (flow_level_ > 0 || blank_or_end(1)) return fetch_key();
      break;
    case ':':
      if (flow_level_ > 0 || blank_or_end(1)) return fetch_value();
      break;
    case '*': save_key(); return fetch_scalar(scan_anchor(Kind::kAlias));
    case '&': save_key(); return fetch_scalar(scan_anchor(Kind::kAnchor));
    case '!': save_key(); return fetch_scalar(scan_tag());
    case '\'':
    case '"': save_key(); return fetch_scalar(scan_quoted(c));
    case '|':
    case '>':
      if (flow_level_ > 0) break;
      remove_key();
      allow_key_ = true;
      tokens_.push_back(scan_block_scalar(c == '>'));
      return;
    default: break;
  }
  if (!plain_starts_here()) {
    if (c == '\t') fail("a tab where YAML wants spaces");
    if (c == '@' || c == '`') fail("a value cannot start with " + here() + ": quote it");
    fail("a value cannot start with " + here());
  }
  save_key();
  allow_key_ = false;
  tokens_.push_back(scan_plain());  // may allow a simple key again
}

/// A plain scalar starts with any character that is no indicator; '-', and outside of flow collections '?' and ':',
/// too if no blank follows.
bool YamlScanner::plain_starts_here() const {
  const char c = at();
  if (!blank_or_end() && !in("-?:,[]{}#&*!|>'\"%@`", c)) return true;
  return !blank_or_end(1) && (c == '-' || (flow_level_ == 0 && (c == '?' || c == ':')));
}

void YamlScanner::add(Kind kind, std::size_t bytes) {
  YamlToken token;
  token.kind = kind;
  token.mark = mark();
  forward(bytes);
  tokens_.push_back(std::move(token));
}

void YamlScanner::fetch_scalar(YamlToken token) {
  allow_key_ = false;
  tokens_.push_back(std::move(token));
}

void YamlScanner::fetch_stream_end() {
  unwind_indent(-1);
  remove_key();
  allow_key_ = false;
  for (auto& key : keys_) key.reset();
  add(Kind::kStreamEnd, 0);
  done_ = true;
}

void YamlScanner::fetch_directive() {
  unwind_indent(-1);
  remove_key();
  allow_key_ = false;
  tokens_.push_back(scan_directive());
}

void YamlScanner::fetch_document_indicator(Kind kind) {
  unwind_indent(-1);
  remove_key();
  allow_key_ = false;
  add(kind, 3);
}

void YamlScanner::fetch_flow_start(Kind kind) {
  save_key();
  if (flow_level_ + 1 > max_depth_) fail("nested deeper than " + std::to_string(max_depth_) + " levels");
  ++flow_level_;
  keys_.resize(std::max(keys_.size(), flow_level_ + 1));
  allow_key_ = true;
  add(kind, 1);
}

void YamlScanner::fetch_flow_end(Kind kind) {
  if (flow_level_ == 0) fail(here() + " closes nothing");
  remove_key();
  --flow_level_;
  allow_key_ = false;
  add(kind, 1);
}

void YamlScanner::fetch_flow_entry() {
  allow_key_ = true;
  remove_key();
  add(Kind::kFlowEntry, 1);
}

void YamlScanner::fetch_block_entry() {
  if (flow_level_ == 0) {
    if (!allow_key_) fail("a list entry '- ' cannot stand here: put it on a line of its own");
    if (add_indent(column_)) add(Kind::kBlockSequenceStart, 0);
  }
  allow_key_ = true;
  remove_key();
  add(Kind::kBlockEntry, 1);
}

void YamlScanner::fetch_key() {
  if (flow_level_ == 0) {
    if (!allow_key_) fail("a '?' key cannot stand here");
    if (add_indent(column_)) add(Kind::kBlockMappingStart, 0);
  }
  allow_key_ = flow_level_ == 0;
  remove_key();
  add(Kind::kKey, 1);
}

void YamlScanner::fetch_value() {
  std::optional<SimpleKey>& saved = keys_[flow_level_];
  if (saved) {
    const SimpleKey key = *saved;
    saved.reset();
    const auto place = static_cast<std::ptrdiff_t>(key.token_number - tokens_taken_);
    YamlToken token;
    token.mark = key.mark;
    token.kind = Kind::kKey;
    tokens_.insert(tokens_.begin() + place, token);
    if (flow_level_ == 0 && add_indent(key.column)) {
      token.kind = Kind::kBlockMappingStart;
      tokens_.insert(tokens_.begin() + place, token);
    }
    allow_key_ = false;  // no two simple keys one after another
  } else {
    if (flow_level_ == 0) {
      if (!allow_key_) fail("a second ': ' in this line, or one after a value: quote the text, or start a new line");
      if (add_indent(column_)) add(Kind::kBlockMappingStart, 0);
    }
    allow_key_ = flow_level_ == 0;
    remove_key();
  }
  add(Kind::kValue, 1);
}

// --- simple keys and indentation ------------------------------------------------------------------------------------

void YamlScanner::drop_stale_keys() {
  for (auto& key : keys_) {
    if (!key || (key->mark.line == line_ && index_ - key->index <= 1024)) continue;
    if (key->required) fail_at(key->mark, "a key without its ':' (a key must be on one line, within 1024 characters)");
    key.reset();
  }
}

void YamlScanner::save_key() {
  const bool required = flow_level_ == 0 && indent_ == column_;
  if (!allow_key_) return;
  remove_key();
  keys_[flow_level_] = SimpleKey{tokens_taken_ + tokens_.size(), index_, column_, required, mark()};
}

void YamlScanner::remove_key() {
  std::optional<SimpleKey>& key = keys_[flow_level_];
  if (key && key->required) fail_at(key->mark, "a key without its ':'");
  key.reset();
}

void YamlScanner::unwind_indent(long column) {
  if (flow_level_ > 0) return;  // indentation means nothing inside brackets
  while (indent_ > column) {
    indent_ = indents_.back();
    indents_.pop_back();
    add(Kind::kBlockEnd, 0);
  }
}

bool YamlScanner::add_indent(long column) {
  if (indent_ >= column) return false;
  if (indents_.size() + 1 > max_depth_) fail("nested deeper than " + std::to_string(max_depth_) + " levels");
  indents_.push_back(indent_);
  indent_ = column;
  return true;
}

// --- between tokens -------------------------------------------------------------------------------------------------

void YamlScanner::skip_comment() {
  if (at() != '#') return;
  while (!break_or_end()) forward(1);
}

void YamlScanner::skip_to_token() {
  if (pos_ == 0 && text_.starts_with("\xEF\xBB\xBF")) forward(3);
  for (;;) {
    while (at() == ' ') forward(1);
    skip_comment();
    if (break_length() == 0) return;
    line_break();
    if (flow_level_ == 0) allow_key_ = true;
  }
}

/// A line break as it counts in a scalar: "\n", or the two Unicode separators as they are.
std::string YamlScanner::line_break() {
  const std::size_t n = break_length();
  if (n == 0) return "";
  std::string text = n == 3 ? std::string(text_.substr(pos_, 3)) : "\n";
  forward(n);
  return text;
}

void YamlScanner::rest_of_line(const char* what) {
  while (at() == ' ') forward(1);
  skip_comment();
  if (!break_or_end()) fail(std::string("after ") + what + " only a comment may follow, found " + here());
  line_break();
}

}  // namespace moeaudit
