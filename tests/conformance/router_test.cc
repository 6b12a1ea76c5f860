// The router: kernels/host against reference/, and reference/ against a second derivation and the laws of routing.
#define BOOST_TEST_MODULE router
#include "kernels/host/router.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/rounded_gate.h"
#include "reference/router.h"
#include "tests/support/compare.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using k::Float;
using moeaudit::test::compare;
using moeaudit::test::CompareOptions;
using moeaudit::test::Comparison;
using moeaudit::test::tensor;
using moeaudit::test::values;
using moeaudit::test::Values;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<std::int64_t> ids(const at::Tensor& t) {
  const at::Tensor c = t.contiguous();
  return {c.data_ptr<std::int64_t>(), c.data_ptr<std::int64_t>() + c.numel()};
}
std::vector<float> gaussians(std::int64_t n, std::uint64_t stream, float scale = 1) {
  std::vector<float> v(static_cast<std::size_t>(n));
  k::unit_gaussians(11, stream, 0, n, v.data());
  for (float& x : v) x *= scale;
  return v;
}
std::vector<double> widened(const std::vector<float>& v) { return {v.begin(), v.end()}; }

void require_ok(const Comparison& c, const std::string& what) {
  BOOST_CHECK_MESSAGE(c.ok(), what << ": " << c.report());
}

// ---- the gate
// ---------------------------------------------------------------------------------------------------------------

template <class In, class Sum>
std::vector<Sum> gate(const std::vector<In>& x, const std::vector<In>& w, const std::vector<Sum>& bias,
                      std::int64_t tokens, std::int64_t hidden, std::int64_t experts) {
  std::vector<Sum> packed(static_cast<std::size_t>(k::packed_gate_size<Sum>(experts, hidden)));
  k::pack_gate(w.data(), experts, hidden, packed.data());
  std::vector<Sum> logits(static_cast<std::size_t>(tokens * experts));
  const k::GateArgs<In, Sum> a{x.data(), packed.data(), bias.empty() ? nullptr : bias.data(), tokens, hidden,
                               experts,  logits.data()};
  BOOST_REQUIRE(k::gate_logits(a) == k::Status::kOk);
  return logits;
}

/// sum_i |x_i w_i| + |bias| of each logit, as the bounds want it; its own rounding error is covered by 1 + 2^-40.
std::vector<double> absolute_sums(const std::vector<float>& x, const std::vector<float>& w,
                                  const std::vector<float>& bias, std::int64_t tokens, std::int64_t hidden,
                                  std::int64_t experts) {
  std::vector<double> sums;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t e = 0; e < experts; ++e) {
      double sum = bias.empty() ? 0.0 : std::fabs(static_cast<double>(bias[e]));
      for (std::int64_t i = 0; i < hidden; ++i)
        sum += std::fabs(static_cast<double>(x[t * hidden + i]) * w[e * hidden + i]);
      sums.push_back(sum * (1 + 0x1p-40));
    }
  }
  return sums;
}

void check_gate(const std::vector<float>& x, const std::vector<float>& w, const std::vector<float>& bias,
                std::int64_t tokens, std::int64_t hidden, std::int64_t experts, const std::string& what) {
  const std::vector<double> xd = widened(x), wd = widened(w), bd = widened(bias);
  const at::Tensor b = bias.empty() ? at::Tensor() : tensor(bd, {experts});
  const std::vector<double> truth =
      values(ref::gate_logits(tensor(xd, {tokens, hidden}), tensor(wd, {experts, hidden}), b));
  const std::vector<double> absolute = absolute_sums(x, w, bias, tokens, hidden, experts);
  const std::vector<std::int64_t> shape = {tokens, experts};
  const auto options = [&](Float sum, bool exact) {
    CompareOptions o;
    o.bound = [&absolute, hidden, sum, exact](std::size_t i, double) {
      return bounds::gate(hidden, absolute[i], sum, exact) + bounds::gate_in_index_order(hidden, absolute[i]);
    };
    o.same_non_finite_is_equal = true;
    return o;
  };
  const auto f64 = gate<double, double>(xd, wd, bd, tokens, hidden, experts);
  require_ok(compare(Values<double>{shape, truth}, Values<double>{shape, f64}, options(Float::kF64, false)),
             what + " float64");
  const auto wide = gate<float, double>(x, w, bd, tokens, hidden, experts);
  require_ok(compare(Values<double>{shape, truth}, Values<double>{shape, wide}, options(Float::kF64, true)),
             what + " wide");
  const auto f32 = gate<float, float>(x, w, bias, tokens, hidden, experts);
  require_ok(compare(Values<double>{shape, truth}, Values<float>{shape, f32}, options(Float::kF32, false)),
             what + " float32");
}

BOOST_AUTO_TEST_CASE(gate_agrees_with_the_reference) {
  struct Shape {
    std::int64_t tokens, hidden, experts;
  };
  for (const Shape s : {Shape{1, 1, 1},
                        {1, 3, 1},
                        {2, 127, 8},
                        {13, 128, 8},
                        {7, 129, 60},
                        {5, 2048, 64},
                        {3, 1000, 144},
                        {2, 512, 160},
                        {2, 700, 384}}) {
    const std::string what =
        std::to_string(s.tokens) + "x" + std::to_string(s.hidden) + "x" + std::to_string(s.experts);
    const auto x = gaussians(s.tokens * s.hidden, 1), w = gaussians(s.experts * s.hidden, 2, 0.05f);
    check_gate(x, w, {}, s.tokens, s.hidden, s.experts, what);
    check_gate(x, w, gaussians(s.experts, 3), s.tokens, s.hidden, s.experts, what + " bias");
  }
}

BOOST_AUTO_TEST_CASE(gate_at_the_edges_of_the_format) {
  const std::int64_t d = 300, E = 9, T = 4;
  // Products around the smallest float32 numbers, where every rounding is absolute.
  check_gate(gaussians(T * d, 4, 0x1p-70f), gaussians(E * d, 5, 0x1p-72f), {}, T, d, E, "underflow");
  check_gate(gaussians(T * d, 4, 1e-40f), gaussians(E * d, 5), {}, T, d, E, "subnormal x");
  check_gate(gaussians(T * d, 4, 1e18f), gaussians(E * d, 5, 1e18f), {}, T, d, E, "large");
  check_gate(std::vector<float>(T * d, 0.0f), gaussians(E * d, 5), {}, T, d, E, "zero");
  // Cancellation: pairs that add to nothing leave only rounding.
  std::vector<float> x = gaussians(T * d, 6), w = gaussians(E * d, 7);
  for (std::int64_t i = 0; i < T * d; i += 2) x[i + 1] = -x[i];
  for (std::int64_t i = 0; i < E * d; i += 2) w[i + 1] = w[i];
  check_gate(x, w, {}, T, d, E, "cancellation");
  std::vector<float> special = gaussians(T * d, 8);
  special[5] = static_cast<float>(kInf);
  special[d + 7] = static_cast<float>(kNan);
  check_gate(special, gaussians(E * d, 9), {}, T, d, E, "infinity and NaN");
}

