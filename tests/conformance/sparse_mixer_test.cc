// SparseMixer: kernels/host against reference/ and its autograd, both against formulas written out, and the kernels
// against what sparsemixer() of transformers made of the same logits (fixtures/make/sparse_mixer_golden.py).
#define BOOST_TEST_MODULE sparse_mixer
#include "kernels/host/sparse_mixer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/sparse_mixer.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using k::Float;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

at::Tensor tensor(const Doubles& v, std::int64_t rows) {
  return at::from_blob(const_cast<double*>(v.data()), {rows, static_cast<std::int64_t>(v.size()) / rows}, at::kDouble)
      .clone();
}
at::Tensor ids(const Ids& v) {
  return at::from_blob(const_cast<std::int32_t*>(v.data()), {static_cast<std::int64_t>(v.size()) / 2, 2}, at::kInt)
      .to(at::kLong);
}
Doubles values(const at::Tensor& t) {
  const at::Tensor c = t.detach().to(at::kDouble).contiguous();
  return {c.data_ptr<double>(), c.data_ptr<double>() + c.numel()};
}

/// Gaussian logits, in every other row several that are a multiple of 0.6 % below the largest; equals among them.
Doubles logits_of(std::int64_t tokens, std::int64_t experts, double scale, std::uint64_t stream = 1) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts));
  k::unit_gaussians(31, stream, 0, tokens * experts, g.data());
  Doubles z;
  for (const float v : g) z.push_back(scale * static_cast<double>(v));
  for (std::int64_t t = 0; t < tokens; t += 2) {
    double* row = z.data() + t * experts;
    const double top = *std::max_element(row, row + experts);
    for (std::int64_t e = 0; e < experts; e += 2)
      row[e] = top - std::fabs(top) * 0.006 * static_cast<double>((e + t) % 9 / 2);
  }
  return z;
}
Doubles gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(32, stream, 0, n, g.data());
  return {g.begin(), g.end()};
}

struct Run {
  Ids chosen;
  Doubles weights, p;
  std::vector<std::uint8_t> kept;
};
template <class T>
Run run(const k::SparseMixerArgs<T>& a) {
  const auto slots = static_cast<std::size_t>(2 * a.tokens), all = slots * static_cast<std::size_t>(a.experts);
  Run r{Ids(slots, -7), {}, {}, std::vector<std::uint8_t>(all, 7)};
  std::vector<T> weights(slots, T(-7)), p(all, T(-7));
  BOOST_REQUIRE(k::sparse_mixer(a, {r.chosen.data(), weights.data(), r.kept.data(), p.data()}) == k::Status::kOk);
  r.weights.assign(weights.begin(), weights.end()), r.p.assign(p.begin(), p.end());
  return r;
}
k::SparseMixerArgs<double> args_of(const Doubles& logits, std::int64_t experts, double jitter) {
  k::SparseMixerArgs<double> a;
  a.logits = logits.data(), a.experts = experts, a.tokens = static_cast<std::int64_t>(logits.size()) / experts,
  a.jitter = jitter;
  return a;
}

/// Draws within the mask, and some outside of it, whose weight is 0; the second never the first.
Ids drawn(const Run& evaluation, std::int64_t experts) {
  Ids given;
  for (std::size_t t = 0; 2 * t < evaluation.chosen.size(); ++t) {
    for (std::size_t j = 0; j < 2; ++j) {
      const std::uint8_t* kept = evaluation.kept.data() + (2 * t + j) * static_cast<std::size_t>(experts);
      std::int32_t pick = static_cast<std::int32_t>((t * 7 + j) % static_cast<std::size_t>(experts));
      for (std::int32_t e = 0; t % 5 != 4 && e < experts; ++e) {
        if (kept[(pick + e) % experts] != 0) {
          pick = static_cast<std::int32_t>((pick + e) % experts);
          break;
        }
      }
      if (j == 1 && pick == given.back()) pick = static_cast<std::int32_t>((pick + 1) % experts);
      given.push_back(pick);
    }
  }
  return given;
}

