// The scanner: indentation and simple keys become explicit tokens. A simple key is one without '?', found to be a key
// only when its ':' is seen; it must lie on one line and within 1,024 characters, which bounds the look-ahead.
#include "audit/text/yaml_scanner.h"

#include <algorithm>

#include "audit/text/utf8.h"

namespace moeaudit {
namespace {

bool is_word(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '-' || c == '_';
}
bool in(std::string_view set, char c) { return c != '\0' && set.find(c) != std::string_view::npos; }
bool is_hex(char c) { return in("0123456789abcdefABCDEF", c); }

/// May this character stand in a YAML stream at all? (reader.py, NON_PRINTABLE)
bool printable(std::uint32_t c) {
  return c == 0x09 || c == 0x0A || c == 0x0D || (c >= 0x20 && c <= 0x7E) || c == 0x85 || (c >= 0xA0 && c <= 0xFFFD) || c >= 0x10000;
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

YamlScanner::YamlScanner(std::string_view text, int max_depth) : text_(text), max_depth_(static_cast<std::size_t>(max_depth)) {
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
    if (!printable(utf8_decode(text_, m.at, n))) fail_at(m, "a character that YAML does not allow: " + describe_byte(text_, m.at));
    const bool line_end = text_[m.at] == '\n';
    m.at += n;
    if (line_end) m.line_start = m.at, ++m.line;
  }
}

std::size_t YamlScanner::break_length(std::size_t k) const {
  switch (at(k)) {
    case '\n': return 1;
    case '\r': return at(k + 1) == '\n' ? 2 : 1;
    case '\xC2': return at(k + 1) == '\x85' ? 2 : 0;                                                         // NEL
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
  return std::any_of(keys_.begin(), keys_.end(), [&](const auto& key) { return key && key->token_number == tokens_taken_; });
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

// --- directives, anchors, tags --------------------------------------------------------------------------------------

YamlToken YamlScanner::scan_directive() {
  YamlToken token;
  token.kind = Kind::kDirective;
  token.mark = mark();
  forward(1);
  while (is_word(at())) {
    token.text.push_back(at());
    forward(1);
  }
  if (token.text.empty() || !space_or_end()) fail("a line that starts with '%' is a directive, and this one has no name: quote it");
  const std::string name = token.text;
  const auto spaces = [this] {
    while (at() == ' ') forward(1);
  };
  if (name == "YAML") {
    spaces();
    const auto number = [this] {
      int value = -1;
      for (; at() >= '0' && at() <= '9'; forward(1)) value = std::min(std::max(value, 0) * 10 + (at() - '0'), 1000);
      if (value < 0) fail("%YAML wants a version such as 1.1, found " + here());
      return value;
    };
    token.major_version = number();
    if (at() != '.') fail("%YAML wants a version such as 1.1, found " + here());
    forward(1);
    number();
    if (!space_or_end()) fail("%YAML wants a version such as 1.1, found " + here());
  } else if (name == "TAG") {
    spaces();
    token.handle = scan_tag_handle();
    if (at() != ' ') fail("%TAG wants a handle and a prefix, found " + here());
    spaces();
    token.text = scan_tag_uri();
    if (!space_or_end()) fail("%TAG wants a handle and a prefix, found " + here());
  } else {
    while (!break_or_end()) forward(1);
  }
  token.has_handle = name == "TAG";
  rest_of_line("a directive");
  return token;
}

YamlToken YamlScanner::scan_anchor(Kind kind) {
  YamlToken token;
  token.kind = kind;
  token.mark = mark();
  forward(1);
  while (is_word(at())) {
    token.text.push_back(at());
    forward(1);
  }
  const bool ended = blank_or_end() || in("?:,]}%@`", at());
  if (token.text.empty() || !ended) {
    const char* hint = kind == Kind::kAlias ? "'*' starts an alias" : "'&' starts an anchor";
    fail(std::string(hint) + ", whose name is letters, digits, '-' and '_'; found " + here() + " (quote the text if it is none)");
  }
  return token;
}

YamlToken YamlScanner::scan_tag() {
  YamlToken token;
  token.kind = Kind::kTag;
  token.mark = mark();
  if (at(1) == '<') {
    forward(2);
    token.text = scan_tag_uri();
    if (at() != '>') fail("a tag '!<' without its '>', found " + here());
    forward(1);
  } else if (blank_or_end(1)) {
    token.text = "!";
    forward(1);
  } else {
    token.has_handle = true;
    token.handle = "!";
    std::size_t k = 1;
    while (!space_or_end(k) && at(k) != '!') ++k;
    if (!space_or_end(k)) token.handle = scan_tag_handle();
    else forward(1);
    token.text = scan_tag_uri();
  }
  if (!space_or_end()) fail("a tag ends with a space, found " + here() + " (quote the text if '!' starts no tag)");
  return token;
}

std::string YamlScanner::scan_tag_handle() {
  if (at() != '!') fail("expected '!', found " + here());
  std::size_t n = 1;
  if (at(n) != ' ') {
    while (is_word(at(n))) ++n;
    if (at(n) != '!') {
      forward(n);
      fail("expected '!' at the end of a tag handle, found " + here());
    }
    ++n;
  }
  std::string handle(text_.substr(pos_, n));
  forward(n);
  return handle;
}

std::string YamlScanner::scan_tag_uri() {
  std::string uri;
  while (is_word(at()) || in(";/?:@&=+$,_.!~*'()[]%", at())) {
    if (at() == '%') {
      uri += scan_uri_escapes();
    } else {
      uri.push_back(at());
      forward(1);
    }
  }
  if (uri.empty()) fail("a tag without a name, found " + here());
  return uri;
}

std::string YamlScanner::scan_uri_escapes() {
  const YamlMark start = mark();
  std::string bytes;
  while (at() == '%') {
    if (!is_hex(at(1)) || !is_hex(at(2))) fail("'%' in a tag wants two hexadecimal digits");
    bytes.push_back(static_cast<char>(std::stoi(std::string(text_.substr(pos_ + 1, 2)), nullptr, 16)));
    forward(3);
  }
  if (utf8_first_bad(bytes) != std::string_view::npos) fail_at(start, "an escape in a tag that is not UTF-8");
  return bytes;
}

// --- block scalars --------------------------------------------------------------------------------------------------

void YamlScanner::scan_block_header(int* chomping, int* increment) {
  const auto chomp = [&] {
    if (at() != '+' && at() != '-') return false;
    *chomping = at() == '+' ? 1 : -1;
    forward(1);
    return true;
  };
  const auto indentation = [&] {
    if (at() < '0' || at() > '9') return;
    *increment = at() - '0';
    if (*increment == 0) fail("the indentation of a block is 1 to 9, not 0");
    forward(1);
  };
  if (chomp()) {
    indentation();
  } else {
    indentation();
    if (*increment > 0) chomp();
  }
  if (!space_or_end()) fail("after '|' or '>' only '+', '-' or a digit may follow, found " + here());
  rest_of_line("'|' or '>'");
}

std::string YamlScanner::block_breaks(long indent) {
  std::string breaks;
  for (;;) {
    while (column_ < indent && at() == ' ') forward(1);
    if (break_length() == 0) return breaks;
    breaks += line_break();
  }
}

YamlToken YamlScanner::scan_block_scalar(bool folded) {
  YamlToken token;
  token.kind = Kind::kScalar;
  token.mark = mark();
  forward(1);
  int chomping = 0, increment = 0;
  scan_block_header(&chomping, &increment);
  const long least = std::max(indent_ + 1, 1L);
  std::string breaks, last_break;
  long indent = least + increment - 1;
  if (increment > 0) {
    breaks = block_breaks(indent);
  } else {  // as deep as the deepest of the blank lines in front, or the first line with text
    long deepest = 0;
    while (at() == ' ' || break_length() > 0) {
      if (at() == ' ') {
        forward(1);
        deepest = std::max(deepest, column_);
      } else {
        breaks += line_break();
      }
    }
    indent = std::max(least, deepest);
  }
  while (column_ == indent && at() != '\0') {
    token.text += breaks;
    const bool text_first = at() != ' ' && at() != '\t';
    const std::size_t begin = pos_;
    while (!break_or_end()) forward(1);
    token.text.append(text_, begin, pos_ - begin);
    last_break = line_break();
    breaks = block_breaks(indent);
    if (column_ != indent || at() == '\0') break;
    const bool fold = folded && last_break == "\n" && text_first && at() != ' ' && at() != '\t';
    if (!fold) token.text += last_break;
    else if (breaks.empty()) token.text += ' ';
  }
  if (chomping >= 0) token.text += last_break;
  if (chomping > 0) token.text += breaks;
  return token;
}

// --- quoted scalars -------------------------------------------------------------------------------------------------

YamlToken YamlScanner::scan_quoted(char quote) {
  YamlToken token;
  token.kind = Kind::kScalar;
  token.mark = mark();
  forward(1);
  quoted_text(quote, &token.text);
  while (at() != quote) {
    quoted_spaces(token.mark, &token.text);
    quoted_text(quote, &token.text);
  }
  forward(1);
  return token;
}

void YamlScanner::quoted_text(char quote, std::string* out) {
  const bool doubled = quote == '"';
  for (;;) {
    const std::size_t begin = pos_;
    while (!blank_or_end() && !in("'\"\\", at())) forward(1);
    out->append(text_, begin, pos_ - begin);
    const char c = at();
    if (!doubled && c == '\'' && at(1) == '\'') {
      out->push_back('\'');
      forward(2);
    } else if ((doubled && c == '\'') || (!doubled && (c == '"' || c == '\\'))) {
      out->push_back(c);
      forward(1);
    } else if (doubled && c == '\\') {
      quoted_escape(out);
    } else {
      return;
    }
  }
}

void YamlScanner::quoted_escape(std::string* out) {
  constexpr std::string_view kNames = "0abt\tnvfre \"\\/N_LP";
  constexpr std::string_view kValues[] = {std::string_view("\0", 1), "\a", "\b", "\t", "\t", "\n", "\v", "\f", "\r", "\x1B", " ", "\"", "\\",
                                          "/", "\xC2\x85", "\xC2\xA0", "\xE2\x80\xA8", "\xE2\x80\xA9"};
  const YamlMark start = mark();
  forward(1);
  const char c = at();
  if (break_length() > 0) {
    line_break();
    *out += quoted_breaks();
  } else if (in(kNames, c)) {
    *out += kValues[kNames.find(c)];
    forward(1);
  } else if (c == 'x' || c == 'u' || c == 'U') {
    const std::size_t n = c == 'x' ? 2 : c == 'u' ? 4 : 8;
    forward(1);
    for (std::size_t k = 0; k < n; ++k) {
      if (!is_hex(at(k))) fail_at(start, std::string("\\") + c + " wants " + std::to_string(n) + " hexadecimal digits");
    }
    const unsigned long code = std::stoul(std::string(text_.substr(pos_, n)), nullptr, 16);
    if (code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) fail_at(start, "an escape for no character");
    utf8_append(static_cast<std::uint32_t>(code), out);
    forward(n);
  } else {
    fail_at(start, "unknown escape: a backslash before " + here() + " (single quotes keep backslashes)");
  }
}

void YamlScanner::quoted_spaces(const YamlMark& start, std::string* out) {
  const std::size_t begin = pos_;
  while (at() == ' ' || at() == '\t') forward(1);
  const std::string_view blanks = text_.substr(begin, pos_ - begin);
  if (at() == '\0') fail_at(start, "a quoted text without its closing quote");
  if (break_length() == 0) {
    *out += blanks;
    return;
  }
  const std::string first = line_break();
  const std::string breaks = quoted_breaks();
  if (first != "\n") *out += first;
  else if (breaks.empty()) *out += ' ';
  *out += breaks;
}

std::string YamlScanner::quoted_breaks() {
  std::string breaks;
  for (;;) {
    if (document_marker()) fail("a document marker inside a quoted text");
    while (at() == ' ' || at() == '\t') forward(1);
    if (break_length() == 0) return breaks;
    breaks += line_break();
  }
}

// --- plain scalars --------------------------------------------------------------------------------------------------

YamlToken YamlScanner::scan_plain() {
  YamlToken token;
  token.kind = Kind::kScalar;
  token.plain = true;
  token.mark = mark();
  const long indent = indent_ + 1;
  const auto ends_here = [this] {
    if (blank_or_end()) return true;
    if (at() == ':' && (blank_or_end(1) || (flow_level_ > 0 && in(",[]{}", at(1))))) return true;
    return flow_level_ > 0 && in(",?[]{}", at());
  };
  std::string spaces;
  while (at() != '#') {
    const std::size_t begin = pos_;
    while (!ends_here()) forward(1);
    if (pos_ == begin) break;
    allow_key_ = false;
    token.text += spaces;
    token.text.append(text_, begin, pos_ - begin);
    const std::optional<std::string> next = plain_spaces();
    if (!next || next->empty() || at() == '#' || (flow_level_ == 0 && column_ < indent)) break;
    spaces = *next;
  }
  return token;
}

/// White space inside a plain scalar, folded; nothing if a document ends there.
std::optional<std::string> YamlScanner::plain_spaces() {
  const std::size_t begin = pos_;
  while (at() == ' ') forward(1);
  if (break_length() == 0) return std::string(text_.substr(begin, pos_ - begin));
  const std::string first = line_break();
  allow_key_ = true;
  if (document_marker()) return std::nullopt;
  std::string breaks;
  while (at() == ' ' || break_length() > 0) {
    if (at() == ' ') {
      forward(1);
      continue;
    }
    breaks += line_break();
    if (document_marker()) return std::nullopt;
  }
  if (first != "\n") return first + breaks;
  return breaks.empty() ? std::string(" ") : breaks;
}

}  // namespace moeaudit
