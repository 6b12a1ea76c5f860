// Regularisers of the router: kernels/host against reference/ within bounds.h, values and gradients; both against
// closed forms, published values, finite differences and the probabilities that they stand for.
#define BOOST_TEST_MODULE router_regularisers
#include "kernels/host/router_regularisers.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/router.h"
#include "reference/router_regularisers.h"
#include "tests/support/compare.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::compare;
using moeaudit::test::CompareOptions;
using moeaudit::test::tensor;
using moeaudit::test::values;
using moeaudit::test::Values;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;
using Mask = std::vector<std::uint8_t>;
using K = k::Status;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kU = 1.1102230246251565e-16;

at::Tensor leaf(const Doubles& v, std::vector<std::int64_t> shape) {
  return tensor(v, std::move(shape)).set_requires_grad(true);
}
template <class T>
at::Tensor longs(const std::vector<T>& v, std::vector<std::int64_t> shape) {
  const std::vector<std::int64_t> wide(v.begin(), v.end());
  return at::from_blob(const_cast<std::int64_t*>(wide.data()), shape, at::kLong).clone();
}
at::Tensor mask_of(const Mask& m) { return m.empty() ? at::Tensor() : longs(m, {static_cast<std::int64_t>(m.size())}); }
Doubles gradient_of(const at::Tensor& loss, const at::Tensor& leaf) {
  leaf.mutable_grad() = at::Tensor();
  loss.backward({}, /*retain_graph=*/true);
  return values(leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf));
}
Doubles gaussians(std::int64_t n, std::uint64_t stream, double scale = 1) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(14, stream, 0, n, g.data());
  Doubles out(g.begin(), g.end());
  for (double& v : out) v *= scale;
  return out;
}
Mask some_valid(std::int64_t tokens) {
  Mask m;
  for (std::int64_t t = 0; t < tokens; ++t) m.push_back(t % 4 != 1);
  return m;
}
const std::uint8_t* data(const Mask& m) { return m.empty() ? nullptr : m.data(); }
std::int64_t counted(const Mask& m, std::int64_t tokens) {
  return m.empty() ? tokens : std::count_if(m.begin(), m.end(), [](auto v) { return v != 0; });
}
double largest(const Doubles& v) {
  double out = 0;
  for (double x : v) out = std::max(out, std::fabs(x));
  return out;
}

void near(const std::string& what, double got, double want, double bound) {
  BOOST_CHECK_MESSAGE(std::fabs(got - want) <= bound, what << ": " << got << ", not " << want << " within " << bound);
}
void near(const std::string& what, const Doubles& got, const Doubles& want,
          const std::function<double(std::size_t)>& bound) {
  CompareOptions o;
  o.bound = [&](std::size_t i, double) { return bound(i); };
  const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(want.size())};
  const auto c = compare(Values<double>{shape, want}, Values<double>{shape, got}, o);
  BOOST_CHECK_MESSAGE(c.ok(), what << ": " << c.report());
}

/// Of a dot product of n terms whose magnitudes add up to `absolute`.
double dot_in_lanes(std::int64_t n, double absolute) {
  return bounds::sum_of_products(n, bounds::lane_additions(n), absolute, k::Float::kF64);
}
double dot_in_any_order(std::int64_t n, double absolute) {
  return bounds::sum_of_products(n, static_cast<double>(n), absolute, k::Float::kF64);
}

/// Central differences of f along every coordinate of x, against the gradient: off by step^2 / 6 of the third
/// derivative, 2e-11 of it, and by the rounding of f over the step, 1e-11 of f. f must be smooth on the step.
void differences(const std::string& what, Doubles x, const Doubles& gradient,
                 const std::function<double(const Doubles&)>& f, double step = 1e-5) {
  const double scale = std::max(1e-3, largest(gradient));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + step;
    const double above = f(x);
    x[i] = at - step;
    const double below = f(x);
    x[i] = at;
    near(what + " at " + std::to_string(i), gradient[i], (above - below) / (2 * step), 1e-6 * scale);
  }
}

struct Shape {
  std::int64_t tokens, experts, top_k;
};
const std::vector<Shape> kShapes = {{1, 1, 1},    {1, 8, 8},     {7, 8, 2},     {256, 8, 2},
                                    {257, 60, 4}, {300, 144, 6}, {120, 160, 6}, {60, 384, 32}};
std::string name_of(const Shape& s, bool masked) {
  return std::to_string(s.tokens) + "x" + std::to_string(s.experts) + "/" + std::to_string(s.top_k) +
         (masked ? " masked" : "");
}
ref::CvOptions options_of(const k::CvConvention& c) { return {c.variance == k::Variance::kSample, c.eps}; }
const std::vector<k::CvConvention> kConventions = {
    {k::Variance::kPopulation, 0}, {k::Variance::kPopulation, 1e-10}, {k::Variance::kSample, 1e-10}};

/// What CV^2 and its slopes may be off by, for values that are off by `error`.
bounds::CvError cv_error(const Doubles& v, const k::CvConvention& c, double error, double cv) {
  const double mean = std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
  double off = 0;
  for (double x : v) off = std::max(off, std::fabs(x - mean));
  return bounds::cv_squared(static_cast<std::int64_t>(v.size()), error, mean, off, c.eps, cv);
}

// ---- squared coefficient of variation

BOOST_AUTO_TEST_CASE(cv_squared_closed_forms) {
  const Doubles v = {1, 2, 3};
  Doubles slope(3);
  BOOST_CHECK_CLOSE(k::cv_squared(v.data(), 3, {}, slope.data()), 1.0 / 6, 1e-12);
  BOOST_CHECK_CLOSE(k::cv_squared(v.data(), 3, {k::Variance::kSample, 0}, nullptr), 1.0 / 4, 1e-12);
  BOOST_CHECK_CLOSE(k::cv_squared(v.data(), 3, {k::Variance::kPopulation, 4}, nullptr), 1.0 / 12, 1e-12);
  // (2 / (N M^2)) (v_i - sum v^2 / (N M)), M the mean.
  for (std::size_t i = 0; i < 3; ++i) BOOST_CHECK_CLOSE(slope[i], 2.0 / 12 * (v[i] - 14.0 / 6), 1e-11);
  // Everything on one of E: E - 1. The port's variance makes it E.
  const Doubles one = {0, 0, 7, 0};
  BOOST_CHECK_CLOSE(k::cv_squared(one.data(), 4, {}, nullptr), 3.0, 1e-12);
  BOOST_CHECK_CLOSE(k::cv_squared(one.data(), 4, {k::Variance::kSample, 0}, nullptr), 4.0, 1e-12);
  const Doubles alone = {5};
  BOOST_CHECK(k::cv_squared(alone.data(), 1, {k::Variance::kSample, 1e-10}, slope.data()) == 0.0 && slope[0] == 0.0);
  BOOST_CHECK(k::cv_squared(alone.data(), 1, {}, nullptr) == 0.0);
  const Doubles none(4);
  BOOST_CHECK(std::isnan(k::cv_squared(none.data(), 4, {}, nullptr)));
  BOOST_CHECK(k::cv_squared(none.data(), 4, {k::Variance::kPopulation, 1e-10}, nullptr) == 0.0);
  for (const k::CvConvention& c : kConventions) {
    Doubles x = gaussians(12, 1);
    for (double& y : x) y = std::fabs(y) + 0.3;
    Doubles d(12);
    k::cv_squared(x.data(), 12, c, d.data());
    differences("cv", x, d, [&](const Doubles& y) { return k::cv_squared(y.data(), 12, c, nullptr); });
    BOOST_CHECK_SMALL(std::inner_product(x.begin(), x.end(), d.begin(), 0.0), 1e-9);  // no slope along the values
  }
}

