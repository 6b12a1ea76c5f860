// A tensor's name as a pattern of its family.
#pragma once

#include <algorithm>
#include <charconv>
#include <string>
#include <string_view>

namespace moeaudit {

struct Pattern {
  std::string text;  // first number of the name -> {L}, second -> {e}
  int layer = -1;
  int expert = -1;
};

inline Pattern pattern_of(std::string_view name) {
  Pattern out;
  for (std::size_t from = 0; from <= name.size();) {
    const std::size_t dot = std::min(name.find('.', from), name.size());
    const std::string_view part = name.substr(from, dot - from);
    int number = -1;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    const bool is_number = error == std::errc() && end == part.data() + part.size() && number >= 0;
    if (from > 0) out.text += '.';
    if (is_number && out.layer < 0) {
      out.layer = number;
      out.text += "{L}";
    } else if (is_number && out.expert < 0) {
      out.expert = number;
      out.text += "{e}";
    } else {
      out.text += part;
    }
    from = dot + 1;
  }
  return out;
}

}  // namespace moeaudit
