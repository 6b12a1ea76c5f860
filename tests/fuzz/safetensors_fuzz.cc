// A safetensors file as bytes. Whatever the header says, a tensor that is kept lies inside the file and has the bytes
// that its shape takes, and a file without a fault is covered without a hole.
#include "audit/tensors/name_index.h"
#include "audit/tensors/safetensors.h"
#include "tests/fuzz/fuzz.h"

using namespace moeaudit;

namespace {

/// `unique`: no name comes twice (which the tensor store reports, and which may share its data with the first).
void check_tensors(const SafetensorsHeader& header, bool unique, std::int64_t data_begin, std::int64_t file_size) {
  std::int64_t covered = data_begin;
  for (const SafetensorsTensor& t : header.tensors) {
    FUZZ_REQUIRE(data_begin <= t.begin && t.begin <= t.end && t.end <= file_size);
    FUZZ_REQUIRE(t.shape_begin + t.shape_size <= header.shapes.size());
    unsigned __int128 bits = static_cast<unsigned>(dtype_info(t.dtype_text).bits);
    bool zero = false;
    for (const std::int64_t extent : header.shape(t)) {
      FUZZ_REQUIRE(extent >= 0);
      zero = zero || extent == 0;
      if (bits <= static_cast<unsigned __int128>(file_size) * 8)
        bits *= static_cast<unsigned __int128>(extent);  // else far too many
    }
    if (dtype_info(t.dtype_text).bits > 0)
      FUZZ_REQUIRE((zero && t.begin == t.end) || bits == static_cast<unsigned __int128>(t.end - t.begin) * 8);
    if (header.faults.empty() && unique) FUZZ_REQUIRE(t.begin == covered);
    covered = t.end > covered ? t.end : covered;
  }
  if (header.faults.empty()) FUZZ_REQUIRE(covered == file_size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view file = as_text(data, size);
  const auto file_size = static_cast<std::int64_t>(size);
  std::vector<SafetensorsFault> faults;
  const std::int64_t length = safetensors_header_length(file, file_size, &faults);
  FUZZ_REQUIRE((length < 0) == !faults.empty());
  if (length < 0) return 0;
  const SafetensorsHeader header =
      parse_safetensors_header(file.substr(8, static_cast<std::size_t>(length)), file_size);
  std::vector<std::string_view> names;
  for (const SafetensorsTensor& t : header.tensors) names.push_back(t.name);
  NameIndex index;
  index.build(names);
  check_tensors(header, index.duplicates().empty(), 8 + length, file_size);
  for (const std::string_view name : names) {
    const std::int64_t i = index.find(name);
    FUZZ_REQUIRE(i >= 0 && names[static_cast<std::size_t>(i)] == name);
  }
  return 0;
}
