// Node's readings of its own text, and reading a file within bounds.
#include "audit/text/text.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace moeaudit {
namespace {

/// Digits of one base, underscores dropped (YAML 1.1). nullopt beyond 64 bits or on any other character.
std::optional<std::int64_t> integer_in_base(std::string_view digits, int base, bool negative) {
  std::string plain(negative ? "-" : "");
  std::copy_if(digits.begin(), digits.end(), std::back_inserter(plain), [](char c) { return c != '_'; });
  std::int64_t value = 0;
  const auto [end, ec] = std::from_chars(plain.data(), plain.data() + plain.size(), value, base);
  if (ec != std::errc() || end != plain.data() + plain.size()) return std::nullopt;
  return value;
}

/// An integer as JSON or YAML 1.1 write it: 12, -12, +1_000, 010 (octal), 0x1f, 0b11. Not 1:30, not 8.0.
struct IntegerText {
  bool negative = false;
  int base = 10;
  std::string_view digits;
};
IntegerText split_integer(std::string_view text) {
  IntegerText i;
  i.negative = text.starts_with('-');
  if (i.negative || text.starts_with('+')) text.remove_prefix(1);
  if (text.starts_with("0b")) return {i.negative, 2, text.substr(2)};
  if (text.starts_with("0x")) return {i.negative, 16, text.substr(2)};
  if (text.size() > 1 && text[0] == '0') return {i.negative, 8, text};
  return {i.negative, 10, text};
}

std::optional<std::int64_t> plain_integer(std::string_view text) {
  const IntegerText i = split_integer(text);
  if (i.digits.empty() || i.digits.find_first_of("+-") != std::string_view::npos) return std::nullopt;
  return integer_in_base(i.digits, i.base, i.negative);
}

/// An integer beyond 64 bits in base 2, 8 or 16.
std::optional<double> big_integer(std::string_view text) {
  const IntegerText i = split_integer(text);
  if (i.base == 10 || i.digits.empty()) return std::nullopt;
  double value = 0;
  for (const char c : i.digits) {
    if (c == '_') continue;
    const int digit = c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10;
    if (digit < 0 || digit >= i.base) return std::nullopt;
    value = value * i.base + digit;
  }
  return i.negative ? -value : value;
}

/// A decimal number; what overflows is infinite and what underflows is zero, as in Python.
std::optional<double> decimal(std::string_view text) {
  std::string plain;
  std::copy_if(text.begin(), text.end(), std::back_inserter(plain), [](char c) { return c != '_'; });
  const char* begin = plain.data() + (plain.starts_with('+') ? 1 : 0);
  const char* const end = plain.data() + plain.size();
  double value = 0;
  const auto [stop, ec] = std::from_chars(begin, end, value);
  if (stop != end || begin == end) return std::nullopt;
  if (ec == std::errc::result_out_of_range) return std::strtod(plain.c_str(), nullptr);
  if (ec != std::errc()) return std::nullopt;
  return value;
}

/// YAML 1.1's base 60: 1:30 is 90, 1:30.5 is 90.5. Summed from the last digit on, as PyYAML does.
std::optional<double> sexagesimal(std::string_view text) {
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  double value = 0, base = 1;
  for (;;) {
    const std::size_t colon = text.rfind(':');
    const std::optional<double> part = decimal(colon == std::string_view::npos ? text : text.substr(colon + 1));
    if (!part) return std::nullopt;
    value += *part * base;
    if (colon == std::string_view::npos) return negative ? -value : value;
    base *= 60;
    text = text.substr(0, colon);
  }
}

}  // namespace

const Node* Node::find(std::string_view key) const {
  if (kind != Kind::kMap) return nullptr;
  for (std::size_t i = keys.size(); i-- > 0;) {
    if (keys[i] == key) return &items[i];
  }
  return nullptr;
}

const Node* Node::find_path(std::string_view dotted) const {
  const Node* node = this;
  for (;;) {
    const std::size_t dot = dotted.find('.');
    node = node->find(dotted.substr(0, dot));
    if (!node || dot == std::string_view::npos) return node;
    dotted.remove_prefix(dot + 1);
  }
}

std::optional<bool> Node::as_bool() const {
  if (kind != Kind::kBool) return std::nullopt;
  return boolean;
}

std::optional<std::int64_t> Node::as_int() const {
  if (kind != Kind::kNumber) return std::nullopt;
  if (const auto whole = plain_integer(text)) return whole;
  const std::optional<double> value = as_double();
  // 2^63 is exact in a double; an integer text beyond 64 bits must not come back rounded.
  if (!value || std::floor(*value) != *value || !(std::fabs(*value) < 0x1p63)) return std::nullopt;
  return static_cast<std::int64_t>(*value);
}

std::optional<double> Node::as_double() const {
  if (kind != Kind::kNumber) return std::nullopt;
  if (const auto whole = plain_integer(text)) return static_cast<double>(*whole);
  std::string_view word = text;
  const double sign = word.starts_with('-') ? -1.0 : 1.0;
  if (word.starts_with('-') || word.starts_with('+')) word.remove_prefix(1);
  if (word == "NaN" || word == ".nan" || word == ".NaN" || word == ".NAN")
    return std::numeric_limits<double>::quiet_NaN();
  if (word == "Infinity" || word == ".inf" || word == ".Inf" || word == ".INF") {
    return sign * std::numeric_limits<double>::infinity();
  }
  if (const auto whole = big_integer(text)) return whole;
  return text.find(':') == std::string::npos ? decimal(text) : sexagesimal(text);
}

bool read_file(const std::string& path, std::string* out, std::string* error, std::size_t max_bytes) {
  out->clear();
  struct stat info;
  if (::stat(path.c_str(), &info) != 0) {
    *error = path + ": " + std::strerror(errno);
    return false;
  }
  // A pipe is read when the shell made it (<(pip freeze)); a named one in a folder could block for ever.
  const bool shell_pipe = S_ISFIFO(info.st_mode) && (path.starts_with("/dev/") || path.starts_with("/proc/"));
  if (!S_ISREG(info.st_mode) && !shell_pipe) {
    *error = path + (S_ISDIR(info.st_mode) ? ": is a directory" : ": is not a regular file");
    return false;
  }
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    *error = path + ": " + std::strerror(errno);
    return false;
  }
  if (S_ISREG(info.st_mode)) out->reserve(std::min(max_bytes, static_cast<std::size_t>(info.st_size)));
  char buffer[1 << 16];
  ssize_t n;
  while ((n = ::read(fd, buffer, sizeof buffer)) != 0) {
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      *error = path + ": " + std::strerror(errno);
      break;
    }
    if (out->size() + static_cast<std::size_t>(n) > max_bytes) {
      *error = path + ": larger than " + std::to_string(max_bytes) + " bytes, the most that is read of such a file";
      n = -1;
      break;
    }
    out->append(buffer, static_cast<std::size_t>(n));
  }
  ::close(fd);
  return n == 0;
}

}  // namespace moeaudit