// ---- importance

k::ImportanceLossArgs<double> args_of(const Doubles& gates, const Ids& chosen, const Mask& valid, const Shape& s,
                                      const k::CvConvention& c) {
  k::ImportanceLossArgs<double> a;
  a.gates = gates.data(), a.chosen = chosen.empty() ? nullptr : chosen.data(), a.valid = data(valid);
  a.tokens = s.tokens, a.experts = s.experts, a.width = chosen.empty() ? s.experts : s.top_k, a.cv = c, a.weight = 0.1;
  return a;
}

BOOST_AUTO_TEST_CASE(importance_agrees_with_the_reference) {
  for (const Shape& s : kShapes) {
    for (const bool masked : {false, true}) {
      if (masked && s.tokens == 1) continue;
      const at::Tensor z = tensor(gaussians(s.tokens * s.experts, 2, 2), {s.tokens, s.experts});
      ref::RouteOptions o;
      o.top_k = s.top_k, o.score_after_top_k = true;
      const ref::Routed routed = ref::route(z, o);
      for (const bool sparse : {true, false}) {
        const Doubles gates = values(sparse ? routed.weights : ref::scores(z, ref::Score::kSoftmax));
        Ids chosen;
        for (double e : values(routed.chosen)) chosen.push_back(static_cast<std::int32_t>(e));
        for (std::size_t i = 5; i < chosen.size(); i += 7) chosen[i] = -1;
        if (!sparse) chosen.clear();
        const Mask valid = masked ? some_valid(s.tokens) : Mask{};
        for (const k::CvConvention& c : kConventions) {
          const std::int64_t width = sparse ? s.top_k : s.experts;
          const at::Tensor g = leaf(gates, {s.tokens, width});
          const at::Tensor want =
              0.1 * ref::importance_loss(g, sparse ? longs(chosen, {s.tokens, width}) : at::Tensor(), s.experts,
                                         options_of(c), mask_of(valid));
          const k::ImportanceLossArgs<double> a = args_of(gates, chosen, valid, s, c);
          double loss = -7;
          Doubles importance(static_cast<std::size_t>(s.experts)), gradient(gates.size());
          BOOST_REQUIRE(k::importance_loss(a, {&loss, importance.data(), gradient.data()}) == K::kOk);
          const double sum_error = largest(importance) * (bounds::token_sum(s.tokens * s.top_k) +
                                                          bounds::token_sum_in_any_order(s.tokens * s.top_k));
          const bounds::CvError e = cv_error(importance, c, sum_error, want.item<double>() / 0.1);
          near(name_of(s, masked) + " importance", loss, want.item<double>(), 0.2 * e.value);
          near(name_of(s, masked) + " gradient", gradient, gradient_of(want, g),
               [&](std::size_t) { return 0.2 * e.slope; });
        }
      }
    }
  }
}

/// A gate or a score that is not finite spoils the loss, and nothing as padding; denormals add up exactly.
BOOST_AUTO_TEST_CASE(gates_and_scores_at_the_edges) {
  const Shape s{6, 4, 4};
  Doubles gates = values(ref::scores(tensor(gaussians(24, 3), {6, 4}), ref::Score::kSoftmax));
  const auto losses = [&s](const Doubles& g, const Mask& valid) {
    double importance = -7, variance = -7;
    BOOST_REQUIRE(k::importance_loss(args_of(g, {}, valid, s, {}), {&importance, nullptr, nullptr}) == K::kOk);
    k::ScoreVarianceArgs<double> a;
    a.scores = g.data(), a.valid = data(valid), a.tokens = 6, a.experts = 4;
    BOOST_REQUIRE(k::score_variance(a, {&variance, nullptr, nullptr}) == K::kOk);
    return std::pair(importance, variance);
  };
  const Mask padding = {1, 1, 0, 1, 1, 1};
  const auto fine = losses(gates, padding);
  for (const double bad : {std::nan(""), kInf, -kInf}) {
    Doubles g = gates;
    g[2 * 4 + 1] = bad;
    BOOST_CHECK(losses(g, padding) == fine);
    const auto spoilt = losses(g, {});
    BOOST_CHECK(!std::isfinite(spoilt.first) && !std::isfinite(spoilt.second));
  }
  for (double& g : gates) g = std::ldexp(std::nearbyint(std::ldexp(g, 10)), -1070);  // multiples of 2^-1070
  Doubles sums(4), by_hand(4);
  double loss = 0;
  for (std::size_t i = 0; i < 24; ++i) by_hand[i % 4] += gates[i];
  k::ImportanceLossArgs<double> a = args_of(gates, {}, {}, s, {k::Variance::kPopulation, 1e-10});
  BOOST_REQUIRE(k::importance_loss(a, {&loss, sums.data(), nullptr}) == K::kOk);
  BOOST_CHECK(sums == by_hand && loss == 0.0);  // the squares vanish beside eps
}

BOOST_AUTO_TEST_CASE(published_values_of_v_moe) {
  // google-research/vmoe at 0b17946f, vmoe/nn/routing_test.py: its inputs, and what it expects to six places.
  const Doubles gates = {.5, .4, .1, .3, .3, .4, .1, .2, .7, .8, .2, .0};
  double loss = 0;
  k::ImportanceLossArgs<double> i = args_of(gates, {}, {}, {4, 3, 3}, {});
  i.weight = 1;
  BOOST_REQUIRE(k::importance_loss(i, {&loss, nullptr, nullptr}) == K::kOk);
  BOOST_CHECK_SMALL(loss - 0.03874999, 5e-7);
  const Doubles clean = {.9, .06, .04, .7, .18, .12, .85, .05, .1};
  Doubles noise = {-.037, .026, -.018, -.074, .045, -.015, -.067, -.059, .073};
  for (double& v : noise) v /= .1;  // there the noise comes times its standard deviation
  k::LoadLossArgs<double> l;
  l.clean = clean.data(), l.noise = noise.data(), l.tokens = 3, l.experts = 3, l.top_k = 2, l.added = .1;
  l.threshold = k::LoadThreshold::kLastChosen;
  BOOST_REQUIRE(k::load_loss(l, {&loss, nullptr, nullptr, nullptr, nullptr}) == K::kOk);
  BOOST_CHECK_SMALL(loss - 0.48573864536489236, 5e-7);
}

// ---- smooth load

