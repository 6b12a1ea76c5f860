// Router kernels: the written order of the sums bit for bit, on every instruction set; hand-worked routing.
#include "kernels/host/router.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/host/gaussian.h"
#include "tests/support/on_every_target.h"

namespace moeaudit::kernels {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<float> gaussians(std::int64_t count, std::uint64_t stream, float scale = 1) {
  std::vector<float> v(static_cast<std::size_t>(count));
  unit_gaussians(42, stream, 0, count, v.data());
  for (float& x : v) x *= scale;
  return v;
}

/// The order that router.h writes down, as plain loops.
template <class In, class Sum>
std::vector<Sum> gate_by_the_book(const std::vector<In>& x, const std::vector<In>& w, const std::vector<Sum>& bias,
                                  std::int64_t tokens, std::int64_t hidden, std::int64_t experts) {
  std::vector<Sum> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t e = 0; e < experts; ++e) {
      Sum total = 0;
      for (std::int64_t first = 0; first < hidden; first += 128) {
        Sum stretch = 0;
        for (std::int64_t i = first; i < std::min<std::int64_t>(hidden, first + 128); ++i) {
          const Sum product = static_cast<Sum>(x[t * hidden + i]) * static_cast<Sum>(w[e * hidden + i]);
          stretch = stretch + product;
        }
        total = total + stretch;
      }
      out.push_back(bias.empty() ? total : total + bias[e]);
    }
  }
  return out;
}

template <class In, class Sum>
std::vector<Sum> gate(const std::vector<In>& x, const std::vector<In>& w, const std::vector<Sum>& bias,
                      std::int64_t tokens, std::int64_t hidden, std::int64_t experts) {
  std::vector<Sum> packed(static_cast<std::size_t>(packed_gate_size<Sum>(experts, hidden)));
  pack_gate(w.data(), experts, hidden, packed.data());
  std::vector<Sum> out(static_cast<std::size_t>(tokens * experts), Sum(-1));
  GateArgs<In, Sum> a{x.data(), packed.data(), bias.empty() ? nullptr : bias.data(), tokens, hidden,
                      experts,  out.data()};
  EXPECT_EQ(gate_logits(a), Status::kOk);
  return out;
}

/// Runs f once for every instruction set of this CPU.
template <class F>
void on_every_target(F&& f) {
  const int seen = test::on_every_target([&] {
    SCOPED_TRACE(host_backend());
    f();
  });
  EXPECT_GE(seen, 2) << "only one instruction set could be tried";
}

struct GateShape {
  std::int64_t tokens, hidden, experts;
};
const GateShape kShapes[] = {{1, 1, 1},     {1, 7, 3},    {13, 128, 8},   {12, 129, 16},
                             {97, 300, 17}, {5, 255, 40}, {100, 64, 144}, {25, 256, 160},
                             {3, 4096, 8},  {17, 300, 8}, {19, 47, 4},    {110, 144, 12}};

TEST(Gate, WrittenOrderOnEveryTarget) {
  for (const GateShape& s : kShapes) {
    SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.hidden << " x " << s.experts);
    const auto x = gaussians(s.tokens * s.hidden, 1), w = gaussians(s.experts * s.hidden, 2, 0.1f);
    const auto bias = gaussians(s.experts, 3);
    const std::vector<double> xd(x.begin(), x.end()), wd(w.begin(), w.end()), bias_d(bias.begin(), bias.end());
    // Doubles that float32 does not hold, so that a fused multiply-add would show.
    std::vector<double> fine = xd;
    for (double& v : fine) v *= 1.0 / 3.0;
    const auto f32 = gate_by_the_book<float, float>(x, w, bias, s.tokens, s.hidden, s.experts);
    const auto wide = gate_by_the_book<float, double>(x, w, bias_d, s.tokens, s.hidden, s.experts);
    const auto f64 = gate_by_the_book<double, double>(fine, wd, bias_d, s.tokens, s.hidden, s.experts);
    on_every_target([&] {
      EXPECT_EQ((gate<float, float>(x, w, bias, s.tokens, s.hidden, s.experts)), f32);
      EXPECT_EQ((gate<float, double>(x, w, bias_d, s.tokens, s.hidden, s.experts)), wide);
      EXPECT_EQ((gate<double, double>(fine, wd, bias_d, s.tokens, s.hidden, s.experts)), f64);
    });
  }
}

