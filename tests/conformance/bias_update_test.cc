// The bias step: kernels/host against reference/ within bounds.h; both against the closed-form test vector; the laws
// that it obeys.
#define BOOST_TEST_MODULE bias_update
#include "kernels/host/bias_update.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/balance_loss.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::tensor;
using moeaudit::test::values;
using Doubles = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr std::int64_t kE = 8;

BOOST_AUTO_TEST_CASE(bias_step_of_the_test_vector) {
  const Doubles counts = {2, 2, 1, 4, 5, 4, 7, 7}, zero(kE);
  const auto step = [&](const Doubles& c, k::Centre centre, double sign = 1) {
    k::BiasUpdateArgs a;
    a.bias = zero.data();
    a.counts = c.data();
    a.experts = kE;
    a.rate = sign * 0.001;
    a.centre = centre;
    Doubles b(kE);
    BOOST_REQUIRE(k::bias_update(a, b.data()) == k::Status::kOk);
    for (double& v : b) v *= 1000;
    return b;
  };
  const auto near = [](const Doubles& got, const Doubles& want) {
    for (std::size_t i = 0; i < want.size(); ++i) BOOST_CHECK_SMALL(got[i] - want[i], 1e-12);
  };
  near(step(counts, k::Centre::kNothing), {1, 1, 1, 0, -1, 0, -1, -1});
  near(step(counts, k::Centre::kStep), {1, 1, 1, 0, -1, 0, -1, -1});
  const Doubles layer = {7, 5, 5, 3, 2, 4, 3, 3};
  near(step(layer, k::Centre::kNothing), {-1, -1, -1, 1, 1, 0, 1, 1});
  near(step(layer, k::Centre::kStep), {-1.125, -1.125, -1.125, 0.875, 0.875, -0.125, 0.875, 0.875});
  near(step(layer, k::Centre::kNothing, -1), {1, 1, 1, -1, -1, 0, -1, -1});  // B1: the wrong sign
}

Doubles stepped(const Doubles& bias, const Doubles& counts, std::int64_t layers, int variant, double rate = 0.001) {
  k::BiasUpdateArgs a;
  a.bias = bias.data(), a.counts = counts.data(), a.layers = layers;
  a.experts = static_cast<std::int64_t>(bias.size()) / layers, a.rate = rate;
  a.step = variant == 1 ? k::BiasStep::kProportional : k::BiasStep::kSign;
  a.centre = variant == 2 ? k::Centre::kStep : variant == 3 ? k::Centre::kBias : k::Centre::kNothing;
  Doubles out(bias.size());
  BOOST_REQUIRE(k::bias_update(a, out.data()) == k::Status::kOk);
  return out;
}

BOOST_AUTO_TEST_CASE(bias_update_agrees_with_the_reference) {
  enum Counts { kSpread, kEven, kOneExpert, kNone, kKinds };
  for (const std::int64_t experts : {1, 8, 144, 160, 384}) {
    for (int kind = kSpread; kind < kKinds; ++kind) {
      const std::int64_t layers = 3;
      std::vector<float> g(static_cast<std::size_t>(layers * experts));
      k::unit_gaussians(4, 1, 0, layers * experts, g.data());
      Doubles bias(g.begin(), g.end()), counts;
      for (std::size_t i = 0; i < g.size(); ++i) {
        const bool first = i % static_cast<std::size_t>(experts) == 0;
        counts.push_back(kind == kSpread      ? std::floor(1000 + 300 * static_cast<double>(g[i]))
                         : kind == kEven      ? 1000
                         : kind == kOneExpert ? (first ? 4096 : 0)
                                              : 0);
      }
      for (const double scale : {1.0, 1e-310}) {  // of the bias and the rate
        for (double& b : bias) b *= scale;
        const double rate = 0.001 * scale;
        for (int variant = 0; variant < 4; ++variant) {
          const Doubles out = stepped(bias, counts, layers, variant, rate);
          const Doubles want =
              values(ref::bias_update(tensor(bias, {layers, experts}), tensor(counts, {layers, experts}), rate,
                                      variant == 1, variant == 2, variant == 3));
          double size = 0;
          for (std::size_t i = 0; i < bias.size(); ++i)
            size = std::max(size, std::fabs(bias[i]) + rate * (variant == 1 ? 2 * 4096 : 1));
          for (std::size_t i = 0; i < out.size(); ++i) {
            const double off = std::fabs(out[i] - want[i]);
            BOOST_CHECK_MESSAGE(
                off <= 2 * bounds::bias_update(experts, size),
                experts << " experts, counts " << kind << ", variant " << variant << " at " << i << ": off by " << off);
            if (kind == kEven || experts == 1) BOOST_CHECK(variant == 3 || out[i] == bias[i]);  // nobody moves
          }
        }
      }
    }
  }
}

