// The patterns of PyYAML 6.0's implicit resolvers, written out; each comment is the pattern that is matched.
#include "audit/text/yaml_scalar.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace moeaudit {
namespace {

constexpr std::size_t kMaxPythonDigits = 4300;  // sys.get_int_max_str_digits(): int() raises beyond it

bool one_of(std::string_view text, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), text) != words.end();
}

/// Walks a pattern over a text; each step says whether it matched and moves on if so.
struct Cursor {
  std::string_view rest;

  bool empty() const { return rest.empty(); }
  bool one(std::string_view set) {
    if (rest.empty() || set.find(rest[0]) == std::string_view::npos) return false;
    rest.remove_prefix(1);
    return true;
  }
  std::size_t many(std::string_view set) {
    const std::size_t n = std::min(rest.find_first_not_of(set), rest.size());
    rest.remove_prefix(n);
    return n;
  }
  std::size_t digits(std::size_t least, std::size_t most) {  // greedy
    std::size_t n = 0;
    while (n < most && n < rest.size() && rest[n] >= '0' && rest[n] <= '9') ++n;
    if (n < least) return 0;
    rest.remove_prefix(n);
    return n;
  }
};

constexpr std::string_view kDigits = "0123456789", kDigits_ = "0123456789_", kSign = "-+";

/// (?:[eE][-+][0-9]+)?$
bool exponent_end(Cursor c) {
  if (c.empty()) return true;
  return c.one("eE") && c.one(kSign) && c.many(kDigits) > 0 && c.empty();
}

/// (?::[0-5]?[0-9])+  (then whatever the caller wants)
bool base_60(Cursor* c) {
  std::size_t groups = 0;
  while (!c->rest.empty() && c->rest[0] == ':') {
    Cursor next{c->rest.substr(1)};
    const std::size_t n = next.digits(1, 2);
    if (n == 0 || (n == 2 && c->rest[1] > '5')) return false;
    *c = next;
    ++groups;
  }
  return groups > 0;
}

bool is_float(std::string_view text) {
  Cursor c{text};
  if (text[0] == '.') {  // \.[0-9][0-9_]*(?:[eE][-+][0-9]+)?  or  \.(?:nan|NaN|NAN)
    c.one(".");
    if (one_of(c.rest, {"nan", "NaN", "NAN", "inf", "Inf", "INF"})) return true;
    return c.one(kDigits) && (c.many(kDigits_), exponent_end(c));
  }
  c.one(kSign);
  if (one_of(c.rest, {".inf", ".Inf", ".INF"})) return true;
  if (!c.one(kDigits)) return false;
  c.many(kDigits_);
  Cursor sixty = c;
  if (c.one(".")) {  // [-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?
    c.many(kDigits_);
    return exponent_end(c);
  }
  // [-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
  return base_60(&sixty) && sixty.one(".") && (sixty.many(kDigits_), sixty.empty());
}

bool is_int(std::string_view text) {
  Cursor c{text};
  c.one(kSign);
  if (c.rest == "0") return true;
  if (c.one("0")) {  // 0b[0-1_]+ | 0x[0-9a-fA-F_]+ | 0[0-7_]+
    if (c.one("b")) return c.many("01_") > 0 && c.empty();
    if (c.one("x")) return c.many("0123456789abcdefABCDEF_") > 0 && c.empty();
    return c.many("01234567_") > 0 && c.empty();
  }
  if (!c.one("123456789")) return false;  // [1-9][0-9_]*  or  [1-9][0-9_]*(?::[0-5]?[0-9])+
  c.many(kDigits_);
  return c.empty() || (base_60(&c) && c.empty());
}

struct Timestamp {
  int year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0, zone_hour = 0, zone_minute = 0;
};

int take(Cursor* c, std::size_t least, std::size_t most) {
  const std::string_view before = c->rest;
  const std::size_t n = c->digits(least, most);
  int value = -1;
  if (n > 0) std::from_chars(before.data(), before.data() + n, value);
  return value;
}

