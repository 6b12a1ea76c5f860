// What every rule declares: ids, names, documentation.
#include <gtest/gtest.h>

#include <regex>
#include <set>
#include <string>

#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

TEST(Rules, IdsAndNamesAreUniqueAndWellFormed) {
  const std::regex id_form("[A-Z]{2}[0-9]{3}"), name_form("[a-z0-9]+(-[a-z0-9]+)+"),
      since_form("[0-9]+\\.[0-9]+\\.[0-9]+");
  std::set<std::string> ids, names;
  ASSERT_GT(kNumRules, 0);
  const auto rules = all_rules();
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const std::string id(rules[i]->id), name(rules[i]->name);
    EXPECT_TRUE(std::regex_match(id, id_form)) << id;
    EXPECT_TRUE(std::regex_match(name, name_form)) << name;
    EXPECT_TRUE(std::regex_match(std::string(rules[i]->since), since_form)) << id;
    EXPECT_TRUE(ids.insert(id).second) << id << " is used twice";
    EXPECT_TRUE(names.insert(name).second) << name << " is used twice";
    EXPECT_NE(rules[i]->check, nullptr) << id;
    EXPECT_FALSE(rules[i]->summary.empty()) << id;
    if (i > 0) {
      EXPECT_LT(rules[i - 1]->id, rules[i]->id) << "the table is ordered by id";
    }
  }
}

TEST(Rules, AreFoundByIdAndByName) {
  for (const Rule* rule : all_rules()) {
    EXPECT_EQ(find_rule(rule->id), rule);
    EXPECT_EQ(find_rule(rule->name), rule);
  }
  EXPECT_EQ(find_rule("ZZ999"), nullptr);
  EXPECT_EQ(find_rule(""), nullptr);
}

TEST(Rules, DocsHaveTheFourSectionsInOrderAndSayEnough) {
  const std::string headings[] = {"## What it checks", "## Why it matters", "## How to fix", "## Limits"};
  for (const Rule* rule : all_rules()) {
    const std::string doc(rule->doc);
    std::size_t at = 0;
    for (const std::string& heading : headings) {
      const std::size_t found = doc.find("\n" + heading + "\n", at);
      ASSERT_NE(found, std::string::npos) << rule->id << ": '" << heading << "' is missing or out of order";
      const std::size_t next = doc.find("\n## ", found + 1);
      const std::string body = doc.substr(found + heading.size() + 1, next - found - heading.size() - 1);
      EXPECT_GT(body.size(), 20u) << rule->id << ": '" << heading << "' says nothing";
      at = found;
    }
    const std::size_t why = doc.find("## Why it matters"), fix = doc.find("## How to fix");
    const std::string reason = doc.substr(why, fix - why);
    EXPECT_TRUE(std::regex_search(reason, std::regex("[0-9]"))) << rule->id << ": 'Why it matters' has no number";
  }
}

}  // namespace
}  // namespace moeaudit