// Low precision: exact products and wide sums of values of the dtype, one rounding.
BOOST_AUTO_TEST_CASE(low_precision_gate_is_rounded_once) {
  const std::int64_t d = 1024, E = 40, T = 20;
  for (const Float f : {Float::kBF16, Float::kF16}) {
    std::vector<float> x = gaussians(T * d, 10), w = gaussians(E * d, 11, 0.03f);
    k::round_values(x.data(), T * d, f, x.data());
    k::round_values(w.data(), E * d, f, w.data());
    const std::vector<double> truth = values(ref::gate_logits(tensor(widened(x), {T, d}), tensor(widened(w), {E, d})));
    std::vector<double> low = gate<float, double>(x, w, {}, T, d, E);
    k::round_values(low.data(), T * E, f, low.data());
    const std::vector<double> absolute = absolute_sums(x, w, {}, T, d, E);
    CompareOptions o;
    o.format = f;
    o.bound = [&](std::size_t i, double expected) {
      const double before =
          bounds::gate(d, absolute[i], Float::kF64, true) + bounds::gate_in_index_order(d, absolute[i]);
      return bounds::rounded(expected, before, f);
    };
    const Comparison c = compare(Values<double>{{T, E}, truth}, Values<double>{{T, E}, low}, o);
    require_ok(c, name_of(f));
    BOOST_CHECK_GT(c.max_ulp.value,
                   0.25);  // and it does round, by half a place: rounding inside the sum is off by many
  }
}

// sqrt(softplus) of tensors in a low precision has one in between: what LibTorch's tensors give.
BOOST_AUTO_TEST_CASE(sqrt_softplus_rounds_softplus_too) {
  const std::int64_t E = 16, T = 64;
  for (const auto& [f, torch] :
       std::vector<std::pair<Float, at::ScalarType>>{{Float::kBF16, at::kBFloat16}, {Float::kF16, at::kHalf}}) {
    std::vector<float> logits = gaussians(T * E, 15, 6.0f), choice(logits.size()), weights(T);
    k::round_values(logits.data(), T * E, f, logits.data());
    std::vector<std::int32_t> chosen(T);
    k::RouteArgs<float> a;
    a.logits = logits.data(), a.tokens = T, a.experts = E, a.top_k = 1, a.score = k::Score::kSqrtSoftplus,
    a.tensor_dtype = f;
    BOOST_REQUIRE(k::route(a, {chosen.data(), weights.data(), nullptr, choice.data()}) == k::Status::kOk);
    // LibTorch 1.13 has neither in float16 on a CPU: each in float32, and rounded.
    const at::Tensor l = tensor(widened(logits), {T, E}).to(at::kFloat);
    const at::Tensor soft = at::softplus(l, 1, 20).to(torch).to(at::kFloat), want = at::sqrt(soft).to(torch);
    require_ok(compare(Values<double>{{T, E}, values(want.to(at::kDouble))}, Values<float>{{T, E}, choice}),
               name_of(f));
  }
}

// Rounding inside the sum, the variant: what LibTorch's tensors of the dtype give, bit for bit, and what the gate above
// does not.
BOOST_AUTO_TEST_CASE(rounding_inside_the_sum_is_another_gate) {
  const std::int64_t d = 300, E = 12, T = 9;
  for (const auto& [f, torch] :
       std::vector<std::pair<Float, at::ScalarType>>{{Float::kBF16, at::kBFloat16}, {Float::kF16, at::kHalf}}) {
    std::vector<float> x = gaussians(T * d, 12), w = gaussians(E * d, 13, 0.05f), bias = gaussians(E, 14);
    for (std::vector<float>* v : {&x, &w, &bias})
      k::round_values(v->data(), static_cast<std::int64_t>(v->size()), f, v->data());
    std::vector<double> once = gate<float, double>(x, w, {}, T, d, E);
    k::round_values(once.data(), T * E, f, once.data());
    for (const std::int64_t stretch : {std::int64_t{1}, std::int64_t{64}, d}) {
      for (const bool biased : {false, true}) {
        std::vector<float> got(static_cast<std::size_t>(T * E));
        const k::RoundedGateArgs a{x.data(), w.data(), biased ? bias.data() : nullptr, T, d, E, f, stretch};
        BOOST_REQUIRE(k::rounded_gate_logits(a, got.data()) == k::Status::kOk);
        const auto want =
            values(ref::rounded_gate_logits(tensor(widened(x), {T, d}), tensor(widened(w), {E, d}),
                                            biased ? tensor(widened(bias), {E}) : at::Tensor(), torch, stretch));
        require_ok(compare(Values<double>{{T, E}, want}, Values<float>{{T, E}, got}),
                   std::string(name_of(f)) + " by " + std::to_string(stretch));
        if (biased) continue;
        std::size_t differ = 0;
        for (std::size_t i = 0; i < got.size(); ++i) differ += static_cast<double>(got[i]) != once[i] ? 1 : 0;
        if (stretch == d) BOOST_CHECK_EQUAL(differ, 0u);
        if (stretch == 1) BOOST_CHECK_GT(differ, got.size() / 2);
      }
    }
  }
  // Ones: bfloat16 counts to 256, in three partial sums to 300.
  const std::vector<float> ones(300, 1.0f);
  float sum = 0;
  k::RoundedGateArgs a{ones.data(), ones.data(), nullptr, 1, 300, 1, Float::kBF16, 1};
  BOOST_REQUIRE(k::rounded_gate_logits(a, &sum) == k::Status::kOk);
  BOOST_CHECK_EQUAL(sum, 256.0f);
  a.stretch = 100;
  BOOST_REQUIRE(k::rounded_gate_logits(a, &sum) == k::Status::kOk);
  BOOST_CHECK_EQUAL(sum, 300.0f);
  a.stretch = 0;
  BOOST_CHECK(k::rounded_gate_logits(a, &sum) == k::Status::kBadShape);
}

// ---- route
// ----------------------------------------------------------------------------------------------------------------

