// YAML: places, messages, duplicates and bounds. What the texts mean is in yaml_golden_test.cc.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>

#include "audit/text/text.h"

namespace moeaudit {
namespace {

std::string refused_yaml(std::string_view text, const TextLimits& limits = {}) {
  Node root;
  TextError error;
  if (parse_yaml(text, &root, nullptr, &error, limits)) return "accepted";
  return std::to_string(error.line) + ":" + std::to_string(error.column) + " " + error.what;
}

TEST(Yaml, EachErrorNamesThePlaceAndTheMistake) {
  const std::pair<std::string_view, std::string> cases[] = {
      {"a: b\n\tc: d", "2:1 a tab where YAML wants spaces"},
      {"a: b\t\n", "1:5 a tab where YAML wants spaces"},
      {"a: @b", "1:4 a value cannot start with '@': quote it"},
      {"a: %b", "1:4 a value cannot start with '%'"},
      {"a: b: c", "1:5 a second ': ' in this line, or one after a value: quote the text, or start a new line"},
      {"a: - b", "1:4 a list entry '- ' cannot stand here: put it on a line of its own"},
      {"a: 1\nb\nc: 2", "2:1 a key without its ':' (a key must be on one line, within 1024 characters)"},
      {"a:\n  b: 1\n c: 2",
       "3:2 expected a key or less indentation in the mapping that starts in line 1, found a mapping"},
      {"a: [1, 2\nb: 3", "2:2 expected ',' or ']' in the list that starts in line 1, found ':'"},
      {"a: [1, 2", "1:9 expected ',' or ']' in the list that starts in line 1, found the end of the file"},
      {"a: {b: 1", "1:9 expected ',' or '}' in the mapping that starts in line 1, found the end of the file"},
      {"a: ]", "1:4 ']' closes nothing"},
      {"a: *b", "1:4 the alias *b has no anchor &b before it"},
      {"a: &x 1\nb: &x 2", "2:4 the anchor &x is there twice"},
      {"a: !foo b", "1:4 the tag !foo is not read here: only YAML's own types are"},
      {"a: !!python/object:os.system b", "1:4 the tag !!python/object:os.system is not read here"},
      {"a: !!set {b}", "1:4 a mapping with the tag tag:yaml.org,2002:set"},
      {"a: 'b", "1:4 a quoted text without its closing quote"},
      {"a: \"\\q\"", "1:5 unknown escape: a backslash before 'q' (single quotes keep backslashes)"},
      {"a: \"\\ud800\"", "1:5 an escape for no character"},
      {"a: |x\n  y", "1:5 after '|' or '>' only '+', '-' or a digit may follow, found 'x'"},
      {"a: 2001-02-30", "1:4 '2001-02-30' looks like a date, but there is no such date: quote it"},
      {"a: =", "1:4 '=' alone has a meaning of its own in YAML, and PyYAML cannot read it: quote it"},
      {"<<: 1", "1:5 '<<' wants a mapping or a list of mappings"},
      {"? [a]\n: b", "1:3 a list or a mapping as a key"},
      {"--- a\n--- b", "2:1 a second document begins: only one can be read from a file"},
      {"a: 1\n...\nb: 1",
       "3:1 expected the end of the file or '---', found a mapping: is it indented like what it belongs to?"},
      {"&a [*a]", "1:1 an alias to something that it is part of"},
      {"a: \xff", "1:4 not UTF-8: byte 0xff"},
      {"a: \x01", "1:4 a character that YAML does not allow: byte 0x01"},
      {"\xFF\xFE", "1:1 UTF-16: save the file as UTF-8"},
  };
  for (const auto& [text, want] : cases) EXPECT_EQ(refused_yaml(text), want) << text;
}

TEST(Yaml, EveryValueKnowsItsLineAndColumn) {
  Node root;
  TextError error;
  ASSERT_TRUE(parse_yaml("# head\na: 1\nb:\n  - x\n  - {c: [2, 'y']}\né: |\n  t\n", &root, nullptr, &error))
      << error.what;
  EXPECT_EQ(root.key_lines, (std::vector<int>{2, 3, 6}));
  EXPECT_EQ(root.items[0].line * 100 + root.items[0].column, 204);
  EXPECT_EQ(root.items[1].items[0].line * 100 + root.items[1].items[0].column, 405);
  const Node* list = root.items[1].items[1].find("c");
  ASSERT_NE(list, nullptr);
  EXPECT_EQ(list->items[1].line * 100 + list->items[1].column, 513);
  EXPECT_EQ(root.items[2].line * 100 + root.items[2].column, 605);  // columns in bytes
  EXPECT_EQ(root.items[2].text, "t\n");
}

TEST(Yaml, TaggedNumbersReadAsNumbers) {
  // PyYAML: construct_yaml_int and construct_yaml_float take more spellings than look like numbers.
  const std::pair<std::string_view, double> cases[] = {
      {"!!float '1: 30'", 90}, {"!!float '1:30'", 90}, {"!!float 3", 3},
      {"!!float 1e3", 1000},   {"!!float 010", 10},    {"!!int 0o17", 15},
      {"!!int 1:99", 159},     {"!!int '12'", 12},     {"!!float -inf", -INFINITY}};
  for (const auto& [text, value] : cases) {
    Node root;
    TextError error;
    ASSERT_TRUE(parse_yaml(text, &root, nullptr, &error)) << text << ": " << error.what;
    EXPECT_EQ(root.as_double(), value) << text;
  }
}

TEST(Yaml, DuplicatesAreListedButNotWhatAMergeKeyBrought) {
  Node root;
  TextError error;
  std::vector<DuplicateKey> duplicates;
  ASSERT_TRUE(
      parse_yaml("base: &b {x: 1, y: 2}\nrun:\n  <<: *b\n  x: 3\n  z: 1\n  z: 2\nlist:\n- {q: 1, q: 2}\nrun2:\n  <<: "
                 "*b\n1: a\ntrue: b\n",
                 &root, &duplicates, &error))
      << error.what;
  ASSERT_EQ(duplicates.size(), 3u);
  EXPECT_EQ(duplicates[0].path, "run.z");
  EXPECT_EQ(duplicates[0].line, 6);
  EXPECT_EQ(duplicates[0].first_line, 5);
  EXPECT_EQ(duplicates[1].path, "list[0].q");
  EXPECT_EQ(duplicates[2].path, "true");  // 1 and true are one key of a dict
  EXPECT_EQ(duplicates[2].line, 12);
  EXPECT_EQ(root.find_path("run.x")->as_int(), 3);
  EXPECT_EQ(root.find_path("run.y")->as_int(), 2);
  EXPECT_EQ(root.find_path("run.z")->as_int(), 2);
}

TEST(Yaml, AnAliasIsListedOnce) {
  Node root;
  TextError error;
  std::vector<DuplicateKey> duplicates;
  ASSERT_TRUE(parse_yaml("a: &a {x: 1, x: 2}\nb: *a\nc: *a\n", &root, &duplicates, &error));
  EXPECT_EQ(duplicates.size(), 1u);
}

/// Nine levels of ten aliases each: 10^9 values from 300 bytes.
std::string billion_laughs(const std::string& open, const std::string& close) {
  std::string text = "- &a0 " + open + "x: 1" + close + "\n";
  for (int i = 1; i < 10; ++i) {
    text += "- &a" + std::to_string(i) + " [";
    for (int j = 0; j < 10; ++j) text += (j ? ", *a" : "*a") + std::to_string(i - 1);
    text += "]\n";
  }
  return text;
}

TEST(Yaml, SmallFilesThatWouldBecomeHugeAreRefused) {
  TextLimits limits;
  limits.max_nodes = 100'000;
  EXPECT_NE(
      refused_yaml(billion_laughs("{", "}"), limits).find("more than 100000 values after its aliases are expanded"),
      std::string::npos);
  std::string merges = "- &a0 {x: 1, y: 2}\n";
  for (int i = 1; i < 12; ++i) {
    merges += "- &a" + std::to_string(i) + " {<<: [";
    for (int j = 0; j < 10; ++j) merges += (j ? ", *a" : "*a") + std::to_string(i - 1);
    merges += "]}\n";
  }
  EXPECT_NE(refused_yaml(merges).find("merge keys that expand to too many pairs"), std::string::npos);
  std::string texts = "- &a " + std::string(100'000, 'x') + "\n";
  for (int i = 0; i < 1000; ++i) texts += "- *a\n";
  limits.max_bytes = 10'000'000;
  EXPECT_NE(refused_yaml(texts, limits).find("more text than 10000000 bytes"), std::string::npos);
  limits.max_bytes = 100;
  EXPECT_EQ(refused_yaml(texts, limits), "0:0 larger than 100 bytes");
}

TEST(Yaml, DepthIsBoundedInEveryDirection) {
  const std::string deep = "nested deeper than 64 levels";
  EXPECT_NE(refused_yaml(std::string(1'000'000, '[')).find(deep), std::string::npos);
  EXPECT_NE(refused_yaml(std::string(1'000'000, '{')).find(deep), std::string::npos);
  std::string dashes, mapping, pairs;
  for (int i = 0; i < 100'000; ++i) dashes += "- ";
  for (int i = 0; i < 1'000; ++i) mapping += std::string(static_cast<std::size_t>(i), ' ') + "a:\n";
  for (int i = 0; i < 100'000; ++i) pairs += "? ";
  EXPECT_NE(refused_yaml(dashes).find(deep), std::string::npos);
  EXPECT_NE(refused_yaml(mapping).find(deep), std::string::npos);
  EXPECT_NE(refused_yaml(pairs).find(deep), std::string::npos);
  std::string through_aliases = "- &a0 [x]\n";
  for (int i = 1; i < 200; ++i) through_aliases += "- &a" + std::to_string(i) + " [*a" + std::to_string(i - 1) + "]\n";
  EXPECT_NE(refused_yaml(through_aliases).find(deep), std::string::npos);
}

TEST(Yaml, TimeGrowsWithTheSizeOnly) {
  const auto seconds = [](const std::string& text) {
    const auto begin = std::chrono::steady_clock::now();
    refused_yaml(text);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  std::string merges = "a: &a {x: 1}\nb:\n", keys, tags, flow = "[";
  for (int i = 0; i < 60'000; ++i) {
    merges += "  <<: *a\n";
    keys += "same: 1\n";
    tags += "- !!str !!str\n";
    flow += "a: b, ";
  }
  // A quadratic step would take minutes; the limit only tells it from a slow machine.
  for (const std::string& text :
       {merges, keys, tags, flow + "]", "a: " + std::string(400'000, '!'), "a: |\n" + std::string(400'000, '\n'),
        std::string(400'000, ' '), "'" + std::string(400'000, '\n'), "a: b" + std::string(400'000, '\n') + "c"}) {
    EXPECT_LT(seconds(text), 10.0);
  }
}

}  // namespace
}  // namespace moeaudit