struct Shape {
  std::int64_t tokens, experts;
  double jitter, scale;
};
const std::vector<Shape> kShapes = {{1, 2, 0.01, 1},   {7, 3, 0.0, 1},   {50, 8, 0.01, 2},  {33, 16, 0.1, 0.5},
                                    {3, 160, 0.05, 1}, {2, 144, 1.0, 1}, {2, 384, 0.02, 3}, {40, 64, 0.01, 1e-3}};

double range_of(const double* row, std::int64_t experts) {
  const auto [low, high] = std::minmax_element(row, row + experts);
  return *high - *low;
}

BOOST_AUTO_TEST_CASE(agrees_with_the_reference) {
  std::int64_t several = 0, outside = 0, midpoints = 0;
  for (const Shape& s : kShapes) {
    const std::string what = std::to_string(s.tokens) + "x" + std::to_string(s.experts);
    const Doubles logits = logits_of(s.tokens, s.experts, s.scale);
    k::SparseMixerArgs<double> a = args_of(logits, s.experts, s.jitter);
    const Run evaluation = run(a);
    const Ids given = drawn(evaluation, s.experts);
    Doubles draws = gaussians(2 * s.tokens, 3);
    for (double& d : draws) d = std::fabs(d) - std::floor(std::fabs(d));
    const Doubles upstream = gaussians(2 * s.tokens, 4);
    for (const bool training : {false, true}) {
      a.given = training ? given.data() : nullptr, a.draws = training ? draws.data() : nullptr;
      const Run got = run(a);
      const at::Tensor z = tensor(logits, s.tokens).set_requires_grad(true);
      const ref::Mixed want = training ? ref::sparse_mixer(z, s.jitter, ids(given), tensor(draws, s.tokens))
                                       : ref::sparse_mixer(z, s.jitter);
      const Doubles weights = values(want.weights), p = values(want.probabilities), kept = values(want.kept),
                    chosen = values(want.chosen);
      for (std::size_t i = 0; i < weights.size(); ++i) {
        const double by =
            2 * bounds::sparse_mixer_weight(
                    s.experts, 0, range_of(logits.data() + static_cast<std::int64_t>(i) / 2 * s.experts, s.experts),
                    Float::kF64);
        BOOST_REQUIRE_MESSAGE(got.chosen[i] == static_cast<std::int32_t>(chosen[i]), what << " chosen " << i);
        BOOST_REQUIRE_MESSAGE(std::fabs(got.weights[i] - weights[i]) <= by * weights[i] + bounds::smallest(Float::kF64),
                              what << " weight " << i << ": " << got.weights[i] << ", not " << weights[i]);
        std::int64_t among = 0;
        for (std::int64_t e = 0; e < s.experts; ++e) {
          const auto at = i * static_cast<std::size_t>(s.experts) + static_cast<std::size_t>(e);
          BOOST_REQUIRE_MESSAGE(got.kept[at] == static_cast<std::uint8_t>(kept[at]), what << " kept " << at);
          BOOST_REQUIRE_MESSAGE(std::fabs(got.p[at] - p[at]) <= by * p[at] + bounds::smallest(Float::kF64),
                                what << " p " << at);
          among += got.kept[at];
        }
        several += among > 1, outside += weights[i] == 0;
        const double whole = got.p[i * static_cast<std::size_t>(s.experts) + static_cast<std::size_t>(got.chosen[i])];
        midpoints += weights[i] < 0.5 * whole;
      }
      // The gradient: autograd at evaluation; in training the autograd function's rule, which autograd finds where the
      // weight is the probability alone.
      (training
           ? (want.probabilities.gather(-1, want.chosen.unsqueeze(-1)).squeeze(-1) * tensor(upstream, s.tokens)).sum()
           : (want.weights * tensor(upstream, s.tokens)).sum())
          .backward();
      const Doubles by_autograd = values(z.grad()),
                    by_rule = values(ref::sparse_mixer_gradient(want, tensor(upstream, s.tokens)));
      k::SparseMixerBackwardArgs<double> b;
      b.forward = a, b.chosen = got.chosen.data(), b.weights = upstream.data();
      Doubles d(logits.size(), -7);
      BOOST_REQUIRE(k::sparse_mixer_backward(b, d.data()) == k::Status::kOk);
      double norm = 0;
      for (std::int64_t t = 0; t < s.tokens; ++t) {
        const double score =
            bounds::softmax_relative(s.experts, 0, range_of(logits.data() + t * s.experts, s.experts), Float::kF64);
        for (std::int64_t e = 0; e < s.experts; ++e) {
          double size = 0;
          for (std::int64_t j = 0; j < 2; ++j) {
            const auto slot = static_cast<std::size_t>(2 * t + j), row = slot * static_cast<std::size_t>(s.experts);
            const auto own = static_cast<std::size_t>(got.chosen[slot]);
            size += std::fabs(upstream[slot]) * p[row + own] *
                    (p[row + static_cast<std::size_t>(e)] + (static_cast<std::size_t>(e) == own ? 1 : 0));
          }
          const double by =
              2 * bounds::sparse_mixer_backward_relative(score) * size + 4 * bounds::smallest(Float::kF64);
          const auto at = static_cast<std::size_t>(t * s.experts + e);
          BOOST_REQUIRE_MESSAGE(std::fabs(d[at] - by_autograd[at]) <= by,
                                what << " gradient " << at << ": " << d[at] << ", not " << by_autograd[at]);
          BOOST_REQUIRE_MESSAGE(std::fabs(d[at] - by_rule[at]) <= by,
                                what << " by rule " << at << ": " << d[at] << ", not " << by_rule[at]);
          norm += d[at] * d[at];
        }
      }
      BOOST_CHECK(norm > 0 || s.experts < 4);
    }
  }
  BOOST_CHECK_GT(several, 50);
  BOOST_CHECK_GT(outside, 10);
  BOOST_CHECK_GT(midpoints, 20);
}

