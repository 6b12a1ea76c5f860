// UTF-8, strictly: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace moeaudit {

/// Length in bytes (1 to 4) of the well-formed character at text[at], or 0 if there is none.
std::size_t utf8_length(std::string_view text, std::size_t at);
/// The character whose length utf8_length() gave.
std::uint32_t utf8_decode(std::string_view text, std::size_t at, std::size_t length);
void utf8_append(std::uint32_t code_point, std::string* out);
/// Offset of the first byte that is not part of a well-formed character, or npos.
std::size_t utf8_first_bad(std::string_view text);

/// For messages: 'x' for a printable ASCII character, "byte 0x1f" otherwise, "the end of the text" past the end.
std::string describe_byte(std::string_view text, std::size_t at);

}  // namespace moeaudit
