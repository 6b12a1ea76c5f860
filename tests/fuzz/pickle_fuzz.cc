// read_pickle on any bytes: bounded, no cycle in what comes out.
#include "audit/inputs/pickle.h"
#include "tests/fuzz/fuzz.h"

using moeaudit::PickleNode;

namespace {

std::size_t walk(const PickleNode& node, int depth) {
  FUZZ_REQUIRE(depth <= 100);
  std::size_t n = 1;
  for (const auto& item : node.items) n += walk(*item, depth + 1);
  for (const auto& [key, value] : node.entries) n += walk(*key, depth + 1) + walk(*value, depth + 1);
  return n;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  std::shared_ptr<PickleNode> root;
  std::string error;
  if (!moeaudit::read_pickle(as_text(data, size), &root, &error)) {
    FUZZ_REQUIRE(!error.empty());
    return 0;
  }
  FUZZ_REQUIRE(walk(*root, 0) <= 1'000'000);
  root->find("gradient_accumulation_steps");
  return 0;
}
