// parse_yaml on any bytes: bounded, no crash, every value placed. Agreement with PyYAML is the golden test's task.
#include "audit/text/text.h"
#include "tests/fuzz/fuzz.h"

using moeaudit::Node;

namespace {

void check(const Node& node, int lines, int depth) {
  FUZZ_REQUIRE(depth <= 66 && node.line >= 1 && node.line <= lines + 1 && node.column >= 1);
  FUZZ_REQUIRE(node.keys.size() == node.key_lines.size());
  FUZZ_REQUIRE(node.kind != Node::Kind::kMap || node.keys.size() == node.items.size());
  FUZZ_REQUIRE(node.kind == Node::Kind::kMap || node.kind == Node::Kind::kList || node.items.empty());
  FUZZ_REQUIRE(!node.is_number() || node.as_double().has_value());
  for (const Node& item : node.items) check(item, lines, depth + 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view text = as_text(data, size);
  Node root;
  std::vector<moeaudit::DuplicateKey> duplicates;
  moeaudit::TextError error;
  moeaudit::TextLimits limits;
  limits.max_nodes = 50'000;
  limits.max_bytes = 1 << 20;
  if (!moeaudit::parse_yaml(text, &root, &duplicates, &error, limits)) {
    FUZZ_REQUIRE(!error.what.empty());
    return 0;
  }
  if (root.line != 0) check(root, static_cast<int>(text.size()), 0);  // 0: a file without a document
  for (const moeaudit::DuplicateKey& d : duplicates) FUZZ_REQUIRE(d.line >= 1 && d.first_line >= 1);
  return 0;
}