struct Noisy {
  Shape s;
  Doubles clean, noise, raw;
  Mask valid;
  double added;
};
Noisy noisy_of(const Shape& s, bool masked, bool with_raw, std::uint64_t stream) {
  const std::int64_t n = s.tokens * s.experts;
  return {s,
          gaussians(n, stream),
          gaussians(n, stream + 1),
          with_raw ? gaussians(n, stream + 2) : Doubles(),
          masked ? some_valid(s.tokens) : Mask{},
          with_raw ? 0.01 : 0.7};
}
k::LoadLossArgs<double> args_of(const Noisy& x, k::LoadThreshold threshold, const k::CvConvention& c) {
  k::LoadLossArgs<double> a;
  a.clean = x.clean.data(), a.noise = x.noise.data(), a.raw = x.raw.empty() ? nullptr : x.raw.data();
  a.valid = data(x.valid), a.tokens = x.s.tokens, a.experts = x.s.experts, a.top_k = x.s.top_k, a.added = x.added;
  a.threshold = threshold, a.cv = c;
  return a;
}
struct Loaded {
  double loss = -7;
  Doubles load, probability, d_clean, d_raw;
};
Loaded load_of(const k::LoadLossArgs<double>& a) {
  const auto n = static_cast<std::size_t>(a.tokens * a.experts);
  Loaded r{-7, Doubles(static_cast<std::size_t>(a.experts)), Doubles(n), Doubles(n), Doubles(n)};
  BOOST_REQUIRE(k::load_loss(a, {&r.loss, r.load.data(), r.probability.data(), r.d_clean.data(),
                                 a.raw == nullptr ? nullptr : r.d_raw.data()}) == K::kOk);
  return r;
}

BOOST_AUTO_TEST_CASE(load_agrees_with_the_reference) {
  for (const Shape& s : kShapes) {
    for (int variant = 0; variant < 6; ++variant) {
      const bool masked = variant % 2 == 1 && s.tokens > 1;
      const auto threshold = variant < 4 ? k::LoadThreshold::kWithoutSelf : k::LoadThreshold::kLastChosen;
      const k::CvConvention c = kConventions[static_cast<std::size_t>(variant) % 3];
      const Noisy x = noisy_of(s, masked, variant != 2, 10 + static_cast<std::uint64_t>(variant));
      const std::vector<std::int64_t> shape = {s.tokens, s.experts};
      const at::Tensor clean = leaf(x.clean, shape), raw = x.raw.empty() ? at::Tensor() : leaf(x.raw, shape);
      const at::Tensor p = ref::load_probabilities(clean, tensor(x.noise, shape), raw, x.added, s.top_k, variant >= 4);
      const at::Tensor want = ref::load_loss(p, options_of(c), mask_of(x.valid));
      const k::LoadLossArgs<double> a = args_of(x, threshold, c);
      const Loaded got = load_of(a);
      // Errors of the margins, of P (the density is at most 0.4, its slope 0.25), and of the density over stddev.
      Doubles p_error(x.clean.size()), d_error(x.clean.size()), d_size(x.clean.size()), margin(x.clean.size());
      double worst_p = 0;
      const double largest_noise = largest(x.noise);
      const double row_size = largest(x.clean) + largest_noise * (largest(x.raw) + 2);
      for (std::size_t i = 0; i < p_error.size(); ++i) {
        const auto at = static_cast<std::int64_t>(i);
        const double stddev = k::load_stddev(a, at);
        // Every margin of the row is at most this; and phi(u) |u| <= 0.25, so that the quotient's error is, too.
        margin[i] = 2 * row_size / stddev;
        const double error = bounds::load_margin(row_size, stddev, 0) + 11 * kU * 0.25;
        p_error[i] = std::min(1.0, 0.4 * error + bounds::normal_cdf());
        d_error[i] = (0.25 * error + 0.4 * (bounds::gamma(12, kU) + 10 * kU)) / stddev;
        d_size[i] = 0.4 / stddev;
        worst_p = std::max(worst_p, p_error[i]);
      }
      const std::string what = name_of(s, masked) + " variant " + std::to_string(variant);
      near(what + " P", got.probability, values(p), [&](std::size_t i) { return 2 * p_error[i]; });
      const auto n = static_cast<double>(counted(x.valid, s.tokens));
      const double load_error = 2 * n * worst_p + largest(got.load) * 2 * bounds::token_sum_in_any_order(s.tokens);
      const double cv = want.item<double>();
      const bounds::CvError e = cv_error(got.load, c, load_error, cv);
      near(what, got.loss, cv, 2 * e.value);
      const Doubles want_clean = gradient_of(want, clean);
      Doubles want_raw;
      if (raw.defined()) want_raw = gradient_of(want, raw);
      // slope times density over stddev, of the expert itself and, where it sets a threshold, of all of its token.
      Doubles slope(got.load.size());
      k::cv_squared(got.load.data(), s.experts, c, slope.data());
      const double largest_slope = largest(slope);
      Doubles row_errors(static_cast<std::size_t>(s.tokens));
      for (std::size_t j = 0; j < d_error.size(); ++j) {
        row_errors[j / slope.size()] +=
            2 * (largest_slope * d_error[j] + e.slope * d_size[j] +
                 bounds::gamma(static_cast<double>(s.experts) + 2, kU) * largest_slope * d_size[j]);
      }
      const auto row_error = [&](std::size_t i) { return row_errors[i / slope.size()]; };
      near(what + " d clean", got.d_clean, want_clean, row_error);
      if (raw.defined())
        near(what + " d raw", got.d_raw, want_raw, [&](std::size_t i) {
          return 2 * (row_error(i) * (largest_noise + margin[i]) + 16 * kU * largest_slope * margin[i] * d_size[i]);
        });
    }
  }
}

BOOST_AUTO_TEST_CASE(load_is_the_chance_of_being_chosen) {
  // What P(t, e) stands for: the noise of e alone is drawn again, that of the others stays.
  const Noisy x = noisy_of({3, 6, 2}, false, true, 40);
  const Loaded got = load_of(args_of(x, k::LoadThreshold::kWithoutSelf, {}));
  constexpr int kDraws = 20'000;
  for (std::size_t t = 0; t < 3; ++t) {
    for (std::size_t e = 0; e < 6; ++e) {
      const auto stddev = [&](std::size_t i) { return std::log1p(std::exp(x.raw[i])) + x.added; };
      const Doubles again = gaussians(kDraws, 1000 + t * 6 + e);
      int chosen = 0;
      for (double g : again) {
        const double mine = x.clean[t * 6 + e] + g * stddev(t * 6 + e);
        int above = 0;
        for (std::size_t i = 0; i < 6; ++i)
          above += i != e && x.clean[t * 6 + i] + x.noise[t * 6 + i] * stddev(t * 6 + i) > mine;
        chosen += above < 2;
      }
      const double p = got.probability[t * 6 + e], share = chosen / static_cast<double>(kDraws);
      near("P of " + std::to_string(t) + ", " + std::to_string(e), share, p,
           5 * std::sqrt(p * (1 - p) / kDraws) + 1.0 / kDraws);
    }
  }
}

