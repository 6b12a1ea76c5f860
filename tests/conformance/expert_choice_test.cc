// Expert choice: kernels/host against reference/, and both against plain counting.
#define BOOST_TEST_MODULE expert_choice
#include "kernels/host/expert_choice.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/router_backward.h"
#include "reference/expert_choice.h"
#include "reference/router.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using Doubles = std::vector<double>;

/// Scores on a coarse grid, so that many are equal.
Doubles scores_of(std::int64_t tokens, std::int64_t experts, double grid) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts));
  k::unit_gaussians(17, 1, 0, tokens * experts, g.data());
  Doubles s;
  for (const float v : g) s.push_back(grid > 0 ? std::nearbyint(v / grid) * grid : v);
  return s;
}
at::Tensor tensor(const Doubles& v, std::int64_t rows) {
  return at::from_blob(const_cast<double*>(v.data()), {rows, static_cast<std::int64_t>(v.size()) / rows}, at::kDouble)
      .clone();
}

struct Chosen {
  std::vector<std::int32_t> tokens, taken;
  Doubles weights;
};
Chosen choose(const Doubles& scores, std::int64_t experts, std::int64_t capacity,
              const std::vector<std::uint8_t>& valid = {}) {
  k::ExpertChoiceArgs<double> a;
  a.scores = scores.data(), a.experts = experts, a.capacity = capacity;
  a.tokens = static_cast<std::int64_t>(scores.size()) / experts;
  a.valid = valid.empty() ? nullptr : valid.data();
  Chosen c{std::vector<std::int32_t>(static_cast<std::size_t>(experts * capacity)),
           std::vector<std::int32_t>(static_cast<std::size_t>(a.tokens)),
           Doubles(static_cast<std::size_t>(experts * capacity))};
  BOOST_REQUIRE(k::expert_choice(a, {c.tokens.data(), c.weights.data(), c.taken.data()}) == k::Status::kOk);
  return c;
}

BOOST_AUTO_TEST_CASE(agrees_with_the_reference) {
  struct Shape {
    std::int64_t tokens, experts, capacity;
    double grid;
  };
  for (const Shape s : {Shape{1, 1, 1, 0},
                        {7, 3, 7, 0},
                        {50, 8, 13, 0.5},
                        {200, 144, 5, 0},
                        {40, 160, 3, 0.5},
                        {64, 384, 1, 1.0},
                        {333, 16, 41, 0.25}}) {
    const std::string what =
        std::to_string(s.tokens) + "x" + std::to_string(s.experts) + "/" + std::to_string(s.capacity);
    const Doubles scores = scores_of(s.tokens, s.experts, s.grid);
    std::vector<std::uint8_t> valid(static_cast<std::size_t>(s.tokens), 1);
    for (std::size_t t = 1; t < valid.size() && s.capacity < s.tokens / 2; t += 5) valid[t] = 0;
    const at::Tensor mask = at::from_blob(valid.data(), {s.tokens}, at::kByte).to(at::kBool);
    const ref::ExpertChosen truth = ref::expert_choice(tensor(scores, s.tokens), s.capacity, mask);
    const at::Tensor tokens = truth.tokens.contiguous(), weights = truth.weights.contiguous();
    const Chosen got = choose(scores, s.experts, s.capacity, valid);
    for (std::int64_t i = 0; i < s.experts * s.capacity; ++i) {
      BOOST_REQUIRE_MESSAGE(got.tokens[i] == tokens.data_ptr<std::int64_t>()[i], what << " at " << i);
      BOOST_REQUIRE_MESSAGE(got.weights[i] == weights.data_ptr<double>()[i], what << " at " << i);
    }
    std::vector<std::int32_t> counted(got.taken.size());
    for (const std::int32_t t : got.tokens) ++counted[t];
    BOOST_CHECK(counted == got.taken);
  }
}

// By the definition: a token is in if fewer than C valid ones beat it, and its place is how many do.
BOOST_AUTO_TEST_CASE(agrees_with_counting) {
  const std::int64_t T = 60, E = 5, C = 9;
  Doubles scores = scores_of(T, E, 0.5);
  scores[3 * E] = std::numeric_limits<double>::quiet_NaN();
  scores[40 * E] = std::numeric_limits<double>::quiet_NaN();
  scores[7 * E] = std::numeric_limits<double>::infinity();
  scores[8 * E + 1] = 0.0, scores[9 * E + 1] = -0.0;
  for (std::int64_t t = 0; t < T; ++t)
    scores[t * E + 2] = t % 9 == 0 ? -std::numeric_limits<double>::infinity() : 5e-324 * static_cast<double>(t % 7);
  const Chosen got = choose(scores, E, C);
  for (std::int64_t e = 0; e < E; ++e) {
    for (std::int64_t t = 0; t < T; ++t) {
      const auto beats = [&](std::int64_t a, std::int64_t b) {
        const double x = scores[a * E + e], y = scores[b * E + e];
        if (std::isnan(x) != std::isnan(y)) return std::isnan(x);
        return x > y || ((x == y || (std::isnan(x) && std::isnan(y))) && a < b);
      };
      std::int64_t beaten_by = 0;
      for (std::int64_t o = 0; o < T; ++o) beaten_by += o != t && beats(o, t) ? 1 : 0;
      if (beaten_by < C) BOOST_CHECK_EQUAL(got.tokens[e * C + beaten_by], t);
    }
  }
}