// By hand: 1, 0.98 and 0.5 with 2 jitter = 0.04. Pick 0 keeps the first two, pick 1 the second alone.
BOOST_AUTO_TEST_CASE(agrees_with_what_is_written_out) {
  const Doubles logits = {0.5, 1.0, 0.98};
  k::SparseMixerArgs<double> a = args_of(logits, 3, 0.02);
  const double p = 1 / (1 + std::exp(-0.02));
  Run r = run(a);
  BOOST_CHECK((r.chosen == Ids{1, 2}));
  BOOST_CHECK((r.kept == std::vector<std::uint8_t>{0, 1, 1, 0, 0, 1}));
  BOOST_CHECK_SMALL(r.weights[0] - p, 1e-15);
  BOOST_CHECK_EQUAL(r.weights[1], 1);
  const Doubles upstream = {2, 3};
  k::SparseMixerBackwardArgs<double> b;
  Doubles d(3);
  b.forward = a, b.chosen = r.chosen.data(), b.weights = upstream.data();
  BOOST_REQUIRE(k::sparse_mixer_backward(b, d.data()) == k::Status::kOk);
  BOOST_CHECK_EQUAL(d[0], 0);
  BOOST_CHECK_SMALL(d[1] - 2 * p * (1 - p), 1e-15);
  BOOST_CHECK_SMALL(d[2] + 2 * p * (1 - p), 1e-15);
  // The lesser was drawn, with a draw below 3/4: a third of its weight; the gradient knows nothing of that third.
  const Ids given = {2, 1};
  for (const double draw : {0.75, 0.76}) {
    const Doubles draws = {draw, 0};
    a.given = given.data(), a.draws = draws.data();
    r = run(a);
    BOOST_CHECK((r.kept == std::vector<std::uint8_t>{0, 1, 1, 0, 1, 0}));
    BOOST_CHECK_SMALL(r.weights[0] - (1 - p) * (draw > 0.75 ? 1 : static_cast<double>(0.3333f)), 1e-15);
    BOOST_CHECK_EQUAL(r.weights[1], 1);
    b.forward = a, b.chosen = given.data();
    BOOST_REQUIRE(k::sparse_mixer_backward(b, d.data()) == k::Status::kOk);
    BOOST_CHECK_SMALL(d[2] - 2 * p * (1 - p), 1e-15);
    BOOST_CHECK_SMALL(d[1] + 2 * p * (1 - p), 1e-15);
  }
}