struct Case {
  std::string name;
  std::int64_t experts, top_k;
  ref::RouteOptions options;  // top_k is filled in
  bool correction = false;
  bool scaled = false, given = false;  // expert_scale; the choice is given
  std::int64_t always = 0;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&all](const std::string& name, std::int64_t experts, std::int64_t top_k, auto change,
                          bool correction = false) {
    Case c{name, experts, top_k, {}, correction};
    c.options.top_k = top_k;
    change(c.options);
    all.push_back(c);
  };
  const auto nothing = [](ref::RouteOptions&) {};
  const auto renormalised = [](ref::RouteOptions& o) { o.renormalise = true; };
  const auto after = [](ref::RouteOptions& o) { o.score_after_top_k = true; };
  const auto grouped = [](ref::GroupScore s, std::int64_t groups, std::int64_t top, ref::Score score, bool zero) {
    return [=](ref::RouteOptions& o) {
      o.group_score = s, o.groups = groups, o.top_groups = top, o.score = score, o.group_mask_is_zero = zero;
      o.renormalise = true, o.renormalise_eps = 1e-20, o.scaling = 2.5;
    };
  };
  add("one expert", 1, 1, renormalised);
  add("k = E", 8, 8, renormalised);
  add("switch, top-1", 64, 1, nothing);
  add(
      "one choice, sigmoid", 16, 1, [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid; }, true);
  add("mixtral", 8, 2, renormalised);
  add("no renormalisation", 60, 4, nothing);
  add("E = 144", 144, 8, renormalised);
  add("E = 160", 160, 6, renormalised);
  add("E = 384, k = 32", 384, 32, renormalised);
  add("gpt_oss", 128, 4, after);
  add(
      "sqrtsoftplus", 256, 6,
      [](ref::RouteOptions& o) { o.score = ref::Score::kSqrtSoftplus, o.renormalise = true, o.scaling = 1.5; }, true);
  add(
      "sigmoid, bias", 64, 8, [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid; }, true);
  add("deepseek_v2", 160, 6, grouped(ref::GroupScore::kMax, 8, 3, ref::Score::kSoftmax, true));
  add("deepseek_v3", 256, 8, grouped(ref::GroupScore::kTop2Sum, 8, 4, ref::Score::kSigmoid, false), true);
  add("deepseek_v3 before 5.6", 256, 8, grouped(ref::GroupScore::kTop2Sum, 8, 4, ref::Score::kSigmoid, true), true);
  add("k beyond what the groups leave", 16, 6, grouped(ref::GroupScore::kTop2Sum, 4, 1, ref::Score::kSigmoid, false),
      true);
  add("node-limited, three of a group", 64, 9,
      grouped(ref::GroupScore::kTopShareSum, 4, 3, ref::Score::kSigmoid, false), true);
  add("node-limited, fewer choices than nodes", 64, 2,
      grouped(ref::GroupScore::kTopShareSum, 8, 4, ref::Score::kSoftmax, false));
  add(
      "multiplied bias", 64, 8,
      [](ref::RouteOptions& o) { o.bias_multiplies = true, o.renormalise = true, o.renormalise_eps = 1e-20; }, true);
  add("groups of logits, softmax after", 64, 6, [](ref::RouteOptions& o) {  // Megatron-LM without pre-softmax
    o.score_after_top_k = true, o.group_score = ref::GroupScore::kTop2Sum, o.groups = 8, o.top_groups = 3;
  });
  add("all groups kept", 16, 4, grouped(ref::GroupScore::kMax, 4, 4, ref::Score::kSigmoid, false));
  // What is_rare().
  add("llama4", 16, 1, [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid, o.score_after_top_k = true; });
  add("cohere2_moe, sigmoid", 128, 8,
      [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid, o.score_after_top_k = true, o.renormalise = true; });
  add(
      "ernie4_5_moe", 64, 6, [](ref::RouteOptions& o) { o.renormalise = true, o.renormalise_floor = 1e-12; }, true);
  add(
      "a floor above most sums", 64, 6,
      [](ref::RouteOptions& o) { o.renormalise = true, o.renormalise_floor = 0.5, o.renormalise_eps = 0.01; }, true);
  add(
      "sigmoids and a floor", 24, 3,
      [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid, o.renormalise = true, o.renormalise_floor = 1.2; }, true);
  add(
      "laguna", 256, 8,
      [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid, o.logit_softcap = 30, o.renormalise = true; }, true);
  add("softmax of capped logits", 60, 4, [](ref::RouteOptions& o) { o.logit_softcap = 2; });
  add("gemma4", 128, 8, renormalised);
  all.back().scaled = true;
  add(
      "inkling", 64, 6,
      [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid, o.renormalise = true, o.scaling = 8; }, true);
  all.back().always = 2;
  add("deepseek_v4, by token id", 256, 6, [](ref::RouteOptions& o) {
    o.score = ref::Score::kSqrtSoftplus, o.renormalise = true, o.renormalise_eps = 1e-20, o.scaling = 1.5;
  });
  all.back().given = true;
  add(
      "all of it", 24, 3,
      [](ref::RouteOptions& o) {
        o.score = ref::Score::kSigmoid, o.logit_softcap = 4, o.renormalise = true, o.renormalise_floor = 1.2;
        o.renormalise_eps = 1e-3, o.scaling = 2.5;
      },
      true);
  all.back().always = 3, all.back().scaled = all.back().given = true;
  const auto normed = [](double p, ref::Score score = ref::Score::kSoftmax, double offset = 0) {
    return [=](ref::RouteOptions& o) {
      o.renormalise = true, o.renormalise_norm = p, o.score = score, o.sigmoid_offset = offset;
    };
  };
  add("dbrx, p = 2", 16, 4, normed(2));
  add("p = 3", 144, 8, normed(3));
  add("p = 1.5", 384, 32, normed(1.5));
  add("p = 1/2", 60, 4, normed(0.5));
  add("the largest", 64, 6, normed(kInf));
  add("the largest of sigmoids", 64, 6, normed(kInf, ref::Score::kSigmoid));
  add("p = 1.25 of square roots of softplus", 60, 6, normed(1.25, ref::Score::kSqrtSoftplus), true);
  add("olmo-core, sigmoid", 64, 8, normed(1, ref::Score::kSigmoid, 1e-7), true);
  add("olmo-core, sigmoid, p = 2", 64, 8, normed(2, ref::Score::kSigmoid, 1e-7), true);
  add(
      "an offset that is seen", 24, 3,
      [](ref::RouteOptions& o) { o.score = ref::Score::kSigmoid, o.sigmoid_offset = 0.25, o.scaling = 2; }, true);
  add("all of it, p = 3", 24, 3, [](ref::RouteOptions& o) {
    o.score = ref::Score::kSigmoid, o.sigmoid_offset = 0.25, o.logit_softcap = 4, o.renormalise = true;
    o.renormalise_norm = 3, o.renormalise_floor = 1.1, o.renormalise_eps = 1e-3, o.scaling = 2.5;
    o.score_after_top_k = true;
  });
  all.back().always = 3, all.back().scaled = all.back().given = true;
  return all;
}