TEST(Gate, WideEqualsDoubleOnWidenedInputs) {
  const auto x = gaussians(20 * 512, 4), w = gaussians(9 * 512, 5);
  const std::vector<double> xd(x.begin(), x.end()), wd(w.begin(), w.end());
  EXPECT_EQ((gate<float, double>(x, w, {}, 20, 512, 9)), (gate<double, double>(xd, wd, {}, 20, 512, 9)));
}

TEST(Gate, TokensDoNotMeet) {
  const auto x = gaussians(31 * 200, 6), w = gaussians(24 * 200, 7);
  const auto all = gate<float, float>(x, w, {}, 31, 200, 24);
  for (std::int64_t t = 0; t < 31; ++t) {
    const std::vector<float> one(x.begin() + t * 200, x.begin() + (t + 1) * 200);
    const auto alone = gate<float, float>(one, w, {}, 1, 200, 24);
    EXPECT_EQ(std::memcmp(alone.data(), all.data() + t * 24, 24 * sizeof(float)), 0) << t;
  }
}

TEST(Gate, InfinitiesAndNan) {
  std::vector<float> x = {std::numeric_limits<float>::infinity(), 1, 1}, w = {1, 0, 0, 0, 1, 1, -1, 0, 0};
  const auto l = gate<float, float>(x, w, {}, 1, 3, 3);
  EXPECT_EQ(l[0], std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(l[1]));  // inf * 0
  EXPECT_EQ(l[2], -std::numeric_limits<float>::infinity());
}

TEST(Gate, RefusesBadArguments) {
  float one = 1;
  EXPECT_EQ(gate_logits(GateArgs<float, float>{nullptr, &one, nullptr, 1, 1, 1, &one}), Status::kNullPointer);
  EXPECT_EQ(gate_logits(GateArgs<float, float>{&one, &one, nullptr, 1, 0, 1, &one}), Status::kBadShape);
  EXPECT_EQ(gate_logits(GateArgs<float, float>{&one, &one, nullptr, -1, 1, 1, &one}), Status::kBadShape);
  EXPECT_EQ(gate_logits(GateArgs<float, float>{nullptr, nullptr, nullptr, 0, 1, 1, nullptr}), Status::kOk);
}

// ---- route
// -----------------------------------------------------------------------------------------------------------------

struct Routed {
  std::vector<std::int32_t> chosen;
  std::vector<double> weights, choice;
  std::int32_t runner_up = -2;
};
Routed route_one(RouteArgs<double> a, const std::vector<double>& logits) {
  Routed r;
  a.logits = logits.data();
  a.tokens = 1;
  a.experts = static_cast<std::int64_t>(logits.size());
  r.chosen.resize(static_cast<std::size_t>(a.top_k));
  r.weights.resize(static_cast<std::size_t>(a.top_k));
  r.choice.resize(logits.size());
  EXPECT_EQ(route(a, {r.chosen.data(), r.weights.data(), &r.runner_up, r.choice.data()}), Status::kOk);
  return r;
}
using Ids = std::vector<std::int32_t>;

TEST(Route, SoftmaxByHand) {
  RouteArgs<double> a;
  a.top_k = 2;
  const double third = std::log(3.0);  // softmax of {0, ln 3, 0, 0} = {1, 3, 1, 1} / 6
  Routed r = route_one(a, {0, third, 0, 0});
  EXPECT_EQ(r.chosen, (Ids{1, 0}));  // ties to the lowest index
  EXPECT_EQ(r.runner_up, 2);
  EXPECT_NEAR(r.weights[0], 0.5, 1e-15);
  EXPECT_NEAR(r.weights[1], 1.0 / 6, 1e-15);
  a.renormalise = true;
  a.scaling = 2;
  r = route_one(a, {0, third, 0, 0});
  EXPECT_NEAR(r.weights[0], 1.5, 1e-15);
  EXPECT_NEAR(r.weights[1], 0.5, 1e-15);
}

