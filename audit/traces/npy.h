// The header of a NumPy .npy file (numpy/lib/format.py, versions 1 to 3). No file access in here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/values.h"

namespace moeaudit {

/// A header is at most this long: an array of numbers needs some hundred bytes.
inline constexpr std::int64_t kMaxNpyHeader = 4096;

struct NpyHeader {
  DType dtype = DType::kUnknown;
  std::vector<std::int64_t> shape;
  std::int64_t data = 0, bytes = 0;  // where the values lie; bytes == product(shape) * size of dtype, inside the file
};

/// False with why: not .npy, a dtype that is no little-endian integer of 1 to 8 bytes, Fortran order, or more values
/// than the file has. `start`: its first bytes, kMaxNpyHeader or all.
bool parse_npy_header(std::string_view start, std::int64_t file_size, NpyHeader* out, std::string* why);

}  // namespace moeaudit