/// What a case has besides logits and bias.
struct Extras {
  std::vector<float> scale, always;
  std::vector<std::int32_t> given;
  template <class T>
  static std::vector<T> as(const std::vector<float>& v) {
    return {v.begin(), v.end()};
  }
};
Extras extras(const Case& c, std::int64_t tokens) {
  Extras x;
  if (c.scaled) x.scale = gaussians(c.experts, 24);
  x.always = gaussians(tokens * c.always, 23, 2.0f);
  for (std::int64_t i = 0; c.given && i < tokens * c.top_k; ++i)
    x.given.push_back(static_cast<std::int32_t>((i / c.top_k * 5 + i % c.top_k * 11) % c.experts));
  return x;
}
ref::Routed reference_route(const Case& c, const at::Tensor& logits, const std::vector<double>& bias) {
  const std::int64_t tokens = logits.size(0);
  const Extras x = extras(c, tokens);
  ref::RouteInputs in;
  if (c.correction) in.correction_bias = tensor(bias, {c.experts});
  if (c.scaled) in.expert_scale = tensor(widened(x.scale), {c.experts});
  if (c.given) in.given = at::tensor(x.given, at::kInt).to(at::kLong).reshape({tokens, c.top_k});
  if (c.always > 0) in.always_logits = tensor(widened(x.always), {tokens, c.always});
  return ref::route(logits, c.options, in);
}

template <class T>
k::RouteArgs<T> args_of(const Case& c, const std::vector<T>& logits, const std::vector<T>& bias) {
  k::RouteArgs<T> a;
  a.logits = logits.data();
  a.correction_bias = c.correction ? bias.data() : nullptr;
  a.tokens = static_cast<std::int64_t>(logits.size()) / c.experts;
  a.experts = c.experts;
  a.top_k = c.top_k;
  a.score = static_cast<k::Score>(c.options.score);
  a.score_after_top_k = c.options.score_after_top_k;
  a.group_score = static_cast<k::GroupScore>(c.options.group_score);
  a.groups = c.options.groups;
  a.top_groups = c.options.top_groups;
  a.group_mask_is_zero = c.options.group_mask_is_zero;
  a.bias_multiplies = c.options.bias_multiplies;
  a.renormalise = c.options.renormalise;
  a.renormalise_eps = static_cast<T>(c.options.renormalise_eps);
  a.renormalise_floor = static_cast<T>(c.options.renormalise_floor);
  a.renormalise_norm = static_cast<T>(c.options.renormalise_norm);
  a.sigmoid_offset = static_cast<T>(c.options.sigmoid_offset);
  a.scaling = static_cast<T>(c.options.scaling);
  a.logit_softcap = static_cast<T>(c.options.logit_softcap);
  return a;
}
template <class T>
k::Status route_case(const Case& c, const std::vector<T>& logits, const std::vector<T>& bias,
                     const k::RouteResult<T>& r) {
  k::RouteArgs<T> a = args_of<T>(c, logits, bias);
  const Extras x = extras(c, a.tokens);
  const std::vector<T> scale = Extras::as<T>(x.scale), always = Extras::as<T>(x.always);
  a.expert_scale = c.scaled ? scale.data() : nullptr;
  a.given = c.given ? x.given.data() : nullptr;
  a.always_logits = always.data(), a.always = c.always;
  return k::route(a, r);
}
static_assert(static_cast<int>(k::Score::kSqrtSoftplus) == static_cast<int>(ref::Score::kSqrtSoftplus));
static_assert(static_cast<int>(k::GroupScore::kTopShareSum) == static_cast<int>(ref::GroupScore::kTopShareSum));

/// Logits [tokens, experts] of several kinds, one token each and more of the ordinary one.
std::vector<float> edge_logits(std::int64_t experts) {
  std::vector<float> v = gaussians(24 * experts, 20, 2.0f);
  const auto row = [&v, experts](auto f) {
    for (std::int64_t e = 0; e < experts; ++e) v.push_back(static_cast<float>(f(e)));
  };
  row([](std::int64_t) { return 0.0; });                                   // all equal
  row([](std::int64_t e) { return e % 2 ? 1.0 : 0.0; });                   // ties
  row([](std::int64_t e) { return e % 2 ? 0.0 : -0.0; });                  // zeros of both signs
  row([](std::int64_t e) { return 1e-44 * static_cast<double>(e % 5); });  // subnormals
  row([](std::int64_t e) { return -100.0 - static_cast<double>(e); });     // probabilities that underflow in float32
  row([](std::int64_t e) { return e == 0 ? 700.0 : -700.0; });             // a sure thing
  row([](std::int64_t e) { return static_cast<double>(e) * 1e-6; });       // barely apart
  return v;
}

/// Relative error that the score may have between two evaluations in formats a and b, from equal logits.
double score_relative(const Case& c, double range, Float f) {
  const std::int64_t terms = c.options.score_after_top_k ? c.top_k : c.experts;
  const double logit = bounds::softcapped(c.options.logit_softcap, f);
  switch (c.options.score) {
    case ref::Score::kSoftmax: return bounds::softmax_relative(terms, logit, range, f);
    case ref::Score::kSigmoid:
      return c.options.sigmoid_offset > 0 ? bounds::offset_relative(bounds::sigmoid_relative(logit, f), f)
                                          : bounds::sigmoid_relative(logit, f);
    case ref::Score::kSqrtSoftplus: return bounds::sqrt_softplus_relative(logit, f);
  }
  return kNan;
}

double range_of(const std::vector<float>& logits, std::int64_t token, std::int64_t experts) {
  const auto [low, high] =
      std::minmax_element(logits.begin() + token * experts, logits.begin() + (token + 1) * experts);
  return static_cast<double>(*high) - static_cast<double>(*low);
}

/// The chosen scores of a token, and of those that it always has, before renormalisation: their norm, and the largest
/// |ln score|. Exact but for float64.
struct Chosen {
  double norm = 0, range = 0;
};

/// Bound on |weight computed in f - weight of the reference|, both from the same logits.
double weight_bound(const Case& c, double weight, const Chosen& scores, double range, Float f) {
  const double p = c.options.renormalise_norm;
  const auto one = [&](Float format) {
    double r = score_relative(c, range, format);
    if (c.options.renormalise)
      r = p == 1 ? bounds::renormalised_relative(r, c.top_k + c.always, format)
                 : bounds::normed_relative(r, c.top_k + c.always, p, scores.range, format);
    r = bounds::scaled_relative(r, format);
    return c.scaled ? bounds::scaled_relative(r, format) : r;
  };
  const double underflow =
      !c.options.renormalise ? bounds::softmax_underflow(f)
      : p == 1               ? bounds::renormalised_underflow(scores.norm + c.options.renormalise_eps, c.top_k, f)
                             : bounds::normed_underflow(scores.norm, c.top_k + c.always, p, f);
  return (one(f) + one(Float::kF64)) * weight + std::fabs(c.options.scaling) * underflow + 0.5 * bounds::smallest(f);
}

