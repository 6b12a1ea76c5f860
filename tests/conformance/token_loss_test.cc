// Cross-entropy: kernels/host against reference/; accumulation equals the whole batch where the normalisation is right,
// and is off by the factor that is written down where it is not (micro-batches of a term as well).
#define BOOST_TEST_MODULE token_loss
#include "kernels/host/token_loss.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/token_loss.h"
#include "tests/support/compare.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using Doubles = std::vector<double>;
using Longs = std::vector<std::int64_t>;
using k::Normalisation;

struct Batch {
  std::int64_t tokens, words;
  Doubles logits;
  Longs labels;
};
Batch batch(std::int64_t tokens, std::int64_t words, double scale) {
  std::vector<float> g(static_cast<std::size_t>(tokens * words));
  k::unit_gaussians(12, 1, 0, tokens * words, g.data());
  Batch b{tokens, words, {}, {}};
  for (float v : g) b.logits.push_back(static_cast<double>(static_cast<float>(scale) * v));  // a float32
  for (std::int64_t t = 0; t < tokens; ++t) b.labels.push_back(t % 5 == 2 ? k::kIgnored : t * 7 % words);
  return b;
}

struct Loss {
  double sum = 0;
  std::int64_t labels = 0;
  Doubles each, gradient;
};
template <class T = double>
Loss loss_of(const Batch& b, std::int64_t first, std::int64_t last, double weight = 1) {
  Loss l;
  l.each.resize(static_cast<std::size_t>(last - first));
  const std::vector<T> logits(b.logits.begin() + first * b.words, b.logits.begin() + last * b.words);
  std::vector<T> gradient(logits.size());
  const k::CrossEntropyArgs<T> a{logits.data(), b.labels.data() + first, last - first, b.words, weight};
  BOOST_REQUIRE(k::cross_entropy(a, {&l.sum, &l.labels, l.each.data(), gradient.data()}) == k::Status::kOk);
  l.gradient.assign(gradient.begin(), gradient.end());
  return l;
}

at::Tensor logits_of(const Batch& b) {
  return at::from_blob(const_cast<double*>(b.logits.data()), {b.tokens, b.words}, at::kDouble).clone();
}
at::Tensor labels_of(const Batch& b) {
  return at::from_blob(const_cast<std::int64_t*>(b.labels.data()), {b.tokens}, at::kLong).clone();
}

template <class T>
void cross_entropy_agrees() {
  struct Shape {
    std::int64_t tokens, words;
    double scale;
  };
  for (const Shape s : {Shape{1, 1, 1}, {7, 2, 1}, {300, 100, 5}, {20, 3000, 30}, {5, 50, 1e4}, {9, 20, 1e-41}}) {
    const Batch b = batch(s.tokens, s.words, s.scale);
    at::Tensor z = logits_of(b).set_requires_grad(true);
    const at::Tensor want = ref::cross_entropy_sum(z, labels_of(b));
    want.backward();
    const double weight = 0.3;
    const Loss got = loss_of<T>(b, 0, s.tokens, weight);
    const auto [low, high] = std::minmax_element(b.logits.begin(), b.logits.end());
    const double largest = std::max(std::fabs(*low), std::fabs(*high)) + std::log(static_cast<double>(s.words));
    const double one =
        bounds::log_sum_exp(s.words, *high - *low, largest) + 2 * k::unit_roundoff(k::Float::kF64) * largest;
    const double truth = want.item<double>();
    BOOST_CHECK_SMALL(got.sum - truth,
                      2 * (static_cast<double>(s.tokens) * one +
                           bounds::gamma(static_cast<double>(s.tokens), k::unit_roundoff(k::Float::kF64)) * truth));
    BOOST_CHECK(got.labels == s.tokens - std::count(b.labels.begin(), b.labels.end(), k::kIgnored));
    const at::Tensor gradient = z.grad().contiguous();
    const double relative = 2 * bounds::softmax_relative(s.words, 0, *high - *low, k::Float::kF64) +
                            bounds::gamma(4, k::unit_roundoff(k::Float::kF64)) +
                            (sizeof(T) == 4 ? k::unit_roundoff(k::Float::kF32) : 0);
    for (std::int64_t i = 0; i < s.tokens * s.words; ++i) {
      const double theirs = weight * gradient.data_ptr<double>()[i];
      BOOST_CHECK_SMALL(got.gradient[static_cast<std::size_t>(i)] - theirs, relative * (1 + std::fabs(theirs)));
    }
  }
}