BOOST_AUTO_TEST_CASE(too_few_valid_tokens_leave_places_empty) {
  const Chosen got = choose({1, 2, 3, 4}, 1, 3, {0, 1, 0, 1});
  BOOST_CHECK((got.tokens == std::vector<std::int32_t>{3, 1, -1}));
  BOOST_CHECK((got.weights == Doubles{4, 2, 0}));
  BOOST_CHECK((got.taken == std::vector<std::int32_t>{0, 1, 0, 1}));
}

// The load is even whatever the scores, and what is uneven is how many experts a token gets.
BOOST_AUTO_TEST_CASE(every_expert_is_full) {
  const std::int64_t T = 128, E = 8;
  const std::int64_t C = k::expert_choice_capacity(T, E, 2.0);
  BOOST_CHECK_EQUAL(C, 32);
  const Chosen got = choose(scores_of(T, E, 0), E, C);
  std::int64_t sum = 0, least = E, most = 0;
  for (const std::int32_t n : got.taken)
    sum += n, least = std::min<std::int64_t>(least, n), most = std::max<std::int64_t>(most, n);
  BOOST_CHECK_EQUAL(sum, E * C);
  BOOST_CHECK(least < 2 && most > 2);
  BOOST_CHECK_EQUAL(k::expert_choice_capacity(10, 64, 1.0), 1);
  BOOST_CHECK_EQUAL(k::expert_choice_capacity(10, 2, 8.0), 10);
  BOOST_CHECK_EQUAL(k::expert_choice_capacity(0, 2, 8.0), 0);
}

// Through the softmax to the logits, against autograd.
BOOST_AUTO_TEST_CASE(gradient_agrees_with_autograd) {
  const std::int64_t T = 40, E = 6, C = 8;
  const Doubles logits = scores_of(T, E, 0);
  Doubles upstream(static_cast<std::size_t>(E * C));
  for (std::size_t i = 0; i < upstream.size(); ++i) upstream[i] = std::sin(static_cast<double>(i));
  const at::Tensor l = tensor(logits, T).set_requires_grad(true);
  const at::Tensor s = ref::scores(l, ref::Score::kSoftmax);
  const ref::ExpertChosen c = ref::expert_choice(s, C);
  (c.weights * tensor(upstream, E)).sum().backward();
  const at::Tensor want = l.grad().contiguous(), sc = s.detach().contiguous();
  const Chosen got = choose(Doubles(sc.data_ptr<double>(), sc.data_ptr<double>() + T * E), E, C);
  Doubles d_scores(static_cast<std::size_t>(T * E), -7), d_logits(d_scores);
  BOOST_REQUIRE(k::expert_choice_backward(got.tokens.data(), upstream.data(), T, E, C, d_scores.data()) ==
                k::Status::kOk);
  k::RouteBackwardArgs<double> b;
  b.forward.logits = logits.data(), b.forward.tokens = T, b.forward.experts = E, b.forward.top_k = 1;
  b.scores = d_scores.data();
  BOOST_REQUIRE(k::route_backward(b, d_logits.data()) == k::Status::kOk);
  // bounds.h, with gradients of the scores alone.
  const at::Tensor up = tensor(d_scores, T).abs(), size = (sc * (up + (up * sc).sum(1, true))).contiguous();
  const auto [low, high] = std::minmax_element(logits.begin(), logits.end());
  const double relative =
      2 * bounds::route_backward_relative(bounds::softmax_relative(E, 0, *high - *low, k::Float::kF64), E, 1);
  for (std::size_t i = 0; i < d_logits.size(); ++i)
    BOOST_CHECK_SMALL(d_logits[i] - want.data_ptr<double>()[i], relative * size.data_ptr<double>()[i]);
}

BOOST_AUTO_TEST_CASE(refuses_what_does_not_fit) {
  k::ExpertChoiceArgs<double> a;
  std::int32_t token = 0;
  double score = 1;
  a.scores = &score, a.tokens = 1, a.experts = 1, a.capacity = 2;
  BOOST_CHECK(k::expert_choice(a, {&token, nullptr, nullptr}) == k::Status::kBadShape);
  a.capacity = 1;
  BOOST_CHECK(k::expert_choice(a, {}) == k::Status::kNullPointer);
  BOOST_CHECK(k::expert_choice(a, {&token, nullptr, nullptr}) == k::Status::kOk);
  BOOST_CHECK_THROW(ref::expert_choice(at::zeros({2, 2}, at::kDouble), 3), c10::Error);
}

}  // namespace