std::vector<Chosen> chosen_scores(const Case& c, const at::Tensor& logits, const std::vector<double>& bias) {
  Case raw = c;
  raw.options.renormalise = raw.scaled = false;
  raw.options.scaling = 1;
  const ref::Routed r = reference_route(raw, logits, bias);
  const at::Tensor all = c.always > 0 ? at::cat({r.weights, r.always_weights}, -1) : r.weights;
  const std::vector<double> norm = values(at::norm(all, c.options.renormalise_norm, at::IntArrayRef{-1})),
                            range = values(all.clamp_min(bounds::smallest(Float::kF64)).log().abs().amax(-1));
  std::vector<Chosen> out;
  for (std::size_t t = 0; t < norm.size(); ++t) out.push_back({norm[t], range[t]});
  return out;
}

template <class T>
void check_route(const Case& c, Float f) {
  const std::vector<float> logits32 = edge_logits(c.experts);
  const std::vector<float> bias32 = gaussians(c.experts, 21, 0.05f);
  const std::vector<T> logits(logits32.begin(), logits32.end()), bias(bias32.begin(), bias32.end());
  const auto tokens = static_cast<std::int64_t>(logits.size()) / c.experts;
  const at::Tensor wide_logits = tensor(widened(logits32), {tokens, c.experts});
  const ref::Routed truth = reference_route(c, wide_logits, widened(bias32));
  const std::vector<Chosen> scores = chosen_scores(c, wide_logits, widened(bias32));
  const std::vector<double> choice = values(truth.choice), weights = values(truth.weights);
  const std::vector<double> always = c.always > 0 ? values(truth.always_weights) : std::vector<double>();
  const std::vector<std::int64_t> chosen = ids(truth.chosen);
  std::vector<std::int32_t> got(static_cast<std::size_t>(tokens * c.top_k));
  std::vector<T> got_weights(got.size()), got_always(always.size());
  const k::Status status =
      route_case<T>(c, logits, bias, {got.data(), got_weights.data(), nullptr, nullptr, got_always.data()});
  BOOST_REQUIRE_MESSAGE(status == k::Status::kOk, c.name << ": " << k::name_of(status));

  int compared = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double range = range_of(logits32, t, c.experts);
    bool same = true;
    for (std::int64_t j = 0; j < c.top_k; ++j) {
      const std::int64_t want = chosen[t * c.top_k + j], have = got[t * c.top_k + j];
      if (want == have) continue;
      same = false;
      BOOST_CHECK_MESSAGE(f != Float::kF64, c.name << " token " << t << ": float64 must choose alike");
      // The two must be closer than the errors of both choices: of the scores, and of adding the bias. Where a whole
      // group was chosen instead of another, experts of very different choice may change places; no case here does.
      const double a = choice[t * c.experts + want], b = choice[t * c.experts + have];
      const double each = score_relative(c, range, f) + score_relative(c, range, Float::kF64) + 2 * k::unit_roundoff(f);
      const double bias_size = c.correction ? std::fabs(bias32[want]) + std::fabs(bias32[have]) : 0.0;
      BOOST_CHECK_MESSAGE(
          a == b || std::fabs(a - b) <= each * (std::fabs(a) + std::fabs(b) + bias_size) + 2 * bounds::smallest(f),
          c.name << " token " << t << ": chose " << have << " (" << b << ") instead of " << want << " (" << a << ")");
    }
    if (!same) continue;
    const std::vector<std::int64_t> shape = {c.top_k};
    CompareOptions o;
    o.bound = [&](std::size_t, double w) { return weight_bound(c, std::fabs(w), scores[t], range, f); };
    require_ok(compare(Values<double>{shape, {weights.data() + t * c.top_k, static_cast<std::size_t>(c.top_k)}},
                       Values<T>{shape, {got_weights.data() + t * c.top_k, static_cast<std::size_t>(c.top_k)}}, o),
               c.name + " token " + std::to_string(t));
    const auto s = static_cast<std::size_t>(c.always);
    if (c.always > 0)
      require_ok(compare(Values<double>{{c.always}, {always.data() + t * c.always, s}},
                         Values<T>{{c.always}, {got_always.data() + t * c.always, s}}, o),
                 c.name + " always, token " + std::to_string(t));
    ++compared;
  }
  BOOST_CHECK_GE(compared, 20);
}

BOOST_AUTO_TEST_CASE(route_in_float64_agrees_with_the_reference) {
  for (const Case& c : cases()) check_route<double>(c, Float::kF64);
}
BOOST_AUTO_TEST_CASE(route_in_float32_agrees_within_bounds) {
  for (const Case& c : cases()) check_route<float>(c, Float::kF32);
}

template <class T>
void what_is_not_finite_chooses_alike() {
  for (const Case& c : cases()) {
    std::vector<T> logits, bias;
    for (const float v : gaussians(3 * c.experts, 22)) logits.push_back(v);
    for (const float v : gaussians(c.experts, 21, 0.05f)) bias.push_back(v);
    const auto at = [&](std::int64_t t, std::int64_t e) -> T& { return logits[t * c.experts + e % c.experts]; };
    at(0, 2) = kInf;
    at(1, 1) = at(1, 5) = -kInf;
    at(2, 3) = kNan;
    const ref::Routed truth =
        reference_route(c, tensor(std::vector<double>{logits.begin(), logits.end()}, {3, c.experts}),
                        std::vector<double>{bias.begin(), bias.end()});
    std::vector<std::int32_t> got(static_cast<std::size_t>(3 * c.top_k));
    std::vector<T> weights(got.size());
    BOOST_REQUIRE(route_case<T>(c, logits, bias, {got.data(), weights.data(), nullptr, nullptr}) == k::Status::kOk);
    const std::vector<std::int64_t> want = ids(truth.chosen);
    BOOST_CHECK_MESSAGE(std::equal(want.begin(), want.end(), got.begin(), got.end()), c.name);
    const std::vector<double> expected = values(truth.weights);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      BOOST_CHECK_MESSAGE(std::isfinite(weights[i]) == std::isfinite(expected[i]), c.name << " " << i);
      BOOST_CHECK_MESSAGE(std::isnan(weights[i]) == std::isnan(expected[i]), c.name << " " << i);
    }
  }
}
BOOST_AUTO_TEST_CASE(infinite_and_nan_logits_choose_alike) {
  what_is_not_finite_chooses_alike<double>();
  what_is_not_finite_chooses_alike<float>();
}