BOOST_AUTO_TEST_CASE(cross_entropy_agrees_with_the_reference) {
  cross_entropy_agrees<double>();
  cross_entropy_agrees<float>();
}

BOOST_AUTO_TEST_CASE(edges) {
  const double inf = std::numeric_limits<double>::infinity();
  const Batch masked{1, 3, {0, 0, -inf}, {0}};  // a word that cannot be: not in the sum
  const Loss of_masked = loss_of(masked, 0, 1);
  BOOST_CHECK_CLOSE(of_masked.sum, std::log(2.0), 1e-12);
  BOOST_CHECK(of_masked.gradient[2] == 0.0 && of_masked.gradient[1] == 0.5);
  BOOST_CHECK(loss_of({1, 2, {0, -inf}, {1}}, 0, 1).sum == inf);
  BOOST_CHECK(std::isnan(loss_of({1, 2, {inf, 0}, {0}}, 0, 1).sum) && loss_of({1, 2, {inf, 0}, {1}}, 0, 1).sum == inf);
  const Loss nothing = loss_of({0, 2, {}, {}}, 0, 0);
  BOOST_CHECK(nothing.sum == 0.0 && nothing.labels == 0);
  Batch b{1, 4, {1000, 0, 0, 0}, {0}};
  BOOST_CHECK_SMALL(loss_of(b, 0, 1).sum, 1e-300);
  b.labels = {1};
  BOOST_CHECK_CLOSE(loss_of(b, 0, 1).sum, 1000.0, 1e-12);
  b.labels = {k::kIgnored};
  const Loss none = loss_of(b, 0, 1);
  BOOST_CHECK(none.sum == 0.0 && none.labels == 0 && none.gradient == Doubles(4, 0.0));
  double sum = 0;
  std::int64_t labels = 0;
  b.labels = {4};
  BOOST_CHECK((k::cross_entropy(k::CrossEntropyArgs<double>{b.logits.data(), b.labels.data(), 1, 4, 1},
                                {&sum, &labels, nullptr, nullptr}) == k::Status::kBadShape));
  b.labels = {0};
  b.logits[2] = std::numeric_limits<double>::quiet_NaN();
  BOOST_CHECK(std::isnan(loss_of(b, 0, 1).sum));
}

double normalised(Normalisation how, const Doubles& sums, const Longs& labels, std::int64_t ranks,
                  Doubles* weight = nullptr) {
  double loss = -1;
  const auto m = static_cast<std::int64_t>(sums.size()) / ranks;
  if (weight != nullptr) weight->resize(sums.size());
  BOOST_REQUIRE(k::normalise(how, sums.data(), labels.data(), ranks, m, &loss,
                             weight != nullptr ? weight->data() : nullptr) == k::Status::kOk);
  return loss;
}