TEST(Route, SoftmaxAfterTopK) {
  RouteArgs<double> a;
  a.top_k = 2;
  a.score_after_top_k = true;
  const Routed r = route_one(a, {-5, 1, 1 + std::log(4.0), 0});
  EXPECT_EQ(r.chosen, (Ids{2, 1}));
  EXPECT_NEAR(r.weights[0], 0.8, 1e-15);
  EXPECT_NEAR(r.weights[1], 0.2, 1e-15);
}

TEST(Route, CorrectionBiasChoosesButDoesNotWeigh) {
  RouteArgs<double> a;
  a.top_k = 1;
  a.score = Score::kSigmoid;
  const std::vector<double> bias = {0, 0.3, 0};
  a.correction_bias = bias.data();
  const Routed r = route_one(a, {std::log(3.0), 0, -1});  // scores 0.75, 0.5, 0.27: with the bias 0.75, 0.8, 0.27
  EXPECT_EQ(r.chosen, (Ids{1}));
  EXPECT_EQ(r.weights[0], 0.5);
  EXPECT_EQ(r.runner_up, 0);
}

TEST(Route, GroupsByMaxAndByTwoBest) {
  RouteArgs<double> a;
  a.top_k = 2;
  a.score = Score::kSigmoid;
  a.groups = 2;
  a.top_groups = 1;
  const std::vector<double> logits = {3, -9, -9, 1, 1, 1};  // group 0 has the best expert, group 1 the better pair
  a.group_score = GroupScore::kMax;
  Routed r = route_one(a, logits);
  EXPECT_EQ(r.chosen, (Ids{0, 1}));
  EXPECT_EQ(r.choice[3], -kInf);
  a.group_score = GroupScore::kTop2Sum;
  r = route_one(a, logits);
  EXPECT_EQ(r.chosen, (Ids{3, 4}));
  EXPECT_EQ(r.choice[0], -kInf);
  EXPECT_EQ(r.runner_up, 5);
}

TEST(Route, MaskOfZeroBeatsNegativeChoices) {
  RouteArgs<double> a;
  a.top_k = 2;
  a.score = Score::kSigmoid;
  a.group_score = GroupScore::kMax;
  a.groups = 2;
  a.top_groups = 1;
  const std::vector<double> bias = {-0.4, -0.9, -2, -2};
  a.correction_bias = bias.data();
  EXPECT_EQ(route_one(a, {0, 0, 0, 0}).chosen, (Ids{0, 1}));
  a.group_mask_is_zero = true;  // choices 0.1, -0.4, and 0 for the two that are masked
  EXPECT_EQ(route_one(a, {0, 0, 0, 0}).chosen, (Ids{0, 2}));
}

TEST(Route, NanIsLargestAndTiesGoToTheLowestIndex) {
  RouteArgs<double> a;
  a.top_k = 3;
  a.score_after_top_k = true;
  EXPECT_EQ(route_one(a, {1, kNan, kInf, kNan}).chosen, (Ids{1, 3, 2}));
  EXPECT_EQ(route_one(a, {-kInf, -kInf, -kInf, -kInf}).chosen, (Ids{0, 1, 2}));
  EXPECT_EQ(route_one(a, {0.0, -0.0, 0.0, -1}).chosen, (Ids{0, 1, 2}));
}

TEST(Route, AllExpertsLeaveNoRunnerUp) {
  RouteArgs<double> a;
  a.top_k = 3;
  EXPECT_EQ(route_one(a, {1, 2, 3}).runner_up, -1);
}