/// Nobody comes after choices that were given, and one that is no expert is refused.
BOOST_AUTO_TEST_CASE(given_choices) {
  const std::vector<double> logits = {3, 1, 2, 0, 0, 1, 2, 3};
  std::vector<std::int32_t> given = {1, 3, 0, 2}, got(4), next(2, 7);
  std::vector<double> weights(4);
  k::RouteArgs<double> a;
  a.logits = logits.data(), a.given = given.data();
  a.tokens = 2, a.experts = 4, a.top_k = 2, a.score = k::Score::kSigmoid;
  BOOST_REQUIRE(k::route(a, {got.data(), weights.data(), next.data(), nullptr}) == k::Status::kOk);
  BOOST_CHECK(got == given);
  BOOST_CHECK(next == std::vector<std::int32_t>(2, -1));
  BOOST_CHECK_CLOSE(weights[0], 1 / (1 + std::exp(-1.0)), 1e-12);
  for (const std::int32_t outside : {-1, 4}) {
    given[3] = outside;
    BOOST_CHECK(k::route(a, {got.data(), weights.data(), nullptr, nullptr}) == k::Status::kBadShape);
  }
}

/// A token alone has the bits that it has among others.
BOOST_AUTO_TEST_CASE(one_token) {
  for (const Case& c : cases()) {
    if (c.given || c.always > 0) continue;  // theirs differ by token
    const std::vector<float> logits = edge_logits(c.experts), bias = gaussians(c.experts, 21, 0.05f);
    const auto route = [&](const std::vector<float>& z) {
      std::vector<std::int32_t> chosen(z.size() / static_cast<std::size_t>(c.experts) *
                                       static_cast<std::size_t>(c.top_k));
      std::vector<float> weights(chosen.size());
      BOOST_REQUIRE(route_case<float>(c, z, bias, {chosen.data(), weights.data(), nullptr, nullptr}) == k::Status::kOk);
      return std::pair(chosen, weights);
    };
    const auto all = route(logits);
    for (std::size_t t = 0; t < 31; ++t) {
      const auto n = static_cast<std::size_t>(c.experts), k = static_cast<std::size_t>(c.top_k);
      const auto one = route({logits.begin() + t * n, logits.begin() + (t + 1) * n});
      BOOST_CHECK(std::equal(one.first.begin(), one.first.end(), all.first.begin() + t * k));
      BOOST_CHECK(std::equal(one.second.begin(), one.second.end(), all.second.begin() + t * k));
    }
  }
}

// ---- the reference itself
// ------------------------------------------------------------------------------------------------------

/// Second derivation, one token, plain loops: selection by counting how many experts beat each one.
struct Plain {
  std::vector<std::int64_t> chosen;
  std::vector<double> weights, always;
};
Plain plain_route(std::vector<double> logits, const Case& c, std::int64_t t, std::int64_t tokens,
                  const std::vector<double>& bias) {
  const ref::RouteOptions& o = c.options;
  const Extras x = extras(c, tokens);
  const std::size_t n = logits.size();
  const auto cap = [&o](double l) {
    const long double by = o.logit_softcap;
    return o.logit_softcap > 0 ? static_cast<double>(by * std::tanh(l / by)) : l;
  };
  for (double& l : logits) l = cap(l);
  const auto alone = [&o](long double l) -> long double {
    return o.score == ref::Score::kSigmoid ? 1 / (1 + std::exp(-l)) + static_cast<long double>(o.sigmoid_offset)
                                           : std::sqrt(l > 20 ? l : std::log1p(std::exp(l)));
  };
  std::vector<long double> score(n);
  const double top = *std::max_element(logits.begin(), logits.end());
  long double total = 0;
  for (std::size_t e = 0; e < n; ++e) total += std::exp(static_cast<long double>(logits[e]) - top);
  for (std::size_t e = 0; e < n; ++e) {
    const long double l = logits[e];
    if (o.score_after_top_k)
      score[e] = l;
    else if (o.score == ref::Score::kSoftmax)
      score[e] = std::exp(l - top) / total;
    else
      score[e] = alone(l);
  }
  std::vector<double> choice(n);
  for (std::size_t e = 0; e < n; ++e) {
    choice[e] = static_cast<double>(score[e]);
    if (c.correction) choice[e] = o.bias_multiplies ? choice[e] * bias[e] : choice[e] + bias[e];
  }
  const auto rank = [](const std::vector<double>& v, std::size_t i) {
    std::size_t beaten_by = 0;
    for (std::size_t j = 0; j < v.size(); ++j) beaten_by += v[j] > v[i] || (v[j] == v[i] && j < i) ? 1 : 0;
    return beaten_by;
  };
  if (o.group_score != ref::GroupScore::kNone) {
    const std::size_t size = n / static_cast<std::size_t>(o.groups);
    std::vector<double> group;
    for (std::size_t g = 0; g < n; g += size) {
      std::vector<double> members(choice.begin() + g, choice.begin() + g + size);
      std::sort(members.rbegin(), members.rend());
      const std::int64_t best = o.group_score == ref::GroupScore::kTop2Sum ? 2
                                : o.group_score == ref::GroupScore::kTopShareSum
                                    ? std::max<std::int64_t>(1, o.top_k / o.top_groups)
                                    : 1;
      group.push_back(std::accumulate(members.begin(), members.begin() + best, 0.0));
    }
    for (std::size_t e = 0; e < n; ++e) {
      if (rank(group, e / size) >= static_cast<std::size_t>(o.top_groups))
        choice[e] = o.group_mask_is_zero ? 0.0 : -kInf;
    }
  }
  Plain p;
  p.chosen.resize(static_cast<std::size_t>(o.top_k));
  for (std::size_t e = 0; e < n; ++e) {
    const std::size_t r = rank(choice, e);
    if (r < p.chosen.size()) p.chosen[r] = static_cast<std::int64_t>(e);
  }
  for (std::size_t j = 0; c.given && j < p.chosen.size(); ++j) p.chosen[j] = x.given[t * c.top_k + j];
  const bool over_chosen = o.score_after_top_k && o.score == ref::Score::kSoftmax;
  long double sum = 0;
  std::vector<long double> weight;
  for (const std::int64_t e : p.chosen) {
    weight.push_back(over_chosen           ? std::exp(score[e] - score[p.chosen[0]])
                     : o.score_after_top_k ? alone(score[e])
                                           : score[e]);
    sum += weight.back();
  }
  for (std::int64_t s = 0; s < c.always; ++s) {
    weight.push_back(alone(cap(x.always[t * c.always + s])));
    sum += weight.back();
  }
  const long double power = o.renormalise_norm;
  long double norm = power == 1 ? sum : 0;
  for (const long double v : weight) {
    if (std::isinf(power)) norm = std::max(norm, v);
    else if (power != 1) norm += std::exp(power * std::log(v));
  }
  if (power != 1 && !std::isinf(power)) norm = std::exp(std::log(norm) / power);
  for (std::size_t j = 0; j < weight.size(); ++j) {
    long double v = weight[j];
    if (over_chosen) v /= sum;
    if (o.renormalise)
      v /= std::max(norm + static_cast<long double>(o.renormalise_eps), static_cast<long double>(o.renormalise_floor));
    v *= o.scaling;
    if (c.scaled && j < p.chosen.size()) v *= x.scale[p.chosen[j]];
    (j < p.chosen.size() ? p.weights : p.always).push_back(static_cast<double>(v));
  }
  return p;
}