/// Experts under other numbers move alike; a step takes as much as it gives where it is centred.
BOOST_AUTO_TEST_CASE(laws) {
  const Doubles bias = {0.5, -0.25, 0, 0.125, 1, -2, 0.75, 0.0625}, counts = {7, 5, 5, 3, 2, 4, 3, 3};
  for (int variant = 0; variant < 4; ++variant) {
    const Doubles out = stepped(bias, counts, 1, variant);
    Doubles b(8), c(8);
    for (std::size_t e = 0; e < 8; ++e) b[(5 * e + 3) % 8] = bias[e], c[(5 * e + 3) % 8] = counts[e];
    const Doubles relabelled = stepped(b, c, 1, variant);
    const double bound = 2 * bounds::bias_update(8, 2 + 0.001 * 14);
    for (std::size_t e = 0; e < 8; ++e) BOOST_CHECK_SMALL(relabelled[(5 * e + 3) % 8] - out[e], bound);
    const double before = std::accumulate(bias.begin(), bias.end(), 0.0),
                 after = std::accumulate(out.begin(), out.end(), 0.0);
    if (variant == 1 || variant == 2)
      BOOST_CHECK_SMALL(after - before, 8 * bound);  // deviations from a mean add up to 0
    if (variant == 3) BOOST_CHECK_SMALL(after, 8 * bound);
  }
}

/// A layer with a count or a bias that is not finite spoils itself alone.
BOOST_AUTO_TEST_CASE(what_is_not_finite_stays_in_its_layer) {
  const Doubles bias(24, 0.25), counts = {7, 5, 5, 3, 2, 4, 3, 3, 1, 2, 3, 4, 5, 6, 7, 8, 8, 1, 1, 2, 2, 3, 3, 4};
  for (int variant = 0; variant < 4; ++variant) {
    const Doubles fine = stepped(bias, counts, 3, variant);
    for (const double bad : {std::nan(""), kInf, -kInf}) {
      for (const bool of_counts : {true, false}) {
        Doubles b = bias, c = counts;
        (of_counts ? c : b)[11] = bad;
        const Doubles out = stepped(b, c, 3, variant);
        const Doubles want = values(
            ref::bias_update(tensor(b, {3, 8}), tensor(c, {3, 8}), 0.001, variant == 1, variant == 2, variant == 3));
        for (std::size_t i = 0; i < 24; ++i) {
          if (i / 8 != 1) BOOST_CHECK(out[i] == fine[i]);
          BOOST_CHECK_MESSAGE(
              std::isnan(out[i]) == std::isnan(want[i]) && std::isinf(out[i]) == std::isinf(want[i]),
              "variant " << variant << " with " << bad << " at " << i << ": " << out[i] << ", not " << want[i]);
        }
      }
    }
  }
}

