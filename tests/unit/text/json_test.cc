// The JSON grammar: what is accepted, what is refused with which words and where, and agreement with nlohmann/json.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "audit/text/json_pull.h"
#include "audit/text/text.h"

namespace moeaudit {
namespace {

using nlohmann::json;
using Token = JsonPull::Token;

std::string refused(std::string_view text, const TextLimits& limits = {}) {
  Node root;
  TextError error;
  if (parse_json(text, &root, nullptr, &error, limits)) return "accepted";
  return std::to_string(error.line) + ":" + std::to_string(error.column) + " " + error.what;
}

Node parsed(std::string_view text) {
  Node root;
  TextError error;
  EXPECT_TRUE(parse_json(text, &root, nullptr, &error)) << text << ": " << error.what;
  return root;
}

TEST(Json, EachErrorNamesThePlaceAndTheMistake) {
  const std::pair<std::string_view, std::string> cases[] = {
      {"", "1:1 no JSON value: the text is empty"},
      {" \n ", "2:2 no JSON value: the text is empty"},
      {"{\"a\":1,}", "1:8 expected a key in double quotes, found '}': a comma before it is one too many"},
      {"[1,]", "1:4 expected a value, found ']': a comma before it is one too many"},
      {"[1 2]", "1:4 expected ',' or ']', found '2'"},
      {"{\"a\" 1}", "1:6 expected ':' after the key, found '1'"},
      {"{\"a\":1 \"b\":2}", "1:8 expected ',' or '}', found '\"'"},
      {"{'a':1}", "1:2 expected a key in double quotes or '}', found ''': JSON strings are in double quotes"},
      {"{a:1}", "1:2 expected a key in double quotes or '}', found 'a'"},
      {"{\"a\":}", "1:6 expected a value, found '}'"},
      {"[\n\n True]", "3:2 expected a value, found 'T': JSON writes true, false, null"},
      {"[1,\n// x\n2]", "2:1 expected a value, found '/': JSON has no comments"},
      {"nan", "1:1 expected a value, found 'n': Python's json writes NaN and Infinity"},
      {"-nan", "1:2 expected a digit after '-', found 'n'"},
      {"+1", "1:1 expected a value, found '+'"},
      {".5", "1:1 expected a value, found '.'"},
      {"01", "1:1 a number must not start with a zero"},
      {"1.", "1:3 expected a digit after '.', found the end of the text"},
      {"[1e]", "1:4 expected a digit in the exponent, found ']'"},
      {"1 2", "1:3 text after the end of the JSON value, from '2' on"},
      {"{} {}", "1:4 text after the end of the JSON value, from '{' on"},
      {"[", "1:2 expected a value or ']', found the end of the text"},
      {"{\"a\":{", "1:7 expected a key in double quotes or '}', found the end of the text"},
      {"\"abc", "1:1 string without its closing quote"},
      {"\"a\nb\"", "1:3 control character in a string (the end of the line): write it as an escape"},
      {"\"\\x41\"", "1:2 unknown escape: a backslash before 'x'"},
      {"\"\\u12g4\"", "1:2 \\u needs four hexadecimal digits"},
      {"\"\\ud800\"", "1:2 half a surrogate pair (\\ud800): not a character"},
      {"\"\\udc00\\ud800\"", "1:2 half a surrogate pair (\\udc00): not a character"},
      {"\"\\ud800\\u0041\"", "1:2 half a surrogate pair (\\ud800): not a character"},
      {"\"\xff\"", "1:2 not UTF-8: byte 0xff in a string"},
      {"\"\xc0\xaf\"", "1:2 not UTF-8: byte 0xc0 in a string"},
      {"\"\xed\xa0\x80\"", "1:2 not UTF-8: byte 0xed in a string"},
      {"\"\xf4\x90\x80\x80\"", "1:2 not UTF-8: byte 0xf4 in a string"},
      {"\"\xe2\x82\"", "1:2 not UTF-8: byte 0xe2 in a string"},
      {"\xEF\xBB\xBF{}", "1:1 starts with a UTF-8 byte order mark; save it as UTF-8 without one"},
      {"\xFF\xFE{", "1:1 starts with a UTF-16 byte order mark; save it as UTF-8"},
      {std::string_view("[1\0]", 4), "1:3 expected ',' or ']', found byte 0x00"},
      {"tru", "1:1 expected a value, found 't'"},
      {"[nulll]", "1:6 expected ',' or ']', found 'l'"},
  };
  for (const auto& [text, want] : cases) EXPECT_EQ(refused(text), want) << text;
}

TEST(Json, PythonsNumbers) {
  const Node root =
      parsed(R"([NaN, Infinity, -Infinity, 1E400, -1e400, 1e-400, -0, -0.0, 0.1, 8.0, 8.5, 1e3, 9223372036854775807,
                               9223372036854775808, -9223372036854775808, 123456789012345678901234567890, 2.5e-5])");
  EXPECT_TRUE(std::isnan(*root.items[0].as_double()));
  EXPECT_EQ(root.items[1].as_double(), INFINITY);
  EXPECT_EQ(root.items[2].as_double(), -INFINITY);
  EXPECT_EQ(root.items[3].as_double(), INFINITY);
  EXPECT_EQ(root.items[4].as_double(), -INFINITY);
  EXPECT_EQ(root.items[5].as_double(), 0.0);
  EXPECT_EQ(root.items[6].as_int(), 0);
  EXPECT_TRUE(std::signbit(*root.items[7].as_double()));
  EXPECT_EQ(root.items[8].as_double(), 0.1);
  EXPECT_EQ(root.items[9].as_int(), 8);
  EXPECT_EQ(root.items[10].as_int(), std::nullopt);
  EXPECT_EQ(root.items[11].as_int(), 1000);
  EXPECT_EQ(root.items[12].as_int(), INT64_MAX);
  EXPECT_EQ(root.items[13].as_int(), std::nullopt);
  EXPECT_EQ(root.items[13].as_double(), 0x1p63);
  EXPECT_EQ(root.items[14].as_int(), INT64_MIN);
  EXPECT_EQ(root.items[15].as_double(), 123456789012345678901234567890.0);
  EXPECT_EQ(root.items[16].text, "2.5e-5");  // as written
  for (const int i : {0, 1, 2}) EXPECT_EQ(root.items[static_cast<std::size_t>(i)].as_int(), std::nullopt);
}

TEST(Json, StringsAreDecoded) {
  EXPECT_EQ(parsed(R"("\"\\\/\b\f\n\r\t\u00e9\u20ac\ud83d\ude00\u0000")").text,
            std::string("\"\\/\b\f\n\r\t\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\0", 18));
  EXPECT_EQ(parsed("\"\xC3\xA9 long enough for more than one word \xF0\x9F\x98\x80\x7F\"").text,
            "\xC3\xA9 long enough for more than one word \xF0\x9F\x98\x80\x7F");
}

TEST(Json, EveryValueKnowsItsLineAndColumn) {
  const Node root = parsed("{\n  \"a\": [1,\n   {\"b\": null}],\n\t\"c\": \"x\"\n}");
  EXPECT_EQ(root.line, 1);
  EXPECT_EQ(root.key_lines, (std::vector<int>{2, 4}));
  const Node* a = root.find("a");
  ASSERT_TRUE(a && a->is_list());
  EXPECT_EQ(a->items[0].line * 100 + a->items[0].column, 209);
  EXPECT_EQ(a->items[1].line * 100 + a->items[1].column, 304);
  const Node* b = a->items[1].find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->line * 100 + b->column, 310);
  EXPECT_EQ(root.find("c")->column, 7);
}