BOOST_AUTO_TEST_CASE(reference_agrees_with_plain_loops) {
  for (const Case& c : cases()) {
    const std::vector<float> logits = edge_logits(c.experts);
    const std::vector<double> bias = widened(gaussians(c.experts, 21, 0.05f));
    const auto tokens = static_cast<std::int64_t>(logits.size()) / c.experts;
    const at::Tensor l = tensor(widened(logits), {tokens, c.experts});
    const ref::Routed r = reference_route(c, l, bias);
    const std::vector<Chosen> scores = chosen_scores(c, l, bias);
    const std::vector<std::int64_t> chosen = ids(r.chosen);
    const std::vector<double> weights = values(r.weights),
                              always = c.always > 0 ? values(r.always_weights) : std::vector<double>();
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Plain p =
          plain_route({logits.begin() + t * c.experts, logits.begin() + (t + 1) * c.experts}, c, t, tokens, bias);
      BOOST_CHECK_MESSAGE(std::equal(p.chosen.begin(), p.chosen.end(), chosen.begin() + t * c.top_k),
                          c.name << " token " << t);
      CompareOptions o;
      const double range = range_of(logits, t, c.experts);
      o.bound = [&](std::size_t, double w) { return weight_bound(c, std::fabs(w), scores[t], range, Float::kF64); };
      const auto k_values = static_cast<std::size_t>(c.top_k);
      require_ok(compare(Values<double>{{c.top_k}, p.weights},
                         Values<double>{{c.top_k}, {weights.data() + t * c.top_k, k_values}}, o),
                 c.name + " plain, token " + std::to_string(t));
      if (c.always > 0)
        require_ok(compare(Values<double>{{c.always}, p.always},
                           Values<double>{{c.always}, {always.data() + t * c.always, p.always.size()}}, o),
                   c.name + " plain always, token " + std::to_string(t));
    }
  }
}

BOOST_AUTO_TEST_CASE(reference_gate_agrees_with_plain_loops) {
  const std::int64_t T = 3, d = 50, E = 7;
  const auto x = gaussians(T * d, 30), w = gaussians(E * d, 31), bias = gaussians(E, 32);
  const auto got =
      values(ref::gate_logits(tensor(widened(x), {T, d}), tensor(widened(w), {E, d}), tensor(widened(bias), {E})));
  const auto absolute = absolute_sums(x, w, bias, T, d, E);
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      long double sum = bias[e];
      for (std::int64_t i = d; i-- > 0;) sum += static_cast<long double>(x[t * d + i]) * w[e * d + i];
      BOOST_CHECK_LE(std::fabs(static_cast<double>(sum) - got[t * E + e]),
                     2 * bounds::gate_in_index_order(d, absolute[t * E + e]));
    }
  }
}

// Relabelling the experts (by whole groups, and inside groups) relabels the choice and leaves the weights.
BOOST_AUTO_TEST_CASE(permuting_experts_permutes_the_choice) {
  for (const Case& c : cases()) {
    if (c.scaled || c.given || c.always > 0) continue;
    const std::int64_t n = c.experts, T = 24;  // the ordinary tokens: no ties, which a permutation may break otherwise
    const std::vector<float> all = edge_logits(n);
    const at::Tensor logits = tensor(widened({all.begin(), all.begin() + T * n}), {T, n});
    const std::vector<double> biases = widened(gaussians(n, 21, 0.05f));
    const at::Tensor bias = tensor(biases, {n});
    const std::int64_t size = n / c.options.groups;
    std::vector<std::int64_t> order;  // new place -> old place: groups reversed, members rotated
    for (std::int64_t g = c.options.groups; g-- > 0;) {
      for (std::int64_t i = 0; i < size; ++i) order.push_back(g * size + (i + size / 2) % size);
    }
    const at::Tensor index = at::from_blob(order.data(), {n}, at::kLong).clone();
    const ref::Routed a = ref::route(logits, c.options, c.correction ? bias : at::Tensor());
    const ref::Routed b =
        ref::route(logits.index_select(1, index), c.options, c.correction ? bias.index_select(0, index) : at::Tensor());
    const bool masked_ties = c.options.group_mask_is_zero || c.name == "k beyond what the groups leave";
    if (masked_ties) continue;  // masked experts tie, and ties go by index
    const std::vector<std::int64_t> before = ids(a.chosen), after = ids(index.index_select(0, b.chosen.reshape({-1})));
    BOOST_CHECK_MESSAGE(before == after, c.name);
    // The sums over experts run in another order now.
    CompareOptions o;
    const std::vector<double> wa = values(a.weights), wb = values(b.weights);
    const double range = 2 * 2 * 6.34;  // the largest the generator gives, both signs, times 2
    const std::vector<Chosen> scores = chosen_scores(c, logits, biases);
    o.bound = [&](std::size_t i, double w) {
      return weight_bound(c, std::fabs(w), scores[i / static_cast<std::size_t>(c.top_k)], range, Float::kF64);
    };
    require_ok(compare(Values<double>{{T, c.top_k}, wa}, Values<double>{{T, c.top_k}, wb}, o), c.name + " permuted");
  }
}

// Adding a number to all logits of a token changes no softmax. A power of two keeps the logits exact here.
BOOST_AUTO_TEST_CASE(softmax_does_not_see_a_shift) {
  for (const Case& c : cases()) {
    if (c.options.score != ref::Score::kSoftmax || c.options.logit_softcap > 0) continue;
    std::vector<double> logits = widened(gaussians(10 * c.experts, 40));
    for (double& l : logits) l = std::ldexp(std::nearbyint(std::ldexp(l, 20)), -20);
    const at::Tensor l = tensor(logits, {10, c.experts});
    const ref::Routed a = ref::route(l, c.options), b = ref::route(l + 64.0, c.options);
    BOOST_CHECK(at::equal(a.chosen, b.chosen));
    BOOST_CHECK_MESSAGE(at::equal(a.weights, b.weights), c.name);  // l - max l is exact, so the same bits
  }
}

