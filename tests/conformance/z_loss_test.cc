// The z-loss: kernels/host against reference/ within bounds.h; both against the closed-form test vector, of which the
// values of right and wrong formulas are known, and against transformers; every vector width has the same bits.
#define BOOST_TEST_MODULE z_loss
#include "kernels/host/z_loss.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/balance_loss.h"
#include "reference/router.h"
#include "tests/support/compare.h"
#include "tests/support/on_every_target.h"
#include "tests/support/tensors.h"
#include "tests/support/test_vector.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::compare;
using moeaudit::test::CompareOptions;
using moeaudit::test::kE;
using moeaudit::test::kK;
using moeaudit::test::kT;
using moeaudit::test::padded_logits;
using moeaudit::test::padding;
using moeaudit::test::tensor;
using moeaudit::test::top2;
using moeaudit::test::values;
using moeaudit::test::Values;
using moeaudit::test::vector_logits;
using Doubles = std::vector<double>;
using Longs = std::vector<std::int64_t>;
using Mask = std::vector<std::uint8_t>;

constexpr double kInf = std::numeric_limits<double>::infinity();

Doubles score(const Doubles& z, ref::Score s) {
  return values(ref::scores(tensor(z, {static_cast<std::int64_t>(z.size()) / kE, kE}), s));
}

/// A number with nine or more digits written down.
void says(const char* what, double got, double want) {
  BOOST_CHECK_MESSAGE(moeaudit::test::nine_digits(got, want), what << ": " << got << ", not " << want);
}

double z_of(const Doubles& z, const Mask& valid = {}, k::Divisor divisor = k::Divisor::kValidTokens,
            Doubles* lse = nullptr, Doubles* gradient = nullptr, std::int64_t experts = kE) {
  k::ZLossArgs<double> a;
  a.logits = z.data();
  a.valid = valid.empty() ? nullptr : valid.data();
  a.tokens = static_cast<std::int64_t>(z.size()) / experts;
  a.experts = experts;
  a.divisor = divisor;
  double loss = -1;
  k::ZLossResult<double> r;
  r.loss = &loss;
  if (lse != nullptr) lse->resize(static_cast<std::size_t>(a.tokens)), r.log_sum_exp = lse->data();
  if (gradient != nullptr) gradient->resize(z.size()), r.gradient = gradient->data();
  BOOST_REQUIRE(k::z_loss(a, r) == k::Status::kOk);
  return loss;
}

BOOST_AUTO_TEST_CASE(z_loss_of_the_test_vector) {
  const Doubles z = vector_logits(0), y = vector_logits(1);
  Doubles lse;
  says("layer 0", z_of(z, {}, k::Divisor::kValidTokens, &lse), 9.531159145);
  says("layer 1", z_of(y), 8.580354634);
  says("mean of layers", (z_of(z) + z_of(y)) / 2, 9.05575689);
  says("Z2: summed over layers", z_of(z) + z_of(y), 18.11151378);
  says("Z3: of probabilities", z_of(score(z, ref::Score::kSoftmax)), 4.907561327);
  const double squares = std::inner_product(z.begin(), z.end(), z.begin(), 0.0);
  says("Z4: mean of squared logits", squares / (kT * kE), 2.274243152);
  says("Z5: squared logits of a token", squares / kT, 18.19394521);
  const double mean = std::accumulate(lse.begin(), lse.end(), 0.0) / kT;
  says("Z6: square of the mean", mean * mean, 9.457807317);
  says("Z7: no square", mean, 3.075354828);
  says("Z8: over k", z_of(z) / kK, 4.765579573);
  Doubles chosen;
  for (std::size_t t = 0; t < kT; ++t) {
    for (std::size_t j = 0; j < kK; ++j) chosen.push_back(z[t * kE + static_cast<std::size_t>(top2(z)[t * kK + j])]);
  }
  says("Z9: of the chosen alone", z_of(chosen, {}, k::Divisor::kValidTokens, nullptr, nullptr, kK), 7.050116942);
  const Doubles padded = padded_logits();
  says("Z11: padding counted", z_of(padded), 9.346098535);
  says("padding left out", z_of(padded, padding()), 9.691293379);
  says("Z12: over all tokens", z_of(padded, padding(), k::Divisor::kAllTokens), 7.268470034);
}