TEST(Route, TensorDtypeRoundsBetweenOperations) {
  RouteArgs<double> a;
  a.top_k = 3;
  a.renormalise = true;
  a.tensor_dtype = Float::kBF16;
  // softmax {1/3, 1/3, 1/3} in bfloat16 is 0.333984375; three of them 1.001953125, in bfloat16 1; the quotient
  // 0.333984375.
  const Routed r = route_one(a, {2, 2, 2});
  for (const double w : r.weights) EXPECT_EQ(w, 0.333984375);
}

TEST(Route, SameBitsOnEveryTarget) {
  const std::int64_t tokens = 40, experts = 160;
  const auto logits = gaussians(tokens * experts, 8, 2.0f), bias = gaussians(experts, 9, 0.1f);
  for (const Score score : {Score::kSoftmax, Score::kSigmoid, Score::kSqrtSoftplus}) {
    std::vector<std::vector<float>> weights;
    std::vector<Ids> chosen;
    on_every_target([&] {
      RouteArgs<float> a;
      a.logits = logits.data();
      a.correction_bias = bias.data();
      a.tokens = tokens;
      a.experts = experts;
      a.top_k = 8;
      a.score = score;
      a.group_score = GroupScore::kTop2Sum;
      a.groups = 8;
      a.top_groups = 4;
      a.renormalise = true;
      a.scaling = 2.5f;
      weights.emplace_back(static_cast<std::size_t>(tokens * 8));
      chosen.emplace_back(static_cast<std::size_t>(tokens * 8));
      ASSERT_EQ(route(a, RouteResult<float>{chosen.back().data(), weights.back().data(), nullptr, nullptr}),
                Status::kOk);
    });
    for (std::size_t i = 1; i < weights.size(); ++i) {
      EXPECT_EQ(weights[i], weights[0]);
      EXPECT_EQ(chosen[i], chosen[0]);
    }
  }
}