BOOST_AUTO_TEST_CASE(micro_batches_equal_the_whole_batch) {
  const Batch b = batch(240, 33, 3);
  const Loss whole = loss_of(b, 0, 240, 1.0 / 192);
  BOOST_REQUIRE(whole.labels == 192);
  const Longs ends = {0, 5, 60, 61, 200, 240};  // uneven, one of them a single token
  Doubles sums, weight;
  Longs labels;
  for (std::size_t i = 0; i + 1 < ends.size(); ++i) {
    const Loss part = loss_of(b, ends[i], ends[i + 1]);
    sums.push_back(part.sum);
    labels.push_back(part.labels);
  }
  const double u = k::unit_roundoff(k::Float::kF64);
  BOOST_CHECK_CLOSE_FRACTION(normalised(Normalisation::kTokens, sums, labels, 1, &weight), whole.sum / 192,
                             bounds::gamma(250, u));
  // The gradient of the parts, each with its weight, is that of the whole.
  for (std::size_t i = 0; i + 1 < ends.size(); ++i) {
    const Loss part = loss_of(b, ends[i], ends[i + 1], weight[i]);
    for (std::size_t j = 0; j < part.gradient.size(); ++j) {
      BOOST_CHECK_SMALL(part.gradient[j] - whole.gradient[static_cast<std::size_t>(ends[i] * b.words) + j],
                        8 * u / 192);
    }
  }
  // The mean of means is not: here by more than a hundredth.
  BOOST_CHECK(std::fabs(normalised(Normalisation::kMeanOfMeans, sums, labels, 1) - whole.sum / 192) > 0.01);
}

BOOST_AUTO_TEST_CASE(wrong_normalisations) {
  // 10 tokens at 2.0 and 1000 at 4.0; and sums 1 over 1 and 9 over 3 labels.
  BOOST_CHECK_CLOSE(normalised(Normalisation::kTokens, {20, 4000}, {10, 1000}, 1), 3.9801980198, 1e-8);
  BOOST_CHECK_CLOSE(normalised(Normalisation::kMeanOfMeans, {20, 4000}, {10, 1000}, 1), 3.0, 1e-12);
  BOOST_CHECK_CLOSE(normalised(Normalisation::kTokens, {1, 9}, {1, 3}, 1), 2.5, 1e-12);
  BOOST_CHECK_CLOSE(normalised(Normalisation::kMeanOfMeans, {1, 9}, {1, 3}, 1), 2.0, 1e-12);
  // Even micro-batches: every one is the right loss times its factor. M = 4, W = 2.
  const Doubles sums = {3, 3, 3, 3, 3, 3, 3, 3};
  const Longs labels(8, 2);
  struct Factor {
    Normalisation how;
    double factor;
  };
  for (const Factor f : {Factor{Normalisation::kTokens, 1},
                         {Normalisation::kMeanOfMeans, 1},
                         {Normalisation::kMeansSummed, 4},
                         {Normalisation::kMeansDividedTwice, 0.25},
                         {Normalisation::kTokensTimesSteps, 4},
                         {Normalisation::kTokensDividedTwice, 0.25},
                         {Normalisation::kTokensOfRank, 1},
                         {Normalisation::kTokensTimesRanks, 2},
                         {Normalisation::kTokensOverRanks, 0.5},
                         {Normalisation::kSum, 16}}) {
    BOOST_CHECK_CLOSE(normalised(f.how, sums, labels, 2), 1.5 * f.factor, 1e-12);
  }
  // Ranks with 1 and 3 labels weigh the same in kTokensOfRank.
  BOOST_CHECK_CLOSE(normalised(Normalisation::kTokensOfRank, {1, 9}, {1, 3}, 2), 2.0, 1e-12);
  BOOST_CHECK_CLOSE(normalised(Normalisation::kTokens, {0, 9}, {0, 3}, 1), 3.0, 1e-12);
  BOOST_CHECK_CLOSE(normalised(Normalisation::kMeanOfMeans, {0, 9}, {0, 3}, 1), 1.5, 1e-12);
  double loss = 0;
  const Longs negative = {-1};
  const Doubles one = {1};
  BOOST_CHECK(k::normalise(Normalisation::kTokens, one.data(), negative.data(), 1, 1, &loss, nullptr) ==
              k::Status::kBadShape);
}

at::Tensor table(const Longs& v, std::int64_t ranks) {
  return at::from_blob(const_cast<std::int64_t*>(v.data()), {ranks, static_cast<std::int64_t>(v.size()) / ranks},
                       at::kLong)
      .clone();
}

