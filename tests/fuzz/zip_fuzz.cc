// find_zip_entry on any bytes, and the pickle inside where there is one.
#include "audit/inputs/pickle.h"
#include "audit/tensors/zip.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view file = as_text(data, size);
  std::string_view entry;
  std::string error;
  if (!moeaudit::find_zip_entry(file, "data.pkl", &entry, &error)) {
    FUZZ_REQUIRE(!error.empty());
    return 0;
  }
  FUZZ_REQUIRE(entry.data() >= file.data() && entry.data() + entry.size() <= file.data() + file.size());
  std::shared_ptr<moeaudit::PickleNode> root;
  moeaudit::read_pickle(entry, &root, &error);
  return 0;
}