BOOST_AUTO_TEST_CASE(load_differences_and_laws) {
  for (const auto threshold : {k::LoadThreshold::kWithoutSelf, k::LoadThreshold::kLastChosen}) {
    Noisy x = noisy_of({5, 6, 2}, true, true, 60);
    const Loaded got = load_of(args_of(x, threshold, kConventions[2]));
    const auto loss = [&](Doubles Noisy::*of) {
      return [&x, of, threshold](const Doubles& v) {
        Noisy y = x;
        y.*of = v;
        return load_of(args_of(y, threshold, kConventions[2])).loss;
      };
    };
    differences("clean", x.clean, got.d_clean, loss(&Noisy::clean));
    differences("raw", x.raw, got.d_raw, loss(&Noisy::raw));
    // A shift of a token's logits changes no margin, so its gradient adds up to 0; padding has none.
    for (std::size_t t = 0; t < 5; ++t)
      BOOST_CHECK_SMALL(std::accumulate(got.d_clean.begin() + static_cast<std::ptrdiff_t>(6 * t),
                                        got.d_clean.begin() + static_cast<std::ptrdiff_t>(6 * t) + 6, 0.0),
                        1e-15);
    BOOST_CHECK(largest({got.d_clean.begin() + 6, got.d_clean.begin() + 12}) == 0.0);
  }
  // k = E: all are certain, and the ports count gates above 0 instead: the same load.
  const Loaded all = load_of(args_of(noisy_of({4, 5, 5}, false, true, 70), k::LoadThreshold::kWithoutSelf, {}));
  BOOST_CHECK(all.load == Doubles(5, 4.0) && all.loss == 0.0 && largest(all.d_clean) == 0.0 &&
              largest(all.d_raw) == 0.0);
  // Equal logits with equal noise: the thresholds are equal, every P one half, whoever is ranked first.
  Noisy even = noisy_of({2, 4, 2}, false, true, 80);
  even.clean.assign(8, 0.5), even.noise.assign(8, 0.0), even.raw.assign(8, 0.0);
  const Loaded tied = load_of(args_of(even, k::LoadThreshold::kWithoutSelf, {}));
  for (double p : tied.probability) BOOST_CHECK_SMALL(p - 0.5, 1e-15);
  // Without noise the chance is 0 or 1, and the load the count; at the threshold itself 0 / 0.
  Noisy sharp = noisy_of({3, 5, 2}, false, false, 90);
  sharp.added = 0;
  const Loaded hard = load_of(args_of(sharp, k::LoadThreshold::kWithoutSelf, {}));
  BOOST_CHECK(std::accumulate(hard.load.begin(), hard.load.end(), 0.0) == 6.0);
  BOOST_CHECK(std::all_of(hard.probability.begin(), hard.probability.end(), [](double p) { return p == 0 || p == 1; }));
  // A tiny stddev, infinities and NaN stay where they are.
  Noisy odd = noisy_of({3, 5, 2}, false, true, 95);
  odd.clean[1] = std::nan(""), odd.clean[7] = kInf;
  const Loaded far = load_of(args_of(odd, k::LoadThreshold::kWithoutSelf, {}));
  BOOST_CHECK(std::isnan(far.probability[1]) && far.probability[7] == 1.0 && std::isnan(far.loss));
  BOOST_CHECK(far.probability[12] >= 0 && far.probability[12] <= 1);
}

// ---- entropy

k::EntropyLossArgs<double> args_of(const Doubles& z, const Mask& valid, std::int64_t tokens, std::int64_t experts,
                                   k::EntropyOf of, k::EntropySense sense = k::EntropySense::kPenalty) {
  k::EntropyLossArgs<double> a;
  a.logits = z.data(), a.valid = data(valid), a.tokens = tokens, a.experts = experts, a.of = of, a.sense = sense;
  return a;
}
struct Entropy {
  double loss = -7, entropy = -7;
  Doubles token, mean, gradient;
};
Entropy entropy_of(const k::EntropyLossArgs<double>& a) {
  Entropy r{-7, -7, Doubles(static_cast<std::size_t>(a.tokens)), Doubles(static_cast<std::size_t>(a.experts)),
            Doubles(static_cast<std::size_t>(a.tokens * a.experts))};
  BOOST_REQUIRE(k::entropy_loss(a, {&r.loss, &r.entropy, r.token.data(), r.mean.data(), r.gradient.data()}) == K::kOk);
  return r;
}