/// What router.h says of one token, as plain loops over the scalar functions.
template <class T>
std::vector<T> softmax_by_the_book(std::vector<T> v, Float dtype) {
  T largest = v[0];
  bool nan = false;
  for (const T x : v) nan |= std::isnan(x), largest = x > largest ? x : largest;
  if (nan || std::isinf(largest)) return std::vector<T>(v.size(), std::numeric_limits<T>::quiet_NaN());
  T lane[kLanes] = {};
  for (std::size_t e = 0; e < v.size(); ++e) lane[e % kLanes] += v[e] = exp_shifted(v[e] - largest);
  const T sum = add_lanes(lane);
  for (T& x : v) x = static_cast<T>(round_to(x / sum, dtype));
  return v;
}
template <class T>
Ids best_by_the_book(const std::vector<T>& v, std::int64_t count) {
  Ids order(v.size());
  for (std::size_t e = 0; e < v.size(); ++e) order[e] = static_cast<std::int32_t>(e);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return v[a] > v[b] || (std::isnan(v[a]) && !std::isnan(v[b]));
  });
  order.resize(static_cast<std::size_t>(count));
  return order;
}
template <class T>
void route_by_the_book(const RouteArgs<T>& a, std::int64_t token, Ids* chosen, std::vector<T>* weights,
                       std::vector<T>* choice) {
  const auto rounded = [](T x, Float f) { return static_cast<T>(round_to(x, f)); };
  const std::vector<T> logits(a.logits + token * a.experts, a.logits + (token + 1) * a.experts);
  std::vector<T> scores = logits;
  if (!a.score_after_top_k && a.score == Score::kSoftmax) {
    scores = softmax_by_the_book(logits, a.tensor_dtype);
  } else if (!a.score_after_top_k) {
    for (T& x : scores)
      x = rounded(a.score == Score::kSigmoid ? sigmoid_of(x) : static_cast<T>(sqrt_softplus_in(x, a.tensor_dtype)),
                  a.tensor_dtype);
    if (a.sigmoid_offset != T(0))
      for (T& x : scores) x = rounded(x + a.sigmoid_offset, a.tensor_dtype);
  }
  *choice = scores;
  for (std::int64_t e = 0; e < a.experts && a.correction_bias != nullptr; ++e)
    (*choice)[e] = a.bias_multiplies ? scores[e] * a.correction_bias[e] : scores[e] + a.correction_bias[e];
  if (a.group_score != GroupScore::kNone) {
    const std::int64_t size = a.experts / a.groups;
    std::vector<T> group(static_cast<std::size_t>(a.groups));
    for (std::int64_t g = 0; g < a.groups; ++g) {
      const std::vector<T> members(choice->begin() + g * size, choice->begin() + (g + 1) * size);
      const Ids best = best_by_the_book(members, group_members(a));
      group[g] = members[best[0]];
      for (std::size_t j = 1; j < best.size(); ++j) group[g] += members[best[j]];
      if (best.size() > 1) group[g] = rounded(group[g], a.tensor_dtype);
    }
    const Ids kept = best_by_the_book(group, a.top_groups);
    for (std::int64_t e = 0; e < a.experts; ++e) {
      if (std::count(kept.begin(), kept.end(), e / size) == 0)
        (*choice)[e] = a.group_mask_is_zero ? T(0) : -std::numeric_limits<T>::infinity();
    }
  }
  *chosen = best_by_the_book(*choice, a.top_k);
  weights->clear();
  for (const std::int32_t e : *chosen) weights->push_back(scores[e]);
  if (a.score_after_top_k) *weights = softmax_by_the_book(*weights, a.tensor_dtype);
  const T p = a.renormalise_norm;
  const auto to_the = [](T x, T exponent) {
    return static_cast<T>(exp_exact_order(static_cast<double>(exponent) * log_exact_order(static_cast<double>(x))));
  };
  T sum = 0;
  for (const T w : *weights) {
    if (std::isinf(p))
      sum = std::isnan(sum) || w < sum ? sum : w;
    else
      sum += p == T(1) ? w : p == T(2) ? w * w : to_the(w, p);
  }
  if (!std::isinf(p) && p != T(1)) sum = p == T(2) ? std::sqrt(sum) : p == T(0.5) ? sum * sum : to_the(sum, 1 / p);
  sum = rounded(rounded(sum, a.tensor_dtype) + a.renormalise_eps, a.tensor_dtype);
  for (T& w : *weights) {
    if (a.renormalise) w = rounded(w / sum, a.tensor_dtype);
    if (a.scaling != T(1)) w = rounded(w * a.scaling, a.tensor_dtype);
    w = rounded(w, a.weights_dtype);
  }
}

/// Equal bits, but a NaN equals any NaN.
template <class T>
bool same(const T* a, const std::vector<T>& b) {
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (!(std::isnan(a[i]) && std::isnan(b[i])) && std::memcmp(a + i, &b[i], sizeof(T)) != 0) return false;
  }
  return true;
}

template <class T>
void check_by_the_book(RouteArgs<T> a, const std::vector<float>& logits, const std::vector<float>& bias) {
  const std::vector<T> l(logits.begin(), logits.end()), b(bias.begin(), bias.end());
  a.logits = l.data();
  if (a.correction_bias != nullptr) a.correction_bias = b.data();
  const auto count = static_cast<std::size_t>(a.tokens * a.top_k);
  Ids chosen(count), runner_up(static_cast<std::size_t>(a.tokens));
  std::vector<T> weights(count), choice(l.size());
  ASSERT_EQ(route(a, RouteResult<T>{chosen.data(), weights.data(), runner_up.data(), choice.data()}), Status::kOk);
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    SCOPED_TRACE(testing::Message() << "token " << t << " of " << a.tokens << ", " << a.experts << " experts, top "
                                    << a.top_k << ", " << 8 * sizeof(T) << " bits");
    Ids ids;
    std::vector<T> w, c;
    route_by_the_book(a, t, &ids, &w, &c);
    EXPECT_EQ(runner_up[t], a.top_k < a.experts ? best_by_the_book(c, a.top_k + 1).back() : -1);
    EXPECT_EQ(Ids(chosen.begin() + t * a.top_k, chosen.begin() + (t + 1) * a.top_k), ids);
    EXPECT_TRUE(same(weights.data() + t * a.top_k, w));
    EXPECT_TRUE(same(choice.data() + t * a.experts, c));
  }
}