// Shifting logits is no symmetry here (the gap is relative); scaling them keeps the masks, and the order of experts
// carries over.
BOOST_AUTO_TEST_CASE(laws) {
  const std::int64_t T = 20, E = 12;
  const Doubles logits = logits_of(T, E, 1);
  Doubles twice = logits, mirrored;
  for (double& z : twice) z *= 4;
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = E; e-- > 0;) mirrored.push_back(logits[static_cast<std::size_t>(t * E + e)]);
  }
  const Run plain = run(args_of(logits, E, 0.03)), scaled = run(args_of(twice, E, 0.03)),
            turned = run(args_of(mirrored, E, 0.03));
  BOOST_CHECK(plain.kept == scaled.kept);
  BOOST_CHECK(plain.weights != scaled.weights);
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e)
      BOOST_CHECK_EQUAL(plain.kept[static_cast<std::size_t>(2 * t * E + e)],
                        turned.kept[static_cast<std::size_t>(2 * t * E + E - 1 - e)]);
  }
}

Doubles numbers(const nlohmann::json& list) {
  Doubles out;
  for (const auto& v : list)
    out.push_back(v.is_null() ? kNan : v.is_string() ? (v == "inf" ? kInf : -kInf) : v.get<double>());
  return out;
}
bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// transformers, bit for bit where tensors are narrow and in what is chosen; weights and gradients of float32 tensors
// within what float32 rounds.
BOOST_AUTO_TEST_CASE(agrees_with_transformers) {
  for (const char* release : {"4.57.6", "5.23.0"}) {
    const auto golden = nlohmann::json::parse(
        std::ifstream(std::string(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/sparse_mixer/phimoe-") + release + ".json"));
    BOOST_REQUIRE_EQUAL(golden["transformers"].get<std::string>(), release);
    std::size_t compared = 0, midpoints = 0, moved = 0;
    for (const auto& g : golden["cases"]) {
      const std::string name =
          g["name"].get<std::string>() + " " + g["dtype"].get<std::string>() + (g["training"] ? " training" : "");
      const Float dtype = g["dtype"] == "float32" ? Float::kF32 : g["dtype"] == "bfloat16" ? Float::kBF16 : Float::kF16;
      BOOST_REQUIRE(g["dtype"] == g["weights_dtype"]);
      const Doubles z = numbers(g["logits"]), weights = numbers(g["weights"]), upstream = numbers(g["upstream"]),
                    gradient = numbers(g["gradient"]);
      const Doubles u = g["draws"].is_null() ? Doubles() : numbers(g["draws"]);
      const std::vector<float> logits(z.begin(), z.end()), draws(u.begin(), u.end());
      const Ids chosen = g["chosen"].get<Ids>();
      k::SparseMixerArgs<float> a;
      a.logits = logits.data(), a.tokens = g["tokens"], a.experts = g["experts"], a.jitter = g["jitter"];
      a.logits_dtype = a.tensor_dtype = dtype;
      const bool training = g["training"];
      a.given = training ? chosen.data() : nullptr, a.draws = training ? draws.data() : nullptr;
      const Run got = run(a);
      BOOST_CHECK_MESSAGE(got.chosen == chosen, name << ": chosen");
      k::SparseMixerBackwardArgs<float> b;
      b.forward = a, b.chosen = chosen.data(), b.weights = upstream.data();
      Doubles d(gradient.size());
      BOOST_REQUIRE(k::sparse_mixer_backward(b, d.data()) == k::Status::kOk);
      for (std::int64_t t = 0; t < a.tokens; ++t) {
        const double* row = z.data() + t * a.experts;
        const double range = std::isfinite(range_of(row, a.experts)) ? range_of(row, a.experts) : 0;
        const double by_weight = dtype == Float::kF32 ? 2 * bounds::sparse_mixer_weight(a.experts, 0, range, dtype) : 0;
        for (std::size_t i = static_cast<std::size_t>(2 * t); i < static_cast<std::size_t>(2 * t) + 2; ++i) {
          ++compared;
          const auto own = i * static_cast<std::size_t>(a.experts) + static_cast<std::size_t>(chosen[i]);
          midpoints += got.weights[i] < 0.5 * got.p[own];
          BOOST_CHECK_MESSAGE(!training || got.kept[own] == 1 || std::isnan(weights[i]),
                              name << ": a draw outside of the mask, " << i);
          BOOST_CHECK_MESSAGE(
              same(got.weights[i], weights[i]) || std::fabs(got.weights[i] - weights[i]) <= by_weight * weights[i],
              name << " weight " << i << ": " << got.weights[i] << ", not " << weights[i]);
        }
        for (std::int64_t e = 0; e < a.experts; ++e) {
          const auto at = static_cast<std::size_t>(t * a.experts + e);
          double size = 0;
          for (std::size_t i = static_cast<std::size_t>(2 * t); i < static_cast<std::size_t>(2 * t) + 2; ++i) {
            const auto first = i * static_cast<std::size_t>(a.experts), own = static_cast<std::size_t>(chosen[i]);
            size += std::fabs(upstream[i]) * got.p[first + own] *
                    (got.p[first + static_cast<std::size_t>(e)] + (static_cast<std::size_t>(e) == own ? 1 : 0));
          }
          // In float32 the library rounds each of the four operations, ours none.
          const double by = dtype != Float::kF32
                                ? 0
                                : std::expm1(2 * std::log1p(bounds::softmax_relative(a.experts, 0, range, dtype)) +
                                             bounds::gamma(4, k::unit_roundoff(dtype))) *
                                          size +
                                      4 * bounds::smallest(dtype);
          moved += gradient[at] != 0;
          BOOST_CHECK_MESSAGE(
              same(d[at], gradient[at]) || std::fabs(d[at] - gradient[at]) <= by,
              name << " gradient " << at << ": " << d[at] << ", not " << gradient[at] << ", within " << by);
        }
      }
    }
    BOOST_CHECK_GT(compared, 1000u);
    BOOST_CHECK_GT(midpoints, 100u);
    BOOST_CHECK_GT(moved, 1500u);
  }
}

BOOST_AUTO_TEST_CASE(refuses_what_does_not_fit) {
  double logit[2] = {1, 2}, draws[2] = {0, 0}, weights[2] = {1, 1}, d[2];
  std::int32_t chosen[2], given[2] = {0, 2};
  k::SparseMixerArgs<double> a;
  a.logits = logit, a.tokens = 1, a.experts = 0;
  const k::SparseMixerResult<double> r{chosen, nullptr, nullptr, nullptr};
  BOOST_CHECK(k::sparse_mixer(a, r) == k::Status::kBadShape);
  a.experts = 2;
  BOOST_CHECK(k::sparse_mixer(a, {}) == k::Status::kNullPointer);
  BOOST_CHECK(k::sparse_mixer(a, r) == k::Status::kOk);
  a.draws = draws;
  BOOST_CHECK(k::sparse_mixer(a, r) == k::Status::kBadOption);
  a.given = given;
  BOOST_CHECK(k::sparse_mixer(a, r) == k::Status::kBadShape);
  k::SparseMixerBackwardArgs<double> b;
  b.forward = a, b.weights = weights;
  BOOST_CHECK(k::sparse_mixer_backward(b, d) == k::Status::kNullPointer);
  b.chosen = given;
  BOOST_CHECK(k::sparse_mixer_backward(b, d) == k::Status::kBadShape);
  given[1] = 1;
  BOOST_CHECK(k::sparse_mixer_backward(b, d) == k::Status::kOk);
  a.tokens = 0;
  BOOST_CHECK(k::sparse_mixer(a, {}) == k::Status::kOk);
  BOOST_CHECK_THROW(ref::sparse_mixer(at::zeros({1, 2}, at::kDouble), 0.01, {}, at::zeros({1, 2}, at::kDouble)),
                    c10::Error);
  // One expert: the second pick has none left.
  a = {}, a.logits = logit, a.tokens = 1, a.experts = 1;
  const Run one = run(a);
  BOOST_CHECK((one.chosen == Ids{0, 0}));
  BOOST_CHECK_EQUAL(one.weights[0], 1);
  BOOST_CHECK(std::isnan(one.weights[1]));
}

}  // namespace