BOOST_AUTO_TEST_CASE(entropy_agrees_with_the_reference) {
  for (const Shape& s : kShapes) {
    for (const double scale : {1e-3, 1.0, 30.0}) {
      for (const bool masked : {false, true}) {
        if (masked && s.tokens == 1) continue;
        const Doubles z = gaussians(s.tokens * s.experts, 5, scale);
        const Mask valid = masked ? some_valid(s.tokens) : Mask{};
        const auto [low, high] = std::minmax_element(z.begin(), z.end());
        const double range = *high - *low, n = static_cast<double>(counted(valid, s.tokens));
        const double p_error = bounds::softmax_relative(s.experts, 0, range, k::Float::kF64);
        for (const auto of : {k::EntropyOf::kTokens, k::EntropyOf::kMean}) {
          const at::Tensor l = leaf(z, {s.tokens, s.experts});
          const at::Tensor want = ref::routing_entropy(l, of == k::EntropyOf::kMean, mask_of(valid));
          const Entropy got = entropy_of(args_of(z, valid, s.tokens, s.experts, of));
          const std::string what = name_of(s, masked) + " times " + std::to_string(scale);
          const double most = std::log(static_cast<double>(s.experts));
          // A token: bounds.h. The mean of p: relative p_error and those of its sum; -p ln p then changes by (|ln p| +
          // 1) p times that, which is at most (ln E + 1) in all.
          const double sums = bounds::token_sum(s.tokens) + bounds::token_sum_in_any_order(s.tokens) + 2 * kU;
          const double error =
              of == k::EntropyOf::kTokens
                  ? bounds::entropy(s.experts, range, most) + sums * most
                  : (p_error + sums + bounds::gamma(static_cast<double>(s.experts) + 6, kU)) * (most + 1);
          near(what, got.loss, want.item<double>(), 2 * error);
          // d = share p (...): |ln p| <= range + ln E.
          const double log_p = range + most + 1;
          const double d =
              2 * (p_error * log_p + error + sums + bounds::gamma(static_cast<double>(s.experts) + 8, kU) * log_p) / n;
          near(what + " gradient", got.gradient, gradient_of(want, l), [&](std::size_t) { return d; });
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(entropy_closed_forms_and_senses) {
  const Doubles even(2 * 8, 3.0);
  using Of = k::EntropyOf;
  using Sense = k::EntropySense;
  for (const Of of : {Of::kTokens, Of::kMean}) {
    const Entropy e = entropy_of(args_of(even, {}, 2, 8, of));
    BOOST_CHECK_CLOSE(e.loss, std::log(8.0), 1e-12);
    BOOST_CHECK_SMALL(largest(e.gradient), 1e-16);
  }
  // Sure tokens, each of an expert of its own: no entropy a token, all of it in the mean.
  Doubles sure(8 * 8, -kInf);
  for (std::size_t t = 0; t < 8; ++t) sure[9 * t] = 1;
  BOOST_CHECK(entropy_of(args_of(sure, {}, 8, 8, Of::kTokens)).loss == 0.0);
  BOOST_CHECK_CLOSE(entropy_of(args_of(sure, {}, 8, 8, Of::kMean)).loss, std::log(8.0), 1e-12);
  BOOST_CHECK(largest(entropy_of(args_of(sure, {}, 8, 8, Of::kTokens)).gradient) == 0.0);
  // Nearly sure: H = q (1 - ln q) to first order, where 1 - sum p^2 or ln of a rounded p would have lost it.
  const Entropy nearly = entropy_of(args_of({0.0, -40.0}, {}, 1, 2, Of::kTokens));
  BOOST_CHECK_CLOSE(nearly.loss, std::exp(-40.0) * 41, 1e-12);
  const Doubles z = gaussians(6 * 5, 7);
  for (const Of of : {Of::kTokens, Of::kMean}) {
    k::EntropyLossArgs<double> a = args_of(z, some_valid(6), 6, 5, of);
    const Mask valid = some_valid(6);
    a.valid = valid.data();
    a.weight = 0.5;
    const Entropy penalty = entropy_of(a);
    BOOST_CHECK_CLOSE(penalty.loss, 0.5 * penalty.entropy, 1e-12);
    a.sense = Sense::kReward;
    BOOST_CHECK(entropy_of(a).loss == -penalty.loss);
    a.sense = Sense::kShortfall;
    a.threshold = penalty.entropy + 0.25;
    const Entropy shortfall = entropy_of(a);
    BOOST_CHECK_CLOSE(shortfall.loss, 0.125, 1e-10);
    for (std::size_t i = 0; i < z.size(); ++i) BOOST_CHECK(shortfall.gradient[i] == -penalty.gradient[i]);
    a.threshold = penalty.entropy - 0.25;
    BOOST_CHECK(entropy_of(a).loss == 0.0 && largest(entropy_of(a).gradient) == 0.0);
    a.sense = Sense::kPenalty;
    a.over_log_experts = true;
    BOOST_CHECK_CLOSE(entropy_of(a).loss, penalty.loss / std::log(5.0), 1e-12);
    differences("entropy", z, entropy_of(a).gradient, [a](const Doubles& v) {
      k::EntropyLossArgs<double> b = a;
      b.logits = v.data();
      return entropy_of(b).loss;
    });
    // A shift of a token's logits changes nothing.
    for (std::size_t t = 0; t < 6; ++t)
      BOOST_CHECK_SMALL(std::accumulate(penalty.gradient.begin() + static_cast<std::ptrdiff_t>(5 * t),
                                        penalty.gradient.begin() + static_cast<std::ptrdiff_t>(5 * t) + 5, 0.0),
                        1e-16);
  }
  BOOST_CHECK(std::isnan(entropy_of(args_of({0.0, std::nan("")}, {}, 1, 2, Of::kTokens)).loss));
  BOOST_CHECK(std::isnan(entropy_of(args_of({-kInf, -kInf}, {}, 1, 2, Of::kMean)).loss));
  BOOST_CHECK(entropy_of(args_of({0.0, std::nan("")}, Mask{0}, 1, 2, Of::kTokens)).loss == 0.0);
  const Doubles one = {4.0};
  k::EntropyLossArgs<double> lone = args_of(one, {}, 1, 1, Of::kTokens);
  lone.over_log_experts = true;
  BOOST_CHECK(entropy_of(lone).loss == 0.0);
}

// ---- orthogonality of the gate

struct Gram {
  double loss = -7;
  Doubles gram, gradient;
};
Gram gate_of(const Doubles& w, std::int64_t experts, std::int64_t hidden, k::GramNorm norm) {
  Gram r{-7, Doubles(static_cast<std::size_t>(experts * experts)), Doubles(w.size())};
  k::GateOrthogonalityArgs<double> a;
  a.w = w.data(), a.experts = experts, a.hidden = hidden, a.norm = norm;
  BOOST_REQUIRE(k::gate_orthogonality(a, {&r.loss, r.gram.data(), r.gradient.data()}) == K::kOk);
  return r;
}

BOOST_AUTO_TEST_CASE(gate_orthogonality_agrees_with_the_reference) {
  struct Size {
    std::int64_t experts, hidden;
  };
  for (const Size s : {Size{1, 1}, {8, 33}, {8, 7}, {60, 128}, {144, 100}, {160, 31}, {384, 64}}) {
    const Doubles w = gaussians(s.experts * s.hidden, 6, 0.2);
    for (const auto norm : {k::GramNorm::kEntrywiseL1, k::GramNorm::kSquaredFrobenius}) {
      const bool squared = norm == k::GramNorm::kSquaredFrobenius;
      const at::Tensor l = leaf(w, {s.experts, s.hidden});
      const at::Tensor want = ref::gate_orthogonality(l, squared);
      const Gram got = gate_of(w, s.experts, s.hidden, norm);
      // |w_e||w_f| bounds the magnitudes of a dot product.
      double longest = 0, off = 0;
      for (std::size_t i = 0; i < got.gram.size(); ++i) {
        const bool diagonal = i % (static_cast<std::size_t>(s.experts) + 1) == 0;
        if (diagonal) longest = std::max(longest, got.gram[i]);
        off = std::max(off, std::fabs(got.gram[i] - (diagonal ? 1 : 0)));
      }
      const double error = dot_in_lanes(s.hidden, longest) + dot_in_any_order(s.hidden, longest) + 2 * kU * off;
      const auto n = static_cast<double>(s.experts);
      const double value = want.item<double>();
      near("loss", got.loss, value,
           n * n * error * (squared ? 2 * off + error : 1) + 2 * bounds::gamma(n * n + 2, kU) * value);
      // The signs of the L1 form are exact unless an entry is within its error of 0.
      if (!squared) {
        for (std::size_t i = 0; i < got.gram.size(); ++i)
          BOOST_REQUIRE(std::fabs(got.gram[i] - (i % (static_cast<std::size_t>(s.experts) + 1) == 0 ? 1 : 0)) > error);
      }
      const double x = largest(w), d = n * x * (squared ? 4 * error : 0) +
                                       2 * bounds::gamma(n + 4, kU) * n * x * (squared ? 4 * off : 2);
      near("gradient", got.gradient, gradient_of(want, l), [&](std::size_t) { return d; });
    }
  }
}

BOOST_AUTO_TEST_CASE(gate_orthogonality_closed_forms) {
  using N = k::GramNorm;
  Doubles w(3 * 5);
  for (std::size_t e = 0; e < 3; ++e) w[6 * e] = 1;
  for (const N n : {N::kEntrywiseL1, N::kSquaredFrobenius}) {
    const Gram eye = gate_of(w, 3, 5, n);
    BOOST_CHECK(eye.loss == 0.0 && largest(eye.gradient) == 0.0);  // sgn 0 = 0
  }
  for (double& v : w) v *= 2;  // three diagonal entries of 4
  BOOST_CHECK(gate_of(w, 3, 5, N::kEntrywiseL1).loss == 9.0);
  BOOST_CHECK(gate_of(w, 3, 5, N::kSquaredFrobenius).loss == 27.0);
  BOOST_CHECK(gate_of(w, 3, 5, N::kEntrywiseL1).gradient[0] == 4.0);        // 2 sgn(3) 2
  BOOST_CHECK(gate_of(w, 3, 5, N::kSquaredFrobenius).gradient[0] == 24.0);  // 4 * 3 * 2
  // All experts the same unit row: E (E - 1) entries of 1 beside the diagonal.
  Doubles same(4 * 2);
  for (std::size_t e = 0; e < 4; ++e) same[2 * e] = 1;
  BOOST_CHECK(gate_of(same, 4, 2, N::kEntrywiseL1).loss == 12.0);
  // More experts than dimensions: with W W^T of rank d, at least E - d eigenvalues of the difference are -1.
  BOOST_CHECK(gate_of(gaussians(8 * 3, 3, 0.5), 8, 3, N::kSquaredFrobenius).loss >= 5.0);
  const Doubles z = gaussians(4 * 6, 9, 0.4);
  for (const N n : {N::kEntrywiseL1, N::kSquaredFrobenius}) {
    const Gram got = gate_of(z, 4, 6, n);
    differences("gate", z, got.gradient, [n](const Doubles& v) { return gate_of(v, 4, 6, n).loss; });
    // Experts under other numbers, and a rotation of the hidden space (here a permutation): the same loss.
    Doubles moved(z.size());
    for (std::size_t e = 0; e < 4; ++e) {
      for (std::size_t i = 0; i < 6; ++i) moved[(e * 3 + 1) % 4 * 6 + (i * 5 + 2) % 6] = z[e * 6 + i];
    }
    BOOST_CHECK_CLOSE(gate_of(moved, 4, 6, n).loss, got.loss, 1e-12);
  }
  BOOST_CHECK(std::isnan(gate_of({1, std::nan("")}, 1, 2, N::kEntrywiseL1).loss));
}

// ---- overlap of the experts' outputs

k::ExpertOverlapArgs<double> args_of(const Doubles& x, const Ids& chosen, const Mask& valid, std::int64_t tokens,
                                     std::int64_t top_k, std::int64_t hidden, k::Overlap overlap, k::OverPairs over) {
  k::ExpertOverlapArgs<double> a;
  a.outputs = x.data(), a.chosen = chosen.empty() ? nullptr : chosen.data(), a.valid = data(valid);
  a.tokens = tokens, a.top_k = top_k, a.hidden = hidden, a.overlap = overlap, a.over_pairs = over;
  return a;
}
struct Overlapped {
  double loss = -7;
  Doubles token, gradient;
};
Overlapped overlap_of(const k::ExpertOverlapArgs<double>& a) {
  Overlapped r{-7, Doubles(static_cast<std::size_t>(a.tokens)),
               Doubles(static_cast<std::size_t>(a.tokens * a.top_k * a.hidden))};
  BOOST_REQUIRE(k::expert_overlap(a, {&r.loss, r.token.data(), r.gradient.data()}) == K::kOk);
  return r;
}
constexpr k::Overlap kOverlaps[] = {k::Overlap::kProjection, k::Overlap::kSquaredProjection, k::Overlap::kCosine};

BOOST_AUTO_TEST_CASE(expert_overlap_agrees_with_the_reference) {
  struct Size {
    std::int64_t tokens, top_k, hidden;
  };
  for (const Size s : {Size{1, 1, 3}, {5, 2, 1}, {257, 2, 40}, {40, 8, 64}, {3, 32, 33}}) {
    const Doubles x = gaussians(s.tokens * s.top_k * s.hidden, 21);
    const std::vector<std::int64_t> shape = {s.tokens, s.top_k, s.hidden};
    for (int variant = 0; variant < 3; ++variant) {
      Ids chosen(static_cast<std::size_t>(s.tokens * s.top_k));
      for (std::size_t i = 0; i < chosen.size(); ++i) chosen[i] = i % 5 == 2 ? -1 : static_cast<std::int32_t>(i % 11);
      std::vector<std::int64_t> there;
      for (auto e : chosen) there.push_back(e >= 0);
      const Mask valid = variant == 2 ? some_valid(s.tokens) : Mask{};
      if (variant == 0) chosen.clear();
      for (const k::Overlap overlap : kOverlaps) {
        for (const bool mean : {false, true}) {
          const at::Tensor l = leaf(x, shape);
          const at::Tensor want =
              ref::expert_overlap(l, variant == 0 ? at::Tensor() : longs(there, {s.tokens, s.top_k}),
                                  static_cast<ref::Overlap>(overlap), 1e-8, mean, mask_of(valid));
          const Overlapped got = overlap_of(args_of(x, chosen, valid, s.tokens, s.top_k, s.hidden, overlap,
                                                    mean ? k::OverPairs::kMean : k::OverPairs::kSum));
          // Dot products of vectors of length at most `long` are off by `error`, by Cauchy and Schwarz; one term by its
          // slopes times that. By length: short is the shortest there is. (At hidden 1 the lengths vary most.)
          double longest = 0, shortest = kInf;
          for (std::size_t i = 0; i < x.size(); i += static_cast<std::size_t>(s.hidden)) {
            double square = 0;
            for (std::size_t c = i; c < i + static_cast<std::size_t>(s.hidden); ++c) square += x[c] * x[c];
            longest = std::max(longest, std::sqrt(square)), shortest = std::min(shortest, std::sqrt(square));
          }
          // The Gram matrix is relatively exact to `error` of |x_j||x_k|. Terms: |x_j| cos, its square, or cos, each
          // with at most 4 factors from it; their gradients grow by at most 1 / |x|.
          const double error = 4 * (dot_in_lanes(s.hidden, 1) + dot_in_any_order(s.hidden, 1)) + 16 * kU;
          const double term = overlap == k::Overlap::kProjection          ? longest
                              : overlap == k::Overlap::kSquaredProjection ? longest * longest
                                                                          : 1.0;
          const double terms = mean ? 1 : static_cast<double>(s.tokens * s.top_k * s.top_k);
          near("overlap", got.loss, want.item<double>(),
               term * terms *
                   (error + 2 * bounds::gamma(terms + static_cast<double>(s.tokens + s.top_k * s.top_k), kU)));
          const double slopes = 4 * static_cast<double>(s.top_k) * (1 + longest / shortest) * term / shortest;
          near("gradient", got.gradient, gradient_of(want, l), [&](std::size_t) {
            return slopes * (2 * error + 2 * bounds::gamma(2 * static_cast<double>(s.top_k) + 8, kU));
          });
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(expert_overlap_closed_forms) {
  using O = k::Overlap;
  using P = k::OverPairs;
  const Doubles apart = {3, 0, 0, 4};  // one token, two experts, orthogonal
  for (const O o : kOverlaps) BOOST_CHECK(overlap_of(args_of(apart, {}, {}, 1, 2, 2, o, P::kSum)).loss == 0.0);
  // x_1 = (3, 4), x_2 = (0, 2): <,> = 8; on x_2 the length is 4, on x_1 8 / 5; cosine 4 / 5.
  const Doubles pair = {3, 4, 0, 2};
  k::ExpertOverlapArgs<double> a = args_of(pair, {}, {}, 1, 2, 2, O::kProjection, P::kSum);
  a.eps = 0;
  BOOST_CHECK_CLOSE(overlap_of(a).loss, 4 + 1.6, 1e-12);
  a.overlap = O::kSquaredProjection;
  BOOST_CHECK_CLOSE(overlap_of(a).loss, 16 + 2.56, 1e-12);
  a.overlap = O::kCosine;
  BOOST_CHECK_CLOSE(overlap_of(a).loss, 1.6, 1e-12);  // both orders
  a.over_pairs = P::kMean;
  BOOST_CHECK_CLOSE(overlap_of(a).loss, 0.8, 1e-12);  // PES: the pair once
  // The same output from every expert: cosine 1, whatever the number; tokens without a pair do not thin the mean.
  const Doubles same(6 * 3 * 2, 0.5);
  Ids chosen(18, 1);
  chosen[0] = chosen[1] = -1;
  BOOST_CHECK_CLOSE(overlap_of(args_of(same, chosen, {}, 6, 3, 2, O::kCosine, P::kMean)).loss, 1.0, 1e-12);
  // One expert a token, nothing to compare; an output of 0; a dropped slot that holds rubbish.
  for (const O o : kOverlaps) {
    const Overlapped lone = overlap_of(args_of(apart, {}, {}, 2, 1, 2, o, P::kMean));
    BOOST_CHECK(lone.loss == 0.0 && largest(lone.gradient) == 0.0);
    const Overlapped zero = overlap_of(args_of({0, 0, 1, 2}, {}, {}, 1, 2, 2, o, P::kSum));
    BOOST_CHECK(zero.loss == 0.0 && largest(zero.gradient) == 0.0);
    const double nan = std::nan("");
    const Overlapped dropped = overlap_of(args_of({nan, nan, 1, 2, 2, 1}, {-1, 4, 5}, {}, 1, 3, 2, o, P::kSum));
    BOOST_CHECK(std::isfinite(dropped.loss) && dropped.loss > 0 && std::isfinite(largest(dropped.gradient)));
    BOOST_CHECK(std::isnan(overlap_of(args_of({nan, 0, 1, 2}, {}, {}, 1, 2, 2, o, P::kSum)).loss));
  }
  const Doubles x = gaussians(3 * 3 * 4, 33);
  for (const O o : kOverlaps) {
    for (const P over : {P::kSum, P::kMean}) {
      const Ids present = {0, 1, 2, 3, -1, 4, 5, 6, 7};
      const Overlapped got = overlap_of(args_of(x, present, {}, 3, 3, 4, o, over));
      differences("overlap", x, got.gradient,
                  [&](const Doubles& v) { return overlap_of(args_of(v, present, {}, 3, 3, 4, o, over)).loss; });
      // Larger outputs: the projection grows with them, its square twice, the cosine does not (Euler).
      const double degree = o == O::kProjection ? 1 : o == O::kSquaredProjection ? 2 : 0;
      BOOST_CHECK_SMALL(std::inner_product(x.begin(), x.end(), got.gradient.begin(), 0.0) - degree * got.loss, 1e-6);
    }
  }
}

// ---- variance of the scores

BOOST_AUTO_TEST_CASE(score_variance_agrees_with_the_reference) {
  for (const Shape& s : kShapes) {
    for (int variant = 0; variant < 4; ++variant) {
      const bool mean = variant % 2 == 1, masked = variant >= 2 && s.tokens > 1;
      const Mask valid = masked ? some_valid(s.tokens) : Mask{};
      const Doubles scores = values(
          ref::scores(tensor(gaussians(s.tokens * s.experts, 8, 2), {s.tokens, s.experts}), ref::Score::kSoftmax));
      const at::Tensor l = leaf(scores, {s.tokens, s.experts});
      const at::Tensor want = ref::score_variance(l, mean, mask_of(valid));
      k::ScoreVarianceArgs<double> a;
      a.scores = scores.data(), a.valid = data(valid), a.tokens = s.tokens, a.experts = s.experts,
      a.mean_over_tokens = mean;
      double loss = -7;
      Doubles gradient(scores.size());
      BOOST_REQUIRE(k::score_variance(a, {&loss, nullptr, gradient.data()}) == K::kOk);
      // A mean is off by m, a difference by m + u, squares of at most 1 by twice that.
      const double n = static_cast<double>(counted(valid, s.tokens));
      const double m = bounds::token_sum(s.tokens) + bounds::token_sum_in_any_order(s.tokens) + 3 * kU;
      const double over = mean ? n : 1;
      near(name_of(s, masked), loss, want.item<double>(),
           n * (3 * m + 2 * bounds::gamma(static_cast<double>(s.tokens * s.experts) + 8, kU)) / over);
      near(name_of(s, masked) + " gradient", gradient, gradient_of(want, l),
           [&](std::size_t) { return 2 / static_cast<double>(s.experts) / over * (m + 8 * kU); });
    }
  }
}

BOOST_AUTO_TEST_CASE(score_variance_closed_forms) {
  // Two tokens, two experts, hard and opposite: every score is 1/2 from its mean; -(1/2) (4 / 4).
  const Doubles hard = {1, 0, 0, 1};
  k::ScoreVarianceArgs<double> a;
  a.scores = hard.data(), a.tokens = 2, a.experts = 2;
  double loss = 0;
  Doubles gradient(4);
  BOOST_REQUIRE(k::score_variance(a, {&loss, nullptr, gradient.data()}) == K::kOk);
  BOOST_CHECK(loss == -0.5 && gradient == (Doubles{-0.5, 0.5, 0.5, -0.5}));
  a.mean_over_tokens = true;
  BOOST_REQUIRE(k::score_variance(a, {&loss, nullptr, nullptr}) == K::kOk);
  BOOST_CHECK(loss == -0.25);
  // Differences give -(2 / E)(s - mean); the paper's -(2 (T - 1) / (E T))(s - mean) is 4/5 of it at T = 5.
  const Doubles s = gaussians(5 * 4, 12);
  const auto f = [](const Doubles& v) {
    k::ScoreVarianceArgs<double> b;
    b.scores = v.data(), b.tokens = 5, b.experts = 4;
    double out = 0;
    BOOST_REQUIRE(k::score_variance(b, {&out, nullptr, nullptr}) == K::kOk);
    return out;
  };
  a = {};
  a.scores = s.data(), a.tokens = 5, a.experts = 4;
  gradient.resize(20);
  BOOST_REQUIRE(k::score_variance(a, {&loss, nullptr, gradient.data()}) == K::kOk);
  differences("variance", s, gradient, f);
  double mean = 0;
  for (std::size_t t = 0; t < 5; ++t) mean += s[4 * t] / 5;
  BOOST_CHECK_CLOSE(gradient[0], -(2.0 / 4) * (s[0] - mean), 1e-10);
  BOOST_CHECK_CLOSE(-(2.0 * 4 / (4 * 5)) * (s[0] - mean), 0.8 * gradient[0], 1e-10);
}

// ---- what all share

template <class T>
std::vector<T> as(const Doubles& v) {
  return {v.begin(), v.end()};
}

/// float32 inputs are numbers of float64: the same losses, and gradients rounded once.
BOOST_AUTO_TEST_CASE(float32_inputs) {
  const std::int64_t tokens = 70, experts = 9;
  const Doubles z = gaussians(tokens * experts, 50), n = gaussians(tokens * experts, 51),
                r = gaussians(tokens * experts, 52);
  const auto zf = as<float>(z), nf = as<float>(n), rf = as<float>(r);
  double wide = 0, narrow = 1;
  Doubles d(z.size()), e(z.size());
  std::vector<float> df(z.size()), ef(z.size());
  const auto same = [&](const char* what) {
    BOOST_CHECK_MESSAGE(wide == narrow, what);
    for (std::size_t i = 0; i < d.size(); ++i) BOOST_REQUIRE_MESSAGE(df[i] == static_cast<float>(d[i]), what);
  };
  {
    k::LoadLossArgs<double> a;
    a.clean = z.data(), a.noise = n.data(), a.raw = r.data(), a.tokens = tokens, a.experts = experts, a.top_k = 2;
    k::LoadLossArgs<float> b;
    b.clean = zf.data(), b.noise = nf.data(), b.raw = rf.data(), b.tokens = tokens, b.experts = experts, b.top_k = 2;
    BOOST_REQUIRE(k::load_loss(a, {&wide, nullptr, nullptr, d.data(), e.data()}) == K::kOk);
    BOOST_REQUIRE(k::load_loss(b, {&narrow, nullptr, nullptr, df.data(), ef.data()}) == K::kOk);
    same("load");
    BOOST_CHECK(
        std::equal(ef.begin(), ef.end(), e.begin(), [](float x, double y) { return x == static_cast<float>(y); }));
  }
  {
    k::EntropyLossArgs<double> a;
    a.logits = z.data(), a.tokens = tokens, a.experts = experts;
    k::EntropyLossArgs<float> b;
    b.logits = zf.data(), b.tokens = tokens, b.experts = experts;
    BOOST_REQUIRE(k::entropy_loss(a, {&wide, nullptr, nullptr, nullptr, d.data()}) == K::kOk);
    BOOST_REQUIRE(k::entropy_loss(b, {&narrow, nullptr, nullptr, nullptr, df.data()}) == K::kOk);
    same("entropy");
  }
  {
    k::ImportanceLossArgs<double> a;
    a.gates = z.data(), a.tokens = tokens, a.experts = a.width = experts;
    k::ImportanceLossArgs<float> b;
    b.gates = zf.data(), b.tokens = tokens, b.experts = b.width = experts;
    BOOST_REQUIRE(k::importance_loss(a, {&wide, nullptr, d.data()}) == K::kOk);
    BOOST_REQUIRE(k::importance_loss(b, {&narrow, nullptr, df.data()}) == K::kOk);
    same("importance");
  }
  {
    k::GateOrthogonalityArgs<double> a{z.data(), experts, tokens, k::GramNorm::kSquaredFrobenius, 1};
    k::GateOrthogonalityArgs<float> b{zf.data(), experts, tokens, k::GramNorm::kSquaredFrobenius, 1};
    BOOST_REQUIRE(k::gate_orthogonality(a, {&wide, nullptr, d.data()}) == K::kOk);
    BOOST_REQUIRE(k::gate_orthogonality(b, {&narrow, nullptr, df.data()}) == K::kOk);
    same("gate");
  }
  {
    k::ExpertOverlapArgs<double> a;
    a.outputs = z.data(), a.tokens = 7, a.top_k = 3, a.hidden = 30;
    k::ExpertOverlapArgs<float> b;
    b.outputs = zf.data(), b.tokens = 7, b.top_k = 3, b.hidden = 30;
    BOOST_REQUIRE(k::expert_overlap(a, {&wide, nullptr, d.data()}) == K::kOk);
    BOOST_REQUIRE(k::expert_overlap(b, {&narrow, nullptr, df.data()}) == K::kOk);
    same("overlap");
  }
  {
    k::ScoreVarianceArgs<double> a;
    a.scores = z.data(), a.tokens = tokens, a.experts = experts;
    k::ScoreVarianceArgs<float> b;
    b.scores = zf.data(), b.tokens = tokens, b.experts = experts;
    BOOST_REQUIRE(k::score_variance(a, {&wide, nullptr, d.data()}) == K::kOk);
    BOOST_REQUIRE(k::score_variance(b, {&narrow, nullptr, df.data()}) == K::kOk);
    same("variance");
  }
}

BOOST_AUTO_TEST_CASE(refused) {
  const Doubles v(8, 0.5);
  double loss = 0;
  const Ids chosen = {0, 1, 2, 4};
  k::ImportanceLossArgs<double> i = args_of(v, chosen, {}, {2, 4, 2}, {});
  BOOST_CHECK(k::importance_loss(i, {&loss, nullptr, nullptr}) == K::kBadShape);  // no expert 4
  i.chosen = nullptr;
  BOOST_CHECK(k::importance_loss(i, {&loss, nullptr, nullptr}) == K::kBadTopK);  // 2 gates of 4 experts, of which?
  i.width = 4;
  BOOST_CHECK(k::importance_loss(i, {nullptr, nullptr, nullptr}) == K::kNullPointer);
  Doubles d(8);
  k::LoadLossArgs<double> l;
  l.clean = l.noise = v.data(), l.tokens = 2, l.experts = 4, l.top_k = 5, l.added = 1;
  BOOST_CHECK(k::load_loss(l, {&loss, nullptr, nullptr, nullptr, nullptr}) == K::kBadTopK);
  l.top_k = 2;
  BOOST_CHECK(k::load_loss(l, {&loss, nullptr, nullptr, nullptr, d.data()}) == K::kBadOption);
  l.noise = nullptr;
  BOOST_CHECK(k::load_loss(l, {&loss, nullptr, nullptr, nullptr, nullptr}) == K::kNullPointer);
  k::EntropyLossArgs<double> e = args_of(v, {}, 2, 0, k::EntropyOf::kMean);
  BOOST_CHECK(k::entropy_loss(e, {&loss, nullptr, nullptr, nullptr, nullptr}) == K::kBadShape);
  k::GateOrthogonalityArgs<double> g{nullptr, 4, 2, k::GramNorm::kEntrywiseL1, 1};
  BOOST_CHECK(k::gate_orthogonality(g, {&loss, nullptr, nullptr}) == K::kNullPointer);
  k::ExpertOverlapArgs<double> o = args_of(v, {}, {}, 2, 2, 2, k::Overlap::kCosine, k::OverPairs::kSum);
  o.eps = std::nan("");
  BOOST_CHECK(k::expert_overlap(o, {&loss, nullptr, nullptr}) == K::kBadOption);
  k::ScoreVarianceArgs<double> s;
  s.experts = 4;
  BOOST_CHECK(k::score_variance(s, {&loss, nullptr, nullptr}) == K::kOk && loss == 0.0);  // no token
  s.tokens = -1;
  BOOST_CHECK(k::score_variance(s, {&loss, nullptr, nullptr}) == K::kBadShape);
}

}  // namespace