/// Counts of three ranks and four micro-batches in the counters' own dtype, against LibTorch's tensors of that dtype.
BOOST_AUTO_TEST_CASE(bias_update_over_micro_batches_and_ranks) {
  const std::int64_t ranks = 3, micro = 4, layers = 2, experts = 96;
  std::vector<float> g(static_cast<std::size_t>(ranks * micro * layers * experts));
  k::unit_gaussians(5, 2, 0, static_cast<std::int64_t>(g.size()), g.data());
  Doubles counts;
  for (const float v : g) counts.push_back(std::floor(700 + 250 * static_cast<double>(v)));
  const at::Tensor whole = tensor(counts, {ranks, micro, layers, experts}).to(at::kLong);
  const Doubles zero(static_cast<std::size_t>(layers * experts));
  std::vector<Doubles> signs;
  for (const auto& [dtype, torch] : std::vector<std::pair<k::Float, at::ScalarType>>{{k::Float::kF64, at::kDouble},
                                                                                     {k::Float::kF32, at::kFloat},
                                                                                     {k::Float::kBF16, at::kBFloat16},
                                                                                     {k::Float::kF16, at::kHalf}}) {
    for (const bool proportional : {false, true}) {
      k::BiasUpdateArgs a;
      a.bias = zero.data(), a.counts = counts.data();
      a.ranks = ranks, a.micro_batches = micro, a.layers = layers, a.experts = experts;
      a.rate = 1, a.step = proportional ? k::BiasStep::kProportional : k::BiasStep::kSign, a.counts_dtype = dtype;
      Doubles out(zero.size());
      BOOST_REQUIRE(k::bias_update(a, out.data()) == k::Status::kOk);
      const Doubles want =
          values(ref::bias_update(tensor(zero, {layers, experts}), ref::counted(whole, torch), 1, proportional));
      BOOST_TEST(out == want, boost::test_tools::per_element());
      if (!proportional) signs.push_back(out);
    }
  }
  BOOST_CHECK(signs[0] == signs[1]);
  BOOST_CHECK(signs[0] != signs[2]);  // bfloat16 counters turn steps around
  k::BiasUpdateArgs a;
  a.bias = zero.data(), a.counts = counts.data(), a.experts = experts, a.ranks = 0;
  Doubles out(zero.size());
  BOOST_CHECK(k::bias_update(a, out.data()) == k::Status::kBadShape);
}

BOOST_AUTO_TEST_CASE(bias_update_in_low_precision) {
  // bfloat16 counters hold integers to 256: 300 and 301 are both 300, and the step of 0.001 is 0.00099945068359375.
  const Doubles zero(4), counts = {300, 301, 299, 300};
  Doubles out(4);
  k::BiasUpdateArgs a;
  a.bias = zero.data();
  a.counts = counts.data();
  a.experts = 4;
  a.counts_dtype = a.step_dtype = k::Float::kBF16;
  BOOST_REQUIRE(k::bias_update(a, out.data()) == k::Status::kOk);
  BOOST_CHECK(out[0] == 0.0 && out[1] == 0.0);
  a.counts_dtype = k::Float::kF64;
  BOOST_REQUIRE(k::bias_update(a, out.data()) == k::Status::kOk);
  BOOST_CHECK(out[1] == -0.00099945068359375 && out[2] == 0.00099945068359375);
  // A bfloat16 bias of 0.5 does not grow by 0.001: its neighbours are 0.0039 above and 0.00195 below.
  const Doubles half(4, 0.5);
  a = {};
  a.bias = half.data();
  a.counts = counts.data();
  a.experts = 4;
  a.bias_dtype = k::Float::kBF16;
  BOOST_REQUIRE(k::bias_update(a, out.data()) == k::Status::kOk);
  BOOST_TEST(out == (Doubles{0.5, 0.498046875, 0.5, 0.5}), boost::test_tools::per_element());
  a.rate = kInf;
  BOOST_CHECK(k::bias_update(a, out.data()) == k::Status::kBadOption);
  a.experts = 0;
  BOOST_CHECK(k::bias_update(a, out.data()) == k::Status::kBadShape);
}

}  // namespace