TEST(Json, DuplicateKeysAreListedAndTheLastWins) {
  Node root;
  TextError error;
  std::vector<DuplicateKey> duplicates;
  ASSERT_TRUE(parse_json("{\"a\": 1,\n \"b\": [0, {\"c\": 1,\n \"c\": 2}],\n \"a\": 3,\n \"a\": 4}", &root, &duplicates,
                         &error));
  ASSERT_EQ(duplicates.size(), 3u);
  EXPECT_EQ(duplicates[0].path, "b[1].c");
  EXPECT_EQ(duplicates[0].line, 3);
  EXPECT_EQ(duplicates[0].first_line, 2);
  EXPECT_EQ(duplicates[1].path, "a");
  EXPECT_EQ(duplicates[1].line, 4);
  EXPECT_EQ(duplicates[2].line, 5);
  EXPECT_EQ(duplicates[2].first_line, 1);
  EXPECT_EQ(root.keys, (std::vector<std::string>{"a", "b"}));  // the place of the first, as in a dict
  EXPECT_EQ(root.find("a")->as_int(), 4);
  EXPECT_EQ(root.key_lines, (std::vector<int>{5, 2}));
}

TEST(Json, SizesAreBounded) {
  TextLimits limits;
  limits.max_depth = 3;
  EXPECT_EQ(refused("[[[]]]", limits), "accepted");
  EXPECT_EQ(refused("[[[[]]]]", limits), "1:4 nested deeper than 3 levels");
  EXPECT_EQ(refused(std::string(1'000'000, '[')), "1:65 nested deeper than 64 levels");
  limits.max_nodes = 4;
  EXPECT_EQ(refused("[1,2,3]", limits), "accepted");
  EXPECT_EQ(refused("[1,2,3,4]", limits), "1:8 more than 4 values");
  limits.max_bytes = 5;
  EXPECT_EQ(refused("[1,2,3]", limits), "0:0 larger than 5 bytes");
}

