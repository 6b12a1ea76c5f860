// Balance losses of logits that tie: how far the choice among equals can move them.
#include "audit/variants/forms.h"

#include <gtest/gtest.h>

#include <cmath>

namespace moeaudit::variants {
namespace {

/// Half of the tokens have logits 0, as linear attention leaves them at padding; the others prefer the last experts.
RoutedLayer half_tied() {
  RoutedLayer l;
  l.tokens = 8, l.experts = 8, l.top_k = 2;
  l.dtype = l.scores_dtype = kernels::Float::kF32;
  for (std::int64_t t = 0; t < l.tokens; ++t) {
    for (std::int64_t e = 0; e < l.experts; ++e)
      l.logits.push_back(t < 4 ? 0.0 : 0.5 * static_cast<double>(e) + 0.01 * static_cast<double>(t * e));
    l.chosen.insert(l.chosen.end(), {7, 6});
  }
  return l;
}

TEST(Forms, WhereAllExpertsTieNoneOfTheChoicesIsCertain) {
  RoutedLayer l = half_tied();
  ASSERT_TRUE(l.prepare());
  BalanceForm own = held_to(BalanceFamily::kTransformers);
  BalanceSum reference(own);
  own.choices = Choices::kRecorded;  // experts 7 and 6 of every token: a choice that the framework may make
  BalanceSum recorded(own);
  reference.add(l);
  recorded.add(l);
  const double apart = std::fabs(recorded.value() - reference.value()) / reference.value();
  EXPECT_GT(apart, 0.1);
  EXPECT_LE(apart, reference.tie_slack());
}

TEST(Forms, TiesOfPaddingMoveNothingThatLeavesPaddingOut) {
  RoutedLayer l = half_tied();
  l.valid = {0, 0, 0, 0, 1, 1, 1, 1};
  ASSERT_TRUE(l.prepare());
  BalanceForm form = held_to(BalanceFamily::kTransformers);
  BalanceSum without(form);
  form.padding = Padding::kCounted;
  BalanceSum counted(form);
  without.add(l);
  counted.add(l);
  EXPECT_EQ(without.tie_slack(), 0);
  EXPECT_GT(counted.tie_slack(), 0);
}

/// transformers takes one set of the rows of all layers, so it does not matter to which of them a row belongs.
TEST(Forms, LayersThatSawDifferentNumbersOfTokensWeighByThem) {
  RoutedLayer whole = half_tied();
  for (std::size_t i = 0; i < whole.logits.size(); ++i) whole.logits[i] += 0.3 * static_cast<double>(i * i % 7);
  whole.valid = {1, 1, 0, 1, 1, 0, 1, 1};
  RoutedLayer first = whole, rest = whole;
  const std::int64_t cut = 3, n = whole.tokens, e = whole.experts, k = whole.top_k;
  const auto rows = [&](RoutedLayer* l, std::int64_t from, std::int64_t to) {
    l->tokens = to - from;
    l->logits.assign(whole.logits.begin() + from * e, whole.logits.begin() + to * e);
    l->chosen.assign(whole.chosen.begin() + from * k, whole.chosen.begin() + to * k);
    l->valid.assign(whole.valid.begin() + from, whole.valid.begin() + to);
  };
  rows(&first, 0, cut);
  rows(&rest, cut, n);
  ASSERT_TRUE(whole.prepare() && first.prepare() && rest.prepare());
  const BalanceForm form = held_to(BalanceFamily::kTransformers);
  BalanceSum one(form), one_by_one(form), nothing(form), merged(form);
  one.add(whole);
  one_by_one.add(first);
  one_by_one.add(rest);
  EXPECT_NEAR(one_by_one.value(), one.value(), 1e-12);
  merged.add(one_by_one);
  merged.add(nothing);
  EXPECT_EQ(merged.value(), one_by_one.value());
  BalanceSum means(form);  // the mean of the layers' means is another number here
  RoutedLayer again = first;
  for (int i = 0; i < 2; ++i) means.add(again);
  EXPECT_GT(std::fabs(means.value() - one.value()), 1e-3);
}

}  // namespace
}  // namespace moeaudit::variants