// Few and many experts, tokens that do not fill a vector, ties, NaN and infinities, roundings between the operations.
TEST(Route, WrittenOrderOnEveryTarget) {
  struct Shape {
    std::int64_t tokens, experts, top_k, groups, top_groups;
  };
  for (const Shape s : {Shape{1, 1, 1, 1, 1},
                        {3, 8, 1, 4, 1},
                        {17, 8, 2, 2, 1},
                        {16, 16, 2, 4, 2},
                        {15, 32, 1, 8, 3},
                        {33, 32, 2, 4, 4},
                        {7, 40, 8, 8, 5},
                        {21, 31, 9, 1, 1},
                        {19, 65, 30, 5, 4},
                        {18, 129, 4, 3, 2}}) {
    const auto bias = gaussians(s.experts, 21, 0.1f);
    auto logits = gaussians(s.tokens * s.experts, 20, 2.0f);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (i % 3 == 0) logits[i] = std::round(logits[i]);
      const std::int64_t token = static_cast<std::int64_t>(i) / s.experts;
      if (token % 7 == 3 && i % 5 == 0) logits[i] = -std::numeric_limits<float>::infinity();
      if (token == 5 && i % 4 == 0) logits[i] = std::numeric_limits<float>::quiet_NaN();
      if (token == 6 && i % 4 == 0) logits[i] = std::numeric_limits<float>::infinity();
      if (token == 8 && i % 4 == 0) logits[i] = -0.0f;
      if (token == 9) logits[i] *= 60;  // exponentials below the normal numbers, and 0
    }
    on_every_target([&] {
      const auto both = [&](auto change) {
        const auto with = [&](auto a) {
          a.tokens = s.tokens, a.experts = s.experts, a.top_k = s.top_k;
          change(a);
          check_by_the_book(a, logits, bias);
        };
        with(RouteArgs<float>());
        with(RouteArgs<double>());
      };
      static const float kSome = 0;
      static const double kSomeDouble = 0;
      const auto biased = [](auto& a) {
        if constexpr (std::is_same_v<decltype(a.scaling), float>)
          a.correction_bias = &kSome;
        else
          a.correction_bias = &kSomeDouble;
      };
      both([](auto& a) { a.renormalise = true; });
      both([](auto& a) { a.score_after_top_k = true, a.weights_dtype = Float::kBF16; });
      both([](auto& a) { a.renormalise = true, a.scaling = 1.5, a.tensor_dtype = Float::kBF16; });
      both([&](auto& a) {
        a.score_after_top_k = true, a.group_score = GroupScore::kMax, a.groups = s.groups,
        a.top_groups = s.top_groups;
      });
      both([&](auto& a) { biased(a), a.score = Score::kSigmoid, a.renormalise = true, a.renormalise_eps = 1e-20f; });
      both([&](auto& a) {
        biased(a), a.bias_multiplies = true, a.score = Score::kSqrtSoftplus, a.tensor_dtype = Float::kF16;
      });
      for (const float p : {0.5f, 2.0f, 3.0f, HUGE_VALF}) {
        both([p](auto& a) { a.renormalise = true, a.renormalise_norm = p; });
        both([p](auto& a) { a.renormalise = true, a.renormalise_norm = p, a.tensor_dtype = Float::kBF16; });
      }
      for (const float offset : {1e-7f, 0.25f}) {
        both([&](auto& a) { biased(a), a.score = Score::kSigmoid, a.sigmoid_offset = offset, a.renormalise = true; });
        both([&](auto& a) {
          biased(a), a.score = Score::kSigmoid, a.sigmoid_offset = offset, a.tensor_dtype = Float::kBF16;
          a.renormalise = true, a.renormalise_norm = 2;
        });
      }
      for (const GroupScore g : {GroupScore::kMax, GroupScore::kTop2Sum, GroupScore::kTopShareSum}) {
        for (const bool zero : {false, true}) {
          both([&](auto& a) {
            biased(a), a.score = zero ? Score::kSoftmax : Score::kSigmoid, a.group_mask_is_zero = zero;
            a.group_score = g, a.groups = s.groups, a.top_groups = s.top_groups;
            a.tensor_dtype = zero ? Float::kF32 : Float::kBF16;
            if (group_members(a) > s.experts / s.groups) a.group_score = GroupScore::kMax;
          });
        }
      }
    });
  }
}

