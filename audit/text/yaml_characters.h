// Character classes of the YAML scanner. '\0' stands for the end of the text and is in none of them.
#pragma once

#include <string_view>

namespace moeaudit::yaml {

inline bool in(std::string_view set, char c) { return c != '\0' && set.find(c) != std::string_view::npos; }
inline bool is_word(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '-' || c == '_';
}
inline bool is_hex(char c) { return in("0123456789abcdefABCDEF", c); }

}  // namespace moeaudit::yaml
