// Facts keep what they shadow; names are unique; numbers are written so that they read back.
#include "audit/facts/fact_sheet.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "audit/facts/finding.h"

namespace moeaudit {
namespace {

Source from(const char* file, int line) {
  Source s;
  s.file = file;
  s.line = line;
  return s;
}

TEST(Fact, TheLoserIsKept) {
  FactSheet f;
  f.top_k.set(2, Origin::kStated, from("config.json", 9));
  f.top_k.set(4, Origin::kAssumed, from("command line", 0));
  EXPECT_EQ(f.top_k.value(), 4);
  ASSERT_EQ(f.top_k.shadowed().size(), 1u);
  EXPECT_EQ(f.top_k.shadowed()[0].value, 2);
  EXPECT_EQ(f.top_k.shadowed()[0].source.line, 9);
  f.top_k.set_if_unknown(8, Origin::kFrameworkDefault, {});
  EXPECT_EQ(f.top_k.value(), 4);
  EXPECT_EQ(f.top_k.shadowed().size(), 2u);
}

TEST(FactSheet, NamesAreUniqueAndDotted) {
  FactSheet f;
  std::set<std::string_view> names;
  f.visit([&](const auto& fact) {
    EXPECT_TRUE(names.insert(fact.info().name).second) << fact.info().name;
    EXPECT_NE(fact.info().name.find('.'), std::string_view::npos);
    EXPECT_FALSE(fact.info().meaning.empty());
    EXPECT_FALSE(fact.known());
  });
  EXPECT_GT(names.size(), 60u);
}

TEST(Facts, RequireRecordsWhatIsMissingAndWantDoesNot) {
  FactSheet sheet;
  sheet.aux_added.explain_unknown("depends on transformers");
  Facts facts(sheet);
  EXPECT_EQ(facts.want(sheet.top_k), nullptr);
  EXPECT_FALSE(facts.missing());
  EXPECT_EQ(facts.require(sheet.aux_added), nullptr);
  EXPECT_TRUE(facts.missing());
  const Outcome o = facts.cannot_tell();
  ASSERT_EQ(o.missing.size(), 1u);
  EXPECT_EQ(o.missing[0].fact, "balance.aux_added_to_loss");
  EXPECT_EQ(o.missing[0].why, "depends on transformers");
  EXPECT_EQ(facts.asked_unknown().size(), 2u);
}

TEST(ToText, NumbersReadBack) {
  EXPECT_EQ(to_text(0.1), "0.1");
  EXPECT_EQ(to_text(0.001), "0.001");
  EXPECT_EQ(std::stod(to_text(1.0 / 3)), 1.0 / 3);
  EXPECT_EQ(to_text(std::nan("")), "nan");
  EXPECT_EQ(to_text(-std::numeric_limits<double>::infinity()), "-inf");
  EXPECT_EQ(to_text(std::vector<std::int64_t>{0, 1, 2, 3, 5, 7, 8}), "0-3, 5, 7, 8");
  EXPECT_EQ(to_text(std::vector<std::int64_t>{}), "none");
  EXPECT_EQ(to_text(std::vector<std::int64_t>{4, 5}), "4, 5");
}

TEST(ToText, PlacesNameFileLineAndKey) {
  Source s = from("axolotl.yml", 4);
  s.key = "model_config.router_aux_loss_coef";
  EXPECT_EQ(to_text(s), "axolotl.yml:4 (model_config.router_aux_loss_coef)");
  EXPECT_EQ(to_text(Source{}), "");
}

}  // namespace
}  // namespace moeaudit
