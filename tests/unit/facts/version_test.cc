// PEP 440 order and sets. The orders are the ones PEP 440 gives; the sets were worked out from its text by hand.
#include "audit/facts/version.h"

#include <gtest/gtest.h>

namespace moeaudit {
namespace {

Version version(std::string_view text) {
  const auto v = Version::parse(text);
  EXPECT_TRUE(v.has_value()) << text;
  return v.value_or(Version());
}
VersionSet set(std::string_view text) {
  const auto s = VersionSet::parse(text);
  EXPECT_TRUE(s.has_value()) << text;
  return s.value_or(VersionSet());
}
VersionWindow window(std::string_view from, std::string_view until) {
  return {from.empty() ? std::nullopt : Version::parse(from), until.empty() ? std::nullopt : Version::parse(until)};
}

TEST(Version, OrderOfPep440) {
  // "Summary of permitted suffixes and relative ordering", and the longer list below it.
  const char* ordered[] = {"1.dev0",
                           "1.0.dev456",
                           "1.0a1",
                           "1.0a2.dev456",
                           "1.0a12.dev456",
                           "1.0a12",
                           "1.0b1.dev456",
                           "1.0b2",
                           "1.0b2.post345.dev456",
                           "1.0b2.post345",
                           "1.0rc1.dev456",
                           "1.0rc1",
                           "1.0",
                           "1.0.post456.dev34",
                           "1.0.post456",
                           "1.1.dev1",
                           "1.1",
                           "4.5",
                           "4.45",
                           "4.45.1",
                           "4.46.0.dev0",
                           "4.46.0rc1",
                           "4.46",
                           "4.100"};
  for (std::size_t i = 0; i < std::size(ordered); ++i) {
    for (std::size_t j = 0; j < std::size(ordered); ++j) {
      EXPECT_EQ(compare(version(ordered[i]), version(ordered[j])), i < j   ? -1
                                                                   : i > j ? 1
                                                                           : 0)
          << ordered[i] << " and " << ordered[j];
    }
  }
}

TEST(Version, SpellingsOfOneVersion) {
  const std::vector<const char*> same[] = {
      {"4.46", "4.46.0", "4.46.0.0", "v4.46", " 4.46 ", "4.46+cpu", "4.46.0+cu124.git1a2b"},
      {"1.1rc1", "1.1.rc1", "1.1-rc.1", "1.1C1", "1.1_pre1", "1.1RC1", "1.1preview1"},
      {"1.1a0", "1.1a", "1.1alpha", "1.1.Alpha-0"},
      {"1.0.post2", "1.0-r2", "1.0post2", "1.0.rev2"},
      {"5.10.0.dev0", "5.10dev", "5.10.0-dev0"}};
  for (const auto& group : same) {
    for (const char* text : group)
      EXPECT_EQ(compare(version(group[0]), version(text)), 0) << group[0] << " and " << text;
  }
  EXPECT_EQ(version(" v4.46.0+cpu ").text, "v4.46.0+cpu");
}

TEST(Version, WhatIsNone) {
  for (const char* text : {"", " ", "abc", "1.x", "1..2", ".1", "1.", "1.0foo", "1.0rc1x", "latest",
                           "git+https://x/y@v1", "1.0 2", "-1", "99999999999"}) {
    EXPECT_FALSE(Version::parse(text).has_value()) << text;
  }
}

TEST(VersionSet, Pinned) {
  for (const char* text : {"4.46.3", "==4.46.3", "== 4.46.3", "===4.46.3", "==4.46.3,>=4.40", ">=4.40,<4.50,==4.46.3",
                           "==4.46.3,!=4.46.2"}) {
    const VersionSet s = set(text);
    ASSERT_TRUE(s.exact.has_value()) << text;
    EXPECT_EQ(compare(*s.exact, version("4.46.3")), 0);
    EXPECT_TRUE(s.inside(window("4.46", "4.47")));
    EXPECT_TRUE(s.inside(window("4.46.3", "4.46.4")));
    EXPECT_FALSE(s.inside(window("4.46", "4.46.3")));
    EXPECT_EQ(s.inside(window("4.46.4", "")), s.intersects(window("4.46.4", "")));
  }
  EXPECT_EQ(to_text(set("==2.13.0+cpu")), "2.13.0+cpu");
  EXPECT_TRUE(set("==5.10.0.dev0").inside(window("5.9", "5.10")));  // a development version is before its release
}

struct SetCase {
  const char* set;
  const char* from;
  const char* until;
  bool inside, intersects;
};

TEST(VersionSet, InsideAndIntersects) {
  const SetCase cases[] = {
      {">=4.45,<4.50", "4.45", "4.50", true, true},
      {">=4.45,<4.50", "4.46", "", false, true},
      {">=4.45,<4.50", "", "4.45", false, false},
      {">=4.45,<4.50", "4.50", "", false, false},
      {">=4.45,<4.50", "4.50rc1", "", false, false},  // "<4.50" leaves its pre-releases out
      {">=4.45,<4.50", "", "", true, true},
      {">=4.45", "4.45", "", true, true},
      {">=4.45", "4.44", "4.99", false, true},
      {">=4.45", "", "4.45", false, false},
      {">4.45", "4.45.1", "", true, true},  // no release lies between
      {">4.45", "", "4.45.1", false, false},
      {">4.45.2", "4.45.3", "", true, true},
      {"<=4.50", "", "4.50.1", true, true},
      {"<=4.50", "4.50", "", false, true},  // 4.50 itself
      {"<=4.50", "4.50.post1", "", false, false},
      {"<4.50", "4.50", "", false, false},
      {"==4.46.*", "4.46", "4.47", true, true},
      {"==4.46.*", "4.46.1", "", false, true},
      {"==4.46.*", "4.47.dev0", "", false, false},
      {"~=4.45.1", "4.45.1", "4.46", true, true},
      {"~=4.45.1", "4.46", "", false, false},
      {"~=4.45", "4.45", "5", true, true},
      {"~=4.45", "5.0.dev0", "", false, false},
      {"!=4.46", "", "", true, true},
      {"!=4.46", "4.46", "4.46.1", false, true},  // a hole is not taken out
      {">=4.45 , < 4.50 , ", "4.45", "4.50", true, true},
      {">=4.45,>=4.47,<5,<4.50", "4.47", "4.50", true, true},
      {">=4.48.0.dev0,<4.49", "4.48", "4.49", false, true},
  };
  for (const SetCase& c : cases) {
    const VersionSet s = set(c.set);
    EXPECT_FALSE(s.exact.has_value());
    EXPECT_EQ(s.inside(window(c.from, c.until)), c.inside) << c.set << " inside [" << c.from << ", " << c.until << ")";
    EXPECT_EQ(s.intersects(window(c.from, c.until)), c.intersects)
        << c.set << " intersects [" << c.from << ", " << c.until << ")";
    EXPECT_TRUE(c.intersects || !c.inside);
  }
}

TEST(VersionSet, WhatIsUnknownOrEmpty) {
  for (const char* text :
       {"", ",", "latest", "@ git+https://github.com/huggingface/transformers", "git+https://x", "file:///x",
        ">=", ">=abc", "=4.46", "~=4", "~=4.*", ">=4.46.*", "==4.46,==4.47", ">=5,<4", ">=4.45,<4.45", "==4.46,>=4.47",
        "==4.46,<4.46", "4.46 4.47", ">=4.45;python_version<'3.9'"}) {
    EXPECT_FALSE(VersionSet::parse(text).has_value()) << text;
  }
}

TEST(VersionWindow, IsHalfOpen) {
  const VersionWindow w = window("4.46", "4.47");
  EXPECT_TRUE(w.contains(version("4.46")));
  EXPECT_TRUE(w.contains(version("4.46.3")));
  EXPECT_FALSE(w.contains(version("4.46rc1")));
  EXPECT_FALSE(w.contains(version("4.47")));
  EXPECT_TRUE(w.contains(version("4.47rc1")));
  EXPECT_TRUE(window("", "").contains(version("0")));
}

}  // namespace
}  // namespace moeaudit
