// The scanner's other half: what stands inside one token (directives, anchors, tags, and the five kinds of scalars).
#include <algorithm>

#include "audit/text/utf8.h"
#include "audit/text/yaml_characters.h"
#include "audit/text/yaml_scanner.h"

namespace moeaudit {

using yaml::in;
using yaml::is_hex;
using yaml::is_word;

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
  if (token.text.empty() || !space_or_end())
    fail("a line that starts with '%' is a directive, and this one has no name: quote it");
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
    fail(std::string(hint) + ", whose name is letters, digits, '-' and '_'; found " + here() +
         " (quote the text if it is none)");
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
    if (!space_or_end(k))
      token.handle = scan_tag_handle();
    else
      forward(1);
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
    if (!fold)
      token.text += last_break;
    else if (breaks.empty())
      token.text += ' ';
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
  constexpr std::string_view kValues[] = {std::string_view("\0", 1),
                                          "\a",
                                          "\b",
                                          "\t",
                                          "\t",
                                          "\n",
                                          "\v",
                                          "\f",
                                          "\r",
                                          "\x1B",
                                          " ",
                                          "\"",
                                          "\\",
                                          "/",
                                          "\xC2\x85",
                                          "\xC2\xA0",
                                          "\xE2\x80\xA8",
                                          "\xE2\x80\xA9"};
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
  if (first != "\n")
    *out += first;
  else if (breaks.empty())
    *out += ' ';
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