BOOST_AUTO_TEST_CASE(weights_have_the_sum_they_promise) {
  for (const Case& c : cases()) {
    if (c.options.renormalise_floor > 0) continue;  // a sum below it stays below 1
    const std::vector<float> all = edge_logits(c.experts);
    const bool over_chosen = c.options.score_after_top_k && c.options.score == ref::Score::kSoftmax;
    Case unscaled = c;  // by expert, that is
    unscaled.correction = unscaled.scaled = false;
    const ref::Routed r =
        reference_route(unscaled, tensor(widened({all.begin(), all.begin() + 24 * c.experts}), {24, c.experts}), {});
    const at::Tensor weights = c.always > 0 ? at::cat({r.weights, r.always_weights}, -1) : r.weights;
    const double p = c.options.renormalise_norm;
    for (const double s : values(at::norm(weights, p, at::IntArrayRef{-1}))) {  // of PyTorch, for a second opinion
      if (p != 1) {
        // The norm of the quotients: twice the norm's own error, of scores within e^(+-17), and a division.
        const double off = bounds::norm_relative(0, c.top_k + c.always, p, 17, Float::kF64);
        BOOST_CHECK_LE(std::fabs(s - c.options.scaling), c.options.scaling * (2 * off + bounds::gamma(3, 0x1p-53)));
      } else if (c.options.renormalise || over_chosen) {
        const auto terms = static_cast<double>(c.top_k + c.always);
        BOOST_CHECK_LE(std::fabs(s - c.options.scaling), c.options.scaling * bounds::gamma(2.0 * terms + 4, 0x1p-53));
      } else if (c.options.score == ref::Score::kSoftmax) {
        BOOST_CHECK(s > 0 && s <= 1 + bounds::gamma(static_cast<double>(c.experts) + 8, 0x1p-53));
      }
    }
  }
}

/// By hand: softmax of ln 3, ln 4, ln 5 and 0 is 3/13, 4/13, 5/13 and 1/13; sigmoid(0) is 1/2, sigmoid(ln 3) 3/4.
template <class T>
void norms_by_hand() {
  const auto weights = [](std::vector<T> logits, std::int64_t top_k, auto change) {
    k::RouteArgs<T> a;
    a.logits = logits.data(), a.tokens = 1, a.experts = static_cast<std::int64_t>(logits.size()), a.top_k = top_k;
    a.renormalise = true;
    change(a);
    std::vector<std::int32_t> chosen(static_cast<std::size_t>(top_k));
    std::vector<T> w(chosen.size());
    BOOST_REQUIRE(k::route(a, {chosen.data(), w.data(), nullptr, nullptr}) == k::Status::kOk);
    return w;
  };
  const auto near = [](T got, double want) { BOOST_CHECK_LE(std::fabs(got - want), 16 * std::numeric_limits<T>::epsilon()); };
  const auto l = [](double v) { return static_cast<T>(std::log(v)); };
  const std::vector<T> logits = {l(3), l(4), 0, T(-1)}, three = {l(3), l(4), l(5), 0};
  const auto p = [](double v) { return [v](auto& a) { a.renormalise_norm = static_cast<T>(v); }; };
  std::vector<T> w = weights(logits, 2, p(2));
  near(w[0], 0.8), near(w[1], 0.6);
  w = weights(three, 3, p(kInf));
  near(w[0], 1), near(w[1], 0.8), near(w[2], 0.6);
  w = weights(three, 3, p(3));  // 27 + 64 + 125 = 216 = 6^3
  near(w[0], 5.0 / 6), near(w[1], 4.0 / 6), near(w[2], 0.5);
  w = weights({l(9), l(4), 0, T(-1)}, 2, p(0.5));  // (3 + 2)^2 = 25
  near(w[0], 9.0 / 25), near(w[1], 4.0 / 25);
  const auto offset = [](bool renormalise) {
    return [renormalise](auto& a) { a.score = k::Score::kSigmoid, a.sigmoid_offset = T(0.25), a.renormalise = renormalise; };
  };
  w = weights({0, l(3), T(-40), T(-50)}, 2, offset(false));
  near(w[0], 1), near(w[1], 0.75);
  w = weights({0, l(3), T(-40), T(-50)}, 2, offset(true));
  near(w[0], 4.0 / 7), near(w[1], 3.0 / 7);
  w = weights({T(-90), T(-80)}, 2, offset(true));  // the offset alone
  near(w[0], 0.5), near(w[1], 0.5);
}
BOOST_AUTO_TEST_CASE(norms_and_offsets_by_hand) {
  norms_by_hand<double>();
  norms_by_hand<float>();
  // Squares that float32 does not hold, as torch.norm has it: a norm of 0.
  const float low[] = {-60, -61};
  std::int32_t chosen[2];
  float w[2];
  k::RouteArgs<float> a;
  a.logits = low, a.tokens = 1, a.experts = a.top_k = 2, a.score = k::Score::kSigmoid;
  a.renormalise = true, a.renormalise_norm = 2;
  BOOST_REQUIRE(k::route(a, {chosen, w, nullptr, nullptr}) == k::Status::kOk);
  BOOST_CHECK(w[0] == HUGE_VALF && w[1] == HUGE_VALF);
}

BOOST_AUTO_TEST_CASE(reference_refuses_what_does_not_fit) {
  const at::Tensor logits = at::zeros({2, 6}, at::kDouble);
  const auto with = [](auto change) {
    ref::RouteOptions o;
    change(o);
    return o;
  };
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.top_k = 7; })), c10::Error);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.top_k = 0; })), c10::Error);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.group_score = ref::GroupScore::kMax, o.groups = 4; })),
                    c10::Error);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.group_score = ref::GroupScore::kTop2Sum, o.groups = 6; })),
                    c10::Error);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.renormalise = true, o.renormalise_norm = 0; })), c10::Error);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.renormalise = true, o.renormalise_norm = kNan; })), c10::Error);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto& o) { o.sigmoid_offset = 1e-7; })), c10::Error);
  ref::RouteInputs always;
  always.always_logits = at::zeros({2, 1}, at::kDouble);
  BOOST_CHECK_THROW(ref::route(logits, with([](auto&) {}), always), c10::Error);  // a softmax over which of them?
  BOOST_CHECK_THROW(ref::gate_logits(logits, at::zeros({3, 5}, at::kDouble)), c10::Error);
}

}  // namespace