/// Uneven micro-batches, two of them without a label; the weights are the reference's gradient.
BOOST_AUTO_TEST_CASE(normalisations_agree_with_the_reference) {
  for (const std::int64_t ranks : {1, 3}) {
    const Longs labels = {3, 0, 7, 1, 12, 5, 0, 2, 9, 4, 4, 100};
    Doubles sums;
    for (std::size_t i = 0; i < labels.size(); ++i)
      sums.push_back((1.5 + 0.37 * static_cast<double>(i)) * static_cast<double>(labels[i]));
    for (int how = 0; how <= static_cast<int>(Normalisation::kSum); ++how) {
      at::Tensor s = at::tensor(sums, at::kDouble).reshape({ranks, -1}).set_requires_grad(true);
      const at::Tensor want = ref::normalised(static_cast<ref::Normalisation>(how), s, table(labels, ranks));
      want.backward();
      Doubles weight;
      const double got = normalised(static_cast<Normalisation>(how), sums, labels, ranks, &weight);
      BOOST_CHECK_CLOSE_FRACTION(got, want.item<double>(), bounds::gamma(40, 0x1p-53));
      const at::Tensor slope = s.grad().contiguous();
      for (std::size_t i = 0; i < labels.size(); ++i) {
        if (labels[i] > 0)
          BOOST_CHECK_CLOSE_FRACTION(weight[i], slope.data_ptr<double>()[i], bounds::gamma(10, 0x1p-53));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(weights_of_terms) {
  using k::TermWeight;
  constexpr int kForms = static_cast<int>(TermWeight::kOverExpertRanks) + 1;
  const k::StepShape step{2, 3, 2, 4, 8, 5};
  const auto weights = [&](TermWeight how, const Longs& tokens, const Longs& labels) {
    Doubles w(6, -7);
    BOOST_REQUIRE(k::term_weights(how, step, tokens.data(), labels.data(), w.data()) == k::Status::kOk);
    return w;
  };
  const Longs tokens = {40, 35, 50, 10, 60, 45}, labels = {31, 20, 0, 9, 58, 44};
  for (int how = 0; how < kForms; ++how) {
    at::Tensor terms =
        at::tensor(Doubles{1.2, 1.1, 1.7, 1.0, 2.2, 1.9}, at::kDouble).reshape({2, 3}).set_requires_grad(true);
    ref::joined_terms(static_cast<ref::TermWeight>(how), {2, 4, 8, 5}, terms, table(tokens, 2), table(labels, 2))
        .backward();
    const Doubles got = weights(static_cast<TermWeight>(how), tokens, labels);
    const at::Tensor want = terms.grad().contiguous();
    for (std::size_t i = 0; i < 6; ++i)
      BOOST_CHECK_CLOSE_FRACTION(got[i], want.data_ptr<double>()[i], bounds::gamma(10, 0x1p-53));
  }
  // Even micro-batches whose tokens are all labels: the factors that the header gives. M = 3, W = 2, t = 24.
  const Longs even(6, 24), half(6, 12);
  const double factors[kForms] = {1, 3, 1.0 / (3 * 24), 1.0 / 8, 1.0 / 5, 8, 1.0 / 4, 1, 1.0 / 3, 1, 8};
  for (int how = 0; how < kForms; ++how) {
    for (const double w : weights(static_cast<TermWeight>(how), even, even))
      BOOST_CHECK_CLOSE(w, factors[how] / 6, 1e-12);
  }
  for (const double w : weights(TermWeight::kAllTokens, even, half))
    BOOST_CHECK_CLOSE(w, 2.0 / 6, 1e-12);  // half of them prompts
  Doubles w(6);
  const Longs none(6);
  BOOST_CHECK(k::term_weights(TermWeight::kMean, step, tokens.data(), none.data(), w.data()) == k::Status::kBadShape);
  BOOST_CHECK(k::term_weights(TermWeight::kMean, {2, 0}, tokens.data(), labels.data(), w.data()) ==
              k::Status::kBadShape);
  BOOST_CHECK(k::term_weights(TermWeight::kMean, step, nullptr, labels.data(), w.data()) == k::Status::kNullPointer);
}

}  // namespace
