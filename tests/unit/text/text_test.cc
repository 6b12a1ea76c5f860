// Node's readings of its text, and read_file.
#include "audit/text/text.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

namespace moeaudit {
namespace {

Node number(std::string text) {
  Node n;
  n.kind = Node::Kind::kNumber;
  n.text = std::move(text);
  return n;
}

TEST(Node, NumbersInBothDialects) {
  const std::pair<const char*, double> cases[] = {{"12", 12},
                                                  {"-12", -12},
                                                  {"+12", 12},
                                                  {"1_000", 1000},
                                                  {"0x1F", 31},
                                                  {"-0x10", -16},
                                                  {"017", 15},
                                                  {"0b101", 5},
                                                  {"00", 0},
                                                  {"1:30", 90},
                                                  {"-1:30", -90},
                                                  {"190:20:30", 685230},
                                                  {"190:20:30.15", 685230.15},
                                                  {"1.", 1},
                                                  {".5", 0.5},
                                                  {"+.5", 0.5},
                                                  {"1_0.2_5", 10.25},
                                                  {"1.0e+3", 1000},
                                                  {"1e-3", 0.001},
                                                  {".inf", INFINITY},
                                                  {"-.Inf", -INFINITY},
                                                  {"+.INF", INFINITY},
                                                  {"Infinity", INFINITY},
                                                  {"-Infinity", -INFINITY},
                                                  {"0xffffffffffffffff", 18446744073709551615.0},
                                                  {"02000000000000000000000", 0x1p64}};
  for (const auto& [text, value] : cases) EXPECT_EQ(number(text).as_double(), value) << text;
  for (const char* text : {"NaN", ".nan", ".NaN", ".NAN"}) EXPECT_TRUE(std::isnan(*number(text).as_double())) << text;
  EXPECT_EQ(number("1:30").as_int(), 90);
  EXPECT_EQ(number("8.0").as_int(), 8);
  EXPECT_EQ(number("8.5").as_int(), std::nullopt);
  EXPECT_EQ(number("9007199254740993").as_int(), 9007199254740993);  // not through a double
  EXPECT_EQ(number("0x8000000000000000").as_int(), std::nullopt);
  EXPECT_EQ(number("1e19").as_int(), std::nullopt);
  EXPECT_EQ(number("NaN").as_int(), std::nullopt);
  EXPECT_EQ(number("12").as_bool(), std::nullopt);
  EXPECT_EQ(number("12").as_string(), nullptr);
  Node text;
  text.kind = Node::Kind::kString;
  text.text = "12";
  EXPECT_EQ(text.as_int(), std::nullopt);  // a string is no number, whatever it looks like
  EXPECT_EQ(text.as_double(), std::nullopt);
}

TEST(Node, FindPath) {
  Node root;
  TextError error;
  ASSERT_TRUE(parse_json(R"({"a": {"b": {"c": 3}, "d": [1]}, "e": null})", &root, nullptr, &error));
  ASSERT_NE(root.find_path("a.b.c"), nullptr);
  EXPECT_EQ(root.find_path("a.b.c")->as_int(), 3);
  EXPECT_EQ(root.find_path("a.x.c"), nullptr);
  EXPECT_EQ(root.find_path("a.d.0"), nullptr);
  EXPECT_EQ(root.find_path("e.f"), nullptr);
  EXPECT_EQ(root.find_path(""), nullptr);
  EXPECT_TRUE(root.find_path("e")->is_null());
}

TEST(ReadFile, BoundsAndReasons) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(testing::TempDir()) / "read_file_test";
  fs::remove_all(folder);
  fs::create_directories(folder);
  const std::string path = (folder / "x").string();
  std::ofstream(path) << "hello";
  std::string text, error;
  EXPECT_TRUE(read_file(path, &text, &error));
  EXPECT_EQ(text, "hello");
  EXPECT_TRUE(read_file(path, &text, &error, 5));
  EXPECT_FALSE(read_file(path, &text, &error, 4));
  EXPECT_NE(error.find("larger than 4 bytes"), std::string::npos);
  EXPECT_FALSE(read_file(folder.string(), &text, &error));
  EXPECT_EQ(error, folder.string() + ": is a directory");
  EXPECT_FALSE(read_file(path + "y", &text, &error));
  EXPECT_EQ(error, path + "y: No such file or directory");
  const std::string pipe = (folder / "pipe").string();
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_FALSE(read_file(pipe, &text, &error));  // would wait for a writer for ever
  EXPECT_EQ(error, pipe + ": is not a regular file");
  fs::remove_all(folder);
}

}  // namespace
}  // namespace moeaudit
