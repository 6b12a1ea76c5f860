// Finds one stored entry in a zip file, as torch.save and numpy.savez write them. The directory is checked as a whole before anything
// is believed: sizes, offsets and overlaps. Nothing is decompressed.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moeaudit {

/// The bytes of the one entry called `name` or ".../name". False with the reason: not a zip, damaged, entry compressed,
/// missing, or there twice. `bytes` is the whole file; `entry` points into it.
bool find_zip_entry(std::string_view bytes, std::string_view name, std::string_view* entry, std::string* error);

/// Does it start as a zip file does?
bool looks_like_zip(std::string_view bytes);

}  // namespace moeaudit