/// YYYY-MM-DD, or YYYY-M-D(T|blanks)h:mm:ss(.fraction)?(blanks? (Z | [+-]h(:mm)?))?
/// `implicit`: without a time, month and day must have two digits; a tag allows one.
bool is_timestamp(std::string_view text, bool implicit, Timestamp* t) {
  Cursor c{text};
  t->year = take(&c, 4, 4);
  if (t->year < 0 || !c.one("-")) return false;
  const std::string_view date = c.rest;
  t->month = take(&c, 1, 2);
  if (t->month < 0 || !c.one("-")) return false;
  t->day = take(&c, 1, 2);
  if (t->day < 0) return false;
  if (c.empty()) return !implicit || date.size() == 5;
  if (!c.one("Tt") && c.many(" \t") == 0) return false;
  t->hour = take(&c, 1, 2);
  if (t->hour < 0 || !c.one(":")) return false;
  t->minute = take(&c, 2, 2);
  if (t->minute < 0 || !c.one(":")) return false;
  t->second = take(&c, 2, 2);
  if (t->second < 0) return false;
  if (c.one(".")) c.many(kDigits);
  if (c.empty()) return true;
  c.many(" \t");
  if (c.one("Z")) return c.empty();
  if (!c.one(kSign)) return false;
  t->zone_hour = take(&c, 1, 2);
  if (t->zone_hour < 0) return false;
  if (c.one(":")) t->zone_minute = take(&c, 2, 2);
  return t->zone_minute >= 0 && c.empty();
}

bool exists(const Timestamp& t) {
  constexpr int kDays[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
  if (t.year < 1 || t.month < 1 || t.month > 12) return false;
  const bool leap = (t.year % 4 == 0 && t.year % 100 != 0) || t.year % 400 == 0;
  const int days = kDays[t.month - 1] + (t.month == 2 && leap ? 1 : 0);
  const bool zone = t.zone_hour * 60 + t.zone_minute < 24 * 60;
  return t.day >= 1 && t.day <= days && t.hour < 24 && t.minute < 60 && t.second < 60 && zone;
}

std::string without_underscores(std::string_view text) {
  std::string out;
  std::copy_if(text.begin(), text.end(), std::back_inserter(out), [](char c) { return c != '_'; });
  return out;
}

std::string_view strip(std::string_view text) {
  constexpr std::string_view kSpace = " \t\n\r\v\f";
  const std::size_t begin = std::min(text.find_first_not_of(kSpace), text.size());
  text.remove_prefix(begin);
  return text.substr(0, text.find_last_not_of(kSpace) + 1);
}

/// The value of base-60 digits of any size, which only a tag can ask for ("!!int 1:99"); looks allow 0 to 59.
bool base_60_value(std::string_view digits, std::int64_t* value) {
  *value = 0;
  while (true) {
    const std::size_t colon = std::min(digits.find(':'), digits.size());
    std::int64_t part = 0;
    const auto [end, ec] = std::from_chars(digits.data(), digits.data() + colon, part);
    const bool overflow = __builtin_mul_overflow(*value, 60, value) || __builtin_add_overflow(*value, part, value);
    if (ec != std::errc() || end != digits.data() + colon || overflow) return false;
    if (colon == digits.size()) return true;
    digits.remove_prefix(colon + 1);
  }
}

/// An integer by its looks stays as written; by its tag it is brought into a form that its looks would allow.
bool construct_int(std::string_view text, bool implicit, Node* node) {
  std::string digits = without_underscores(strip(text));
  if (!implicit) {
    const std::string sign = digits.starts_with('-') || digits.starts_with('+') ? digits.substr(0, 1) : "";
    digits = strip(std::string_view(digits).substr(sign.size()));
    std::int64_t value = 0;
    const bool octal_prefix = digits.starts_with("0o") && digits.size() > 2 && digits[2] >= '0' && digits[2] <= '7';
    if (octal_prefix) digits.erase(1, 1);  // int(text, 8) of Python takes it
    if (digits.find(':') != std::string::npos && base_60_value(digits, &value)) digits = std::to_string(value);
    digits.insert(0, sign);
  }
  if (!is_int(digits)) return false;  // also 0b and 0x with underscores only, where int() raises
  node->kind = Node::Kind::kNumber;
  node->text = implicit ? std::string(text) : std::move(digits);
  const bool power_of_two_base = node->text.find_first_of("bx") != std::string::npos;
  return power_of_two_base || node->text.size() <= kMaxPythonDigits;
}

/// float() of Python on what is left after '_' is dropped. An integer gets ".0", so that it reads as a float.
bool construct_float(std::string_view text, bool implicit, Node* node) {
  node->kind = Node::Kind::kNumber;
  node->text = text;
  if (implicit) return true;
  std::string plain = without_underscores(strip(text));
  std::transform(plain.begin(), plain.end(), plain.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  const bool negative = plain.starts_with('-');
  if (negative || plain.starts_with('+')) plain.erase(0, 1);
  if (one_of(plain, {".inf", "inf", "infinity"})) {
    node->text = negative ? "-.inf" : ".inf";
    return true;
  }
  if (one_of(plain, {".nan", "nan"})) {
    node->text = ".nan";
    return true;
  }
  std::string text_of_parts;
  for (std::string_view rest = plain;;) {  // one number, or base 60
    const std::size_t colon = std::min(rest.find(':'), rest.size());
    const std::string_view digits = strip(rest.substr(0, colon));
    double part = 0;
    const auto [end, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), part);
    if (ec == std::errc::invalid_argument || end != digits.data() + digits.size() || !std::isfinite(part)) return false;
    text_of_parts += digits;
    if (colon == rest.size()) break;
    text_of_parts += ':';
    rest.remove_prefix(colon + 1);
  }
  if (text_of_parts.find_first_of(".e") == std::string::npos) text_of_parts += ".0";
  node->text = (negative ? "-" : "") + text_of_parts;
  return true;
}

}  // namespace