BOOST_AUTO_TEST_CASE(golden_values_of_transformers) {
  const auto golden = nlohmann::json::parse(std::ifstream(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/balance_loss.json"));
  BOOST_REQUIRE(golden["releases"].size() >= 3);
  for (const auto& [version, release] : golden["releases"].items())
    says("Switch's z-loss", z_of(vector_logits(0)), release["z_loss"]);
}

BOOST_AUTO_TEST_CASE(z_loss_agrees_with_the_reference) {
  struct Shape {
    std::int64_t tokens, experts;
    double scale;
  };
  for (const Shape s :
       {Shape{1, 1, 1}, {5, 8, 1}, {257, 60, 3}, {300, 144, 30}, {64, 384, 1e-3}, {16, 160, 1e4}, {3, 8, 1e-310}}) {
    const auto n = s.tokens * s.experts;
    std::vector<float> g(static_cast<std::size_t>(n));
    k::unit_gaussians(9, 3, 0, n, g.data());
    Doubles z(g.begin(), g.end());
    for (double& v : z) v *= s.scale;
    Mask valid;
    for (std::int64_t t = 0; t < s.tokens; ++t) valid.push_back(t % 4 != 2);
    for (const bool masked : {false, true}) {
      at::Tensor t = tensor(z, {s.tokens, s.experts}).set_requires_grad(true);
      const Longs mask(valid.begin(), valid.end());
      const at::Tensor want = ref::z_loss(t, masked ? tensor(mask, {s.tokens}) : at::Tensor());
      want.backward();
      Doubles lse, gradient;
      const double got = z_of(z, masked ? valid : Mask(), k::Divisor::kValidTokens, &lse, &gradient, s.experts);
      double largest = 0, range = 0;
      for (double v : lse) largest = std::max(largest, std::fabs(v));
      const auto [low, high] = std::minmax_element(z.begin(), z.end());
      range = *high - *low;
      const double error = bounds::log_sum_exp(s.experts, range, largest);
      const double truth = want.item<double>();
      const std::string what = std::to_string(s.tokens) + "x" + std::to_string(s.experts) + (masked ? " masked" : "");
      BOOST_CHECK_MESSAGE(std::fabs(got - truth) <= 2 * bounds::z_loss(s.tokens, error, largest, truth),
                          what << ": " << got << ", not " << truth);
      CompareOptions o;
      const double share = 2 / static_cast<double>(s.tokens - (masked ? std::count(valid.begin(), valid.end(), 0) : 0));
      o.bound = [=](std::size_t, double v) {
        return 2 * bounds::z_loss_gradient(s.experts, range, error, largest, share, v);
      };
      const auto c = compare(Values<double>{{s.tokens, s.experts}, values(t.grad())},
                             Values<double>{{s.tokens, s.experts}, gradient}, o);
      BOOST_CHECK_MESSAGE(c.ok(), what << ": " << c.report());
      // Probabilities add up to 1, so the gradient of a token to 2 lse / T.
      for (std::int64_t row = 0; row < s.tokens; ++row) {
        const double* g = gradient.data() + row * s.experts;
        const double l = masked && valid[static_cast<std::size_t>(row)] == 0 ? 0 : lse[static_cast<std::size_t>(row)];
        BOOST_CHECK_SMALL(std::accumulate(g, g + s.experts, 0.0) - share * l,
                          static_cast<double>(s.experts) *
                              bounds::z_loss_gradient(s.experts, range, 0, largest, share, share * largest));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(z_loss_at_the_edges) {
  BOOST_CHECK_CLOSE(z_of(Doubles(8, 0.0)), std::log(8.0) * std::log(8.0), 1e-12);
  BOOST_CHECK(z_of(Doubles(8, 1e300)) == kInf);  // the square overflows, the log-sum-exp does not
  BOOST_CHECK_CLOSE(z_of(Doubles(8, 5000.0)), std::pow(5000 + std::log(8.0), 2), 1e-12);  // exp(5000) would
  Doubles z(8, -kInf);
  BOOST_CHECK(z_of(z) == kInf);
  z[3] = -2.0;
  BOOST_CHECK_CLOSE(z_of(z), 4.0, 1e-12);
  z[5] = kInf;
  BOOST_CHECK(z_of(z) == kInf);
  z[6] = std::nan("");
  BOOST_CHECK(std::isnan(z_of(z)));
  BOOST_CHECK(z_of(z, Mask{0}) == 0.0);
  // The largest float64: its square is infinite, its gradient 2 lse p / T is not for two tokens, and 0 where p is.
  Doubles huge(16, 0.0), slope;
  huge[1] = huge[10] = -1.5e308;
  huge[2] = huge[9] = 1.5e308;
  BOOST_CHECK(z_of(huge, {}, k::Divisor::kValidTokens, nullptr, &slope) == kInf);
  for (std::size_t i = 0; i < 16; ++i) BOOST_CHECK_EQUAL(slope[i], i == 2 || i == 9 ? 1.5e308 : 0.0);
  // A shift of every logit is a shift of the log-sum-exp.
  Doubles lse, shifted_lse, a = vector_logits(0), b = a;
  for (double& v : b) v += 3;
  z_of(a, {}, k::Divisor::kValidTokens, &lse);
  z_of(b, {}, k::Divisor::kValidTokens, &shifted_lse);
  for (std::size_t t = 0; t < lse.size(); ++t) BOOST_CHECK_SMALL(shifted_lse[t] - lse[t] - 3, 1e-13);
}

/// A token that is not finite spoils the loss and its own gradient, no other's; as padding, nothing.
BOOST_AUTO_TEST_CASE(what_is_not_finite_stays_with_its_token) {
  const Doubles z = vector_logits(0);
  Doubles gradient, spoilt_gradient;
  z_of(z, padding(), k::Divisor::kValidTokens, nullptr, &gradient);
  for (const double bad : {std::nan(""), kInf, -kInf}) {
    for (const std::size_t token : {3, 13}) {
      Doubles w = z;
      w[token * kE + 2] = bad;
      const double loss = z_of(w, padding(), k::Divisor::kValidTokens, nullptr, &spoilt_gradient);
      if (token == 13) BOOST_CHECK(loss == z_of(z, padding()));
      if (token == 3) BOOST_CHECK(std::isfinite(loss) == (bad == -kInf) && std::isnan(loss) == std::isnan(bad));
      for (std::size_t i = 0; i < z.size(); ++i)
        if (token == 13 || i / kE != token) BOOST_CHECK(spoilt_gradient[i] == gradient[i]);
    }
  }
}

template <class T>
void same_on_every_target(std::int64_t tokens, std::int64_t experts) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts));
  k::unit_gaussians(9, 5, 0, tokens * experts, g.data());
  std::vector<T> z;
  for (float v : g) z.push_back(T(v) / 3);
  for (std::size_t i = 7; i < z.size(); i += 191)
    z[i] = i % 3 == 0 && experts > 1 ? T(-kInf) : i % 3 == 1 ? T(-1e4) : T(1e-42);
  double first = 0;
  Doubles first_lse;
  std::vector<T> first_gradient;
  const int targets = moeaudit::test::on_every_target([&] {
    k::ZLossArgs<T> a;
    a.logits = z.data(), a.tokens = tokens, a.experts = experts;
    double loss = 0;
    Doubles lse(static_cast<std::size_t>(tokens));
    std::vector<T> gradient(z.size());
    BOOST_REQUIRE(k::z_loss(a, {&loss, lse.data(), gradient.data()}) == k::Status::kOk);
    BOOST_REQUIRE(std::isfinite(loss));
    if (first_lse.empty()) first = loss, first_lse = lse, first_gradient = gradient;
    BOOST_CHECK(loss == first && lse == first_lse && gradient == first_gradient);
  });
  BOOST_CHECK(targets >= 2);
}
BOOST_AUTO_TEST_CASE(every_vector_width_has_the_same_bits) {
  for (const std::int64_t experts : {1, 3, 8, 17, 64, 144, 384}) {
    for (const std::int64_t tokens : {1, 5, 600}) {
      same_on_every_target<float>(tokens, experts);
      same_on_every_target<double>(tokens, experts);
    }
  }
}

}  // namespace