TEST(Route, RefusesBadOptions) {
  const double logits[4] = {};
  std::int32_t chosen[8];
  RouteArgs<double> a;
  a.logits = logits;
  a.tokens = 1;
  a.experts = 4;
  const auto status = [&](auto change) {
    RouteArgs<double> b = a;
    b.top_k = 1;
    change(b);
    return route(b, RouteResult<double>{chosen, nullptr, nullptr, nullptr});
  };
  EXPECT_EQ(status([](auto&) {}), Status::kOk);
  EXPECT_EQ(status([](auto& b) { b.top_k = 0; }), Status::kBadTopK);
  EXPECT_EQ(status([](auto& b) { b.top_k = 5; }), Status::kBadTopK);
  EXPECT_EQ(status([](auto& b) { b.logits = nullptr; }), Status::kNullPointer);
  EXPECT_EQ(status([](auto& b) { b.experts = 0; }), Status::kBadShape);
  EXPECT_EQ(status([](auto& b) { b.group_score = GroupScore::kMax, b.groups = 3; }), Status::kBadGroups);
  EXPECT_EQ(status([](auto& b) { b.group_score = GroupScore::kMax, b.groups = 2, b.top_groups = 3; }),
            Status::kBadGroups);
  EXPECT_EQ(status([](auto& b) { b.group_score = GroupScore::kTop2Sum, b.groups = 4; }), Status::kBadGroups);
  EXPECT_EQ(status([&](auto& b) { b.always_logits = logits, b.always = 1; }), Status::kBadOption);  // a softmax
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  for (const double p : {0.0, -1.0, -infinity, nan})
    EXPECT_EQ(status([p](auto& b) { b.renormalise_norm = p; }), Status::kBadOption) << p;
  EXPECT_EQ(status([&](auto& b) { b.renormalise_norm = infinity; }), Status::kOk);
  for (const double offset : {-1e-7, infinity, nan})
    EXPECT_EQ(status([&](auto& b) { b.sigmoid_offset = offset, b.score = Score::kSigmoid; }), Status::kBadOption) << offset;
  EXPECT_EQ(status([](auto& b) { b.sigmoid_offset = 1e-7, b.score = Score::kSigmoid; }), Status::kOk);
  EXPECT_EQ(status([](auto& b) { b.sigmoid_offset = 1e-7; }), Status::kBadOption);  // a softmax
  EXPECT_EQ(status([](auto& b) { b.sigmoid_offset = 1e-7, b.score = Score::kSqrtSoftplus; }), Status::kBadOption);
  EXPECT_EQ(status([](auto& b) { b.always = 1, b.score = Score::kSigmoid; }), Status::kNullPointer);
  EXPECT_EQ(status([&](auto& b) { b.always_logits = logits, b.always = 5, b.score = Score::kSigmoid; }),
            Status::kBadShape);
  for (const std::int32_t id : {-1, 4}) {
    EXPECT_EQ(status([&](auto& b) { b.given = &id; }), Status::kBadShape);
  }
  const std::int32_t third = 3;
  EXPECT_EQ(status([&](auto& b) { b.given = &third; }), Status::kOk);
  EXPECT_EQ(chosen[0], 3);
}

}  // namespace
}  // namespace moeaudit::kernels