std::string_view yaml_implicit_type(std::string_view text) {
  if (one_of(text, {"", "~", "null", "Null", "NULL"})) return "null";
  if (one_of(text, {"yes", "Yes", "YES", "no", "No", "NO", "true", "True", "TRUE", "false", "False", "FALSE", "on",
                    "On", "ON", "off", "Off", "OFF"})) {
    return "bool";
  }
  if (text == "<<") return "merge";
  if (text == "=") return "value";
  if (std::string_view("-+.0123456789").find(text[0]) == std::string_view::npos) return "str";
  Timestamp unused;
  if (is_float(text)) return "float";
  if (is_int(text)) return "int";
  return is_timestamp(text, true, &unused) ? "timestamp" : "str";
}

bool yaml_construct_scalar(std::string_view type, std::string_view text, bool implicit, Node* node,
                           std::string* error) {
  const auto fail = [&](const char* what) {
    *error = std::string("'").append(text.substr(0, 40)).append("' ").append(what);
    return false;
  };
  if (type == "str") {
    node->kind = Node::Kind::kString;
    node->text = text;
    return true;
  }
  if (type == "null") return true;
  if (type == "bool") {
    std::string word(text);
    std::transform(word.begin(), word.end(), word.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
    node->kind = Node::Kind::kBool;
    node->boolean = one_of(word, {"yes", "true", "on"});
    return node->boolean || one_of(word, {"no", "false", "off"}) || fail("is not a boolean");
  }
  if (type == "int") return construct_int(text, implicit, node) || fail("is not an integer");
  if (type == "float") return construct_float(text, implicit, node) || fail("is not a number");
  if (type == "timestamp") {
    Timestamp t;
    node->kind = Node::Kind::kString;
    node->text = text;
    return (is_timestamp(text, implicit, &t) && exists(t)) ||
           fail("looks like a date, but there is no such date: quote it");
  }
  *error = "the tag !!" + std::string(type) + " is not read here";
  if (type == "value") *error = "'=' alone has a meaning of its own in YAML, and PyYAML cannot read it: quote it";
  if (type == "merge") *error = "'<<' stands for a merge and is not a value: quote it";
  return false;
}

}  // namespace moeaudit
