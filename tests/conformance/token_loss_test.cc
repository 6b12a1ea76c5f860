// Cross-entropy: kernels/host against reference/; accumulation equals the whole batch where the normalisation is right,
// and is off by the factor that is written down where it is not.
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
  for (float v : g) b.logits.push_back(scale * static_cast<double>(v));
  for (std::int64_t t = 0; t < tokens; ++t) b.labels.push_back(t % 5 == 2 ? k::kIgnored : t * 7 % words);
  return b;
}

struct Loss {
  double sum = 0;
  std::int64_t labels = 0;
  Doubles each, gradient;
};
Loss loss_of(const Batch& b, std::int64_t first, std::int64_t last, double weight = 1) {
  Loss l;
  l.each.resize(static_cast<std::size_t>(last - first));
  l.gradient.resize(static_cast<std::size_t>((last - first) * b.words));
  const k::CrossEntropyArgs<double> a{b.logits.data() + first * b.words, b.labels.data() + first, last - first, b.words,
                                      weight};
  BOOST_REQUIRE(k::cross_entropy(a, {&l.sum, &l.labels, l.each.data(), l.gradient.data()}) == k::Status::kOk);
  return l;
}

at::Tensor logits_of(const Batch& b) {
  return at::from_blob(const_cast<double*>(b.logits.data()), {b.tokens, b.words}, at::kDouble).clone();
}
at::Tensor labels_of(const Batch& b) {
  return at::from_blob(const_cast<std::int64_t*>(b.labels.data()), {b.tokens}, at::kLong).clone();
}

BOOST_AUTO_TEST_CASE(cross_entropy_agrees_with_the_reference) {
  struct Shape {
    std::int64_t tokens, words;
    double scale;
  };
  for (const Shape s : {Shape{1, 1, 1}, {7, 2, 1}, {300, 100, 5}, {20, 3000, 30}, {5, 50, 1e4}}) {
    const Batch b = batch(s.tokens, s.words, s.scale);
    at::Tensor z = logits_of(b).set_requires_grad(true);
    const at::Tensor want = ref::cross_entropy_sum(z, labels_of(b));
    want.backward();
    const Loss got = loss_of(b, 0, s.tokens);
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
    const double relative = 2 * bounds::softmax_relative(s.words, 0, *high - *low, k::Float::kF64) + 4e-16;
    for (std::int64_t i = 0; i < s.tokens * s.words; ++i) {
      const double theirs = gradient.data_ptr<double>()[i];
      BOOST_CHECK_SMALL(got.gradient[static_cast<std::size_t>(i)] - theirs, relative * (1 + std::fabs(theirs)));
    }
  }
}

BOOST_AUTO_TEST_CASE(edges) {
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
                         {Normalisation::kTokensOverRanks, 0.5}}) {
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

}  // namespace