TEST(JsonPull, SkipsWholeValues) {
  JsonPull pull(R"({"a": {"x": [1, {"y": 2}]}, "b": 7, "c": [[], 3], "d": 1})");
  ASSERT_EQ(pull.next(), Token::kObjectBegin);
  ASSERT_EQ(pull.next(), Token::kKey);
  EXPECT_TRUE(pull.skip());  // the value of a, unread
  ASSERT_EQ(pull.next(), Token::kKey);
  EXPECT_EQ(pull.text(), "b");
  EXPECT_TRUE(pull.skip());
  ASSERT_EQ(pull.next(), Token::kKey);
  ASSERT_EQ(pull.next(), Token::kArrayBegin);
  EXPECT_TRUE(pull.skip());  // from inside
  ASSERT_EQ(pull.next(), Token::kKey);
  EXPECT_EQ(pull.text(), "d");
  EXPECT_EQ(pull.offset(), 50u);
  EXPECT_EQ(pull.next(), Token::kNumber);
  EXPECT_EQ(pull.next(), Token::kObjectEnd);
  EXPECT_EQ(pull.next(), Token::kEnd);
  EXPECT_EQ(pull.next(), Token::kEnd);
  JsonPull broken("[1,");
  ASSERT_EQ(broken.next(), Token::kArrayBegin);
  EXPECT_FALSE(broken.skip());
  EXPECT_EQ(broken.next(), Token::kError);  // sticky
}

TEST(JsonPull, TextStaysInTheInputUnlessItHadEscapes) {
  const std::string text = R"(["plain", "esc\n", ""])";
  JsonPull pull(text);
  pull.next();
  pull.next();
  EXPECT_FALSE(pull.decoded());
  EXPECT_EQ(pull.text().data(), text.data() + 2);
  pull.next();
  EXPECT_TRUE(pull.decoded());
  EXPECT_EQ(pull.text(), "esc\n");
  pull.next();
  EXPECT_FALSE(pull.decoded());
  EXPECT_EQ(pull.text(), "");
}

bool same(const Node& node, const json& value) {
  if (value.is_null()) return node.is_null();
  if (value.is_boolean()) return node.as_bool() == value.get<bool>();
  if (value.is_string()) return node.is_string() && node.text == value.get<std::string>();
  if (value.is_number())
    return node.as_double() == value.get<double>() &&
           (!value.is_number_integer() || value.is_number_unsigned() || node.as_int() == value.get<std::int64_t>());
  if (node.items.size() != value.size() || node.is_map() != value.is_object()) return false;
  for (std::size_t i = 0; i < node.items.size(); ++i) {
    const json& child = node.is_map() ? value.at(node.keys[i]) : value[i];
    if (!same(node.items[i], child)) return false;
  }
  return true;
}

TEST(Json, AgreesWithNlohmannOnTextsMadeAtRandom) {
  const std::string seeds[] = {R"({"a": [1, -2.5e3, true], "b": {"c": null, "d": "x\n\u00e9"}})",
                               R"([[], {}, "", 0, -0.0, 1e10, "\\\""])",
                               "[\"\xC3\xA9\xF0\x9F\x98\x80\", {\"k\": [{}]}]"};
  const std::string pieces[] = {"{", "}", "[", "]",  ",",    ":",    "\"",      "\\",   "0",    "1",    "-",
                                ".", "e", " ", "\n", "null", "true", "\\u0041", "\xC3", "\xA9", "\x01", "NaN"};
  std::mt19937 random(12345);  // the standard fixes its sequence
  int accepted = 0;
  for (int i = 0; i < 60'000; ++i) {
    std::string text = seeds[random() % std::size(seeds)];
    for (std::size_t n = random() % 3 + 1; n > 0; --n) {
      const std::size_t at = random() % (text.size() + 1);
      if (random() % 2)
        text.insert(at, pieces[random() % std::size(pieces)]);
      else
        text.erase(at, random() % 3);
    }
    Node root;
    TextError error;
    const bool mine = parse_json(text, &root, nullptr, &error);
    const json other = json::parse(text, nullptr, false);
    if (text.find("NaN") != std::string::npos && mine) continue;  // which nlohmann does not take
    ASSERT_EQ(mine, !other.is_discarded()) << text << "\n" << error.what;
    if (!mine) continue;
    ++accepted;
    ASSERT_TRUE(same(root, other)) << text;
  }
  EXPECT_GT(accepted, 5'000);
}

}  // namespace
}  // namespace moeaudit
