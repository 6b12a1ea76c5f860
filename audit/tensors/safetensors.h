// The header of one safetensors file, parsed and checked against the size of the file. No file access in here: the
// fuzzers call it with bytes. Format: 8 bytes little-endian length n, n bytes of JSON, then the data, without holes
// (safetensors README "Format"; what the Rust library refuses is refused here, see tests/unit/tensors).
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/values.h"

namespace moeaudit {

/// The most a header may have: the limit of the safetensors library (MAX_HEADER_SIZE).
inline constexpr std::int64_t kMaxSafetensorsHeader = 100'000'000;

/// What the format knows of a dtype. `bits` is 0 for a name that is not in the format.
struct DTypeInfo {
  DType dtype = DType::kUnknown;
  int bits = 0;
};
DTypeInfo dtype_info(std::string_view text);

struct SafetensorsTensor {
  std::string_view name;  // in the header text, or in SafetensorsHeader::decoded
  std::string_view dtype_text;
  DType dtype = DType::kUnknown;
  std::size_t shape_begin = 0, shape_size = 0;  // in SafetensorsHeader::shapes
  std::int64_t begin = 0, end = 0;              // bytes of the file
  std::int64_t at = 0;                          // byte of the file where its entry stands in the header
};

/// One fault: where in the file, of which tensor (empty: the file), what.
struct SafetensorsFault {
  std::int64_t offset = -1;
  std::string tensor;
  std::string what;
};

struct SafetensorsHeader {
  std::vector<SafetensorsTensor> tensors;  // the sound ones, by begin, then end; a name may be there twice
  std::vector<std::int64_t> shapes;
  std::deque<std::string> decoded;       // names that were written with escapes
  std::vector<SafetensorsFault> faults;  // a bounded number, then one that counts the rest

  std::span<const std::int64_t> shape(const SafetensorsTensor& t) const {
    return {shapes.data() + t.shape_begin, t.shape_size};
  }
};

/// Length of the header as the first bytes of the file state it, checked against `file_size` and the limit; -1 with a
/// fault if the file cannot be a safetensors file. `start`: the first bytes of the file, 8 or more where it has them.
std::int64_t safetensors_header_length(std::string_view start, std::int64_t file_size,
                                       std::vector<SafetensorsFault>* faults);

/// Parses the JSON text that follows the length. Views in the result point into `text`. A header that is not JSON of
/// the right form gives no tensors; a tensor with a fault of its own is left out, the others stay.
SafetensorsHeader parse_safetensors_header(std::string_view text, std::int64_t file_size);

}  // namespace moeaudit
