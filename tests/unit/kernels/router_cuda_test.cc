// The CUDA router against the host router: the same bits, at shapes that fill and do not fill warps.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/router.h"
#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;

class RouterCuda : public test::OnCuda {};

/// What is_rare() besides numbers.
struct Rare {
  bool scaled = false, given = false;
  std::int64_t always = 0;
};

template <class T>
void check(RouteArgs<T> a, std::int64_t tokens, bool correction, const std::string& what, const Rare& rare = {}) {
  std::vector<float> g(static_cast<std::size_t>(tokens * a.experts)), b(static_cast<std::size_t>(a.experts));
  unit_gaussians(5, 1, 0, tokens * a.experts, g.data());
  unit_gaussians(5, 2, 0, a.experts, b.data());
  std::vector<T> logits(g.begin(), g.end()), bias(b.begin(), b.end());
  for (T& v : logits)
    v = static_cast<T>(std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(v), 4)), -4));  // ties
  if (tokens > 2) {
    logits[0] = std::numeric_limits<T>::infinity();
    logits[static_cast<std::size_t>(a.experts)] = std::numeric_limits<T>::quiet_NaN();
  }
  std::vector<float> s(static_cast<std::size_t>(a.experts)), l(static_cast<std::size_t>(tokens * rare.always));
  unit_gaussians(5, 3, 0, a.experts, s.data());
  unit_gaussians(5, 4, 0, tokens * rare.always, l.data());
  const std::vector<T> scale(s.begin(), s.end()), always_logits(l.begin(), l.end());
  std::vector<T> always(l.size(), T(-7));
  const OnDevice<T> d_scale(scale), d_always_logits(always_logits), d_always(always);
  const auto chosen_size = static_cast<std::size_t>(tokens * a.top_k);
  std::vector<std::int32_t> given;
  for (std::int64_t i = 0; i < tokens * a.top_k; ++i) given.push_back(static_cast<std::int32_t>(i * 5 % a.experts));
  const OnDevice<std::int32_t> d_given(given);
  a.always = rare.always;
  std::vector<std::int32_t> chosen(chosen_size, -7), runner_up(static_cast<std::size_t>(tokens), -7);
  std::vector<T> weights(chosen_size, T(-7)), choice(logits.size(), T(-7));
  const OnDevice<T> d_logits(logits), d_bias(bias), d_weights(weights), d_choice(choice);
  const OnDevice<std::int32_t> d_chosen(chosen), d_runner_up(runner_up);
  a.tokens = tokens;
  a.logits = logits.data();
  a.correction_bias = correction ? bias.data() : nullptr;
  a.expert_scale = rare.scaled ? scale.data() : nullptr, a.given = rare.given ? given.data() : nullptr;
  a.always_logits = always_logits.data();
  ASSERT_EQ(route(a, {chosen.data(), weights.data(), runner_up.data(), choice.data(), always.data()}), Status::kOk);
  a.logits = d_logits.data();
  a.correction_bias = correction ? d_bias.data() : nullptr;
  a.expert_scale = rare.scaled ? d_scale.data() : nullptr, a.given = rare.given ? d_given.data() : nullptr;
  a.always_logits = d_always_logits.data();
  ASSERT_EQ(cuda::route(a, {d_chosen.data(), d_weights.data(), d_runner_up.data(), d_choice.data(), d_always.data()},
                        nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  expect_same(chosen, d_chosen.fetch(), what + " chosen");
  expect_same(runner_up, d_runner_up.fetch(), what + " runner-up");
  expect_same(weights, d_weights.fetch(), what + " weights");
  expect_same(choice, d_choice.fetch(), what + " choice");
  expect_same(always, d_always.fetch(), what + " always");
}

template <class T>
void check_rare() {
  for (const Float dtype : {Float::kF64, Float::kBF16}) {
    for (const Score score : {Score::kSoftmax, Score::kSigmoid, Score::kSqrtSoftplus}) {
      for (const auto& [experts, top_k] : std::vector<std::array<std::int64_t, 2> >{{4, 4}, {64, 8}, {384, 8}}) {
        RouteArgs<T> plain;
        plain.experts = experts, plain.top_k = top_k, plain.score = score, plain.tensor_dtype = dtype;
        plain.renormalise = true;
        const std::string what = std::to_string(experts) + " experts, score " + std::to_string(static_cast<int>(score));
        RouteArgs<T> a = plain;
        a.renormalise_floor = T(0.4);
        check(a, 9, true, what + ", floor");
        a = plain, a.logit_softcap = T(1.5);
        check(a, 9, true, what + ", capped");
        for (const double p : {0.5, 2.0, 3.0, HUGE_VAL}) {
          a = plain, a.renormalise_norm = static_cast<T>(p);
          check(a, 9, true, what + ", norm " + std::to_string(p));
        }
        a.score_after_top_k = true;
        check(a, 9, false, what + ", capped, score after");
        check(plain, 9, false, what + ", scaled by expert", {true});
        check(plain, 9, true, what + ", given", {false, true});
        if (score == Score::kSoftmax) continue;
        a = plain, a.score_after_top_k = true;
        check(a, 9, true, what + ", score after");
        check(plain, 9, false, what + ", always", {false, false, 2});
        if (score == Score::kSigmoid) {
          a = plain, a.sigmoid_offset = T(1e-7);
          check(a, 9, true, what + ", offset");
          a.sigmoid_offset = T(0.25), a.renormalise_norm = T(1.5);
          check(a, 9, true, what + ", offset and norm", {false, false, 2});
        }
        a = plain, a.score_after_top_k = true;
        a.logit_softcap = T(2), a.renormalise_floor = T(1), a.renormalise_eps = T(0.1), a.scaling = T(2.5);
        a.weights_dtype = Float::kBF16;
        check(a, 9, true, what + ", all of it", {true, true, 4});
      }
    }
  }
}

TEST_F(RouterCuda, WhatFewRoutersHave) {
  check_rare<float>();
  check_rare<double>();
}

template <class T>
void check_all() {
  for (const Float dtype : {Float::kF64, Float::kBF16}) {
    for (const Score score : {Score::kSoftmax, Score::kSigmoid, Score::kSqrtSoftplus}) {
      for (const auto& [experts, top_k, groups, top_groups] : std::vector<std::array<std::int64_t, 4> >{
               {1, 1, 1, 1}, {8, 2, 1, 1}, {60, 60, 1, 1}, {160, 6, 8, 3}, {384, 32, 1, 1}, {1024, 8, 64, 5}}) {
        RouteArgs<T> a;
        a.experts = experts, a.top_k = top_k, a.groups = groups, a.top_groups = top_groups, a.score = score,
        a.tensor_dtype = dtype;
        a.group_score = groups > 1 ? (score == Score::kSigmoid ? GroupScore::kTopShareSum : GroupScore::kTop2Sum)
                                   : GroupScore::kNone;
        a.renormalise = true, a.renormalise_eps = T(1e-20), a.scaling = T(2.5);
        const std::string what = std::to_string(experts) + " experts, score " + std::to_string(static_cast<int>(score));
        check(a, 37, score != Score::kSoftmax, what);
        a.group_mask_is_zero = true;
        if (groups > 1) check(a, 5, true, what + ", zero mask");
        if (score == Score::kSoftmax) {
          a.score_after_top_k = true, a.renormalise = false, a.group_mask_is_zero = false;
          check(a, 37, false, what + ", softmax after top-k");
        }
      }
    }
  }
}

TEST_F(RouterCuda, SameBitsAsTheHost) {
  check_all<float>();
  check_all<double>();
}

/// float32 alone reaches the register kernels: every width of theirs, and what falls back from them.
TEST_F(RouterCuda, EveryRegisterWidth) {
  for (const std::int64_t experts : {1, 7, 8, 9, 16, 31, 32, 33, 60, 64, 96, 128, 144, 160, 192, 256, 320, 384, 385}) {
    for (const std::int64_t top_k :
         {std::int64_t{1}, std::int64_t{2}, std::int64_t{6}, std::min<std::int64_t>(experts, 32), std::int64_t{33}}) {
      if (top_k > experts) continue;
      RouteArgs<float> a;
      a.experts = experts, a.top_k = top_k, a.renormalise = true;
      const std::string what = std::to_string(experts) + " experts, " + std::to_string(top_k) + " chosen";
      check(a, 19, false, what);
      check(a, 19, true, what + ", bias");
      a.score_after_top_k = true;
      check(a, 19, false, what + ", softmax after");
      if (experts % 32 != 0 || experts == 32) continue;
      a.score_after_top_k = false, a.score = Score::kSigmoid;
      for (const GroupScore group : {GroupScore::kMax, GroupScore::kTop2Sum, GroupScore::kTopShareSum}) {
        a.group_score = group, a.groups = experts / 32, a.top_groups = (a.groups + 1) / 2;
        if (group_members(a) > 32) continue;
        check(a, 19, true, what + ", groups");
        a.group_mask_is_zero = true;
        check(a, 19, true, what + ", groups, zero mask");
        a.group_mask_is_zero = false, a.score_after_top_k = true, a.score = Score::kSoftmax;
        check(a, 19, false, what + ", groups, softmax after");
        a.score_after_top_k = false, a.score = Score::kSigmoid;
      }
      a.group_score = GroupScore::kNone, a.bias_multiplies = true, a.weights_dtype = Float::kBF16;
      check(a, 19, true, what + ", multiplied bias, weights in bfloat16");
    }
  }
}

template <class In, class Sum>
void check_gate(std::int64_t tokens, std::int64_t hidden, std::int64_t experts) {
  std::vector<float> x(static_cast<std::size_t>(tokens * hidden)), w(static_cast<std::size_t>(experts * hidden));
  unit_gaussians(7, 1, 0, tokens * hidden, x.data());
  unit_gaussians(7, 2, 0, experts * hidden, w.data());
  const std::vector<In> xs(x.begin(), x.end());
  std::vector<Sum> packed(static_cast<std::size_t>(packed_gate_size<Sum>(experts, hidden))),
      bias(w.begin(), w.begin() + experts), logits(static_cast<std::size_t>(tokens * experts));
  pack_gate(w.data(), experts, hidden, packed.data());
  ASSERT_EQ(
      gate_logits(GateArgs<In, Sum>{xs.data(), packed.data(), bias.data(), tokens, hidden, experts, logits.data()}),
      Status::kOk);
  const OnDevice<In> d_x(xs);
  const OnDevice<Sum> d_packed(packed), d_bias(bias), d_logits(std::vector<Sum>(logits.size(), Sum(-7)));
  ASSERT_EQ(cuda::gate_logits(
                GateArgs<In, Sum>{d_x.data(), d_packed.data(), d_bias.data(), tokens, hidden, experts, d_logits.data()},
                nullptr),
            Status::kOk);
  expect_same(logits, d_logits.fetch(),
              std::to_string(tokens) + " x " + std::to_string(hidden) + " x " + std::to_string(experts));
}

TEST_F(RouterCuda, GateHasTheBitsOfTheHost) {
  for (const auto& [tokens, hidden, experts] : std::vector<std::array<std::int64_t, 3> >{
           {1, 1, 1}, {3, 127, 8}, {65, 128, 64}, {70, 300, 60}, {9, 1000, 144}, {130, 129, 65}}) {
    check_gate<float, float>(tokens, hidden, experts);
    check_gate<double, double>(tokens, hidden, experts);
    check_gate<float, double>(tokens, hidden, experts);
  }
}

std::uint16_t bfloat16(float v) {
  return static_cast<std::uint16_t>(
      std::bit_cast<std::uint32_t>(static_cast<float>(round_to(static_cast<double>(v), Float::kBF16))) >> 16);
}

/// Inputs of a bfloat16 gate, as bits and as floats.
struct LowPrecision {
  std::vector<float> values;
  std::vector<std::uint16_t> bits;
  LowPrecision(std::int64_t count, std::uint64_t stream, float scale) : values(static_cast<std::size_t>(count)) {
    unit_gaussians(8, stream, 0, count, values.data());
    for (float& v : values) {
      bits.push_back(bfloat16(v * scale));
      v = std::bit_cast<float>(static_cast<std::uint32_t>(bits.back()) << 16);
    }
  }
};

TEST_F(RouterCuda, TensorCoreGateAndItsRouting) {
  for (const auto& [tokens, hidden, experts, top_k, grouped] :
       std::vector<std::array<std::int64_t, 5> >{{1, 8, 1, 1, 0},
                                                 {5, 64, 8, 2, 0},
                                                 {200, 72, 16, 4, 0},
                                                 {129, 256, 32, 8, 0},
                                                 {128, 1024, 60, 4, 0},
                                                 {70, 64, 64, 8, 0},
                                                 {70, 64, 64, 8, 1},
                                                 {300, 520, 128, 8, 0},
                                                 {3, 200, 128, 32, 1},
                                                 {130, 2048, 144, 6, 0},
                                                 {257, 512, 256, 8, 0},
                                                 {129, 64, 256, 8, 1},
                                                 {40, 512, 384, 8, 0}}) {
    for (const cuda::TensorCores cores : test::tensor_cores()) {
      const std::string what = std::to_string(tokens) + " x " + std::to_string(hidden) + " x " +
                               std::to_string(experts) + (cores == cuda::TensorCores::kWarp ? "" : ", warpgroups");
      const LowPrecision x(tokens * hidden, 1, 1.0f), w(experts * hidden, 2, 0.05f);
      std::vector<float> bias(static_cast<std::size_t>(experts));
      unit_gaussians(8, 3, 0, experts, bias.data());
      const OnDevice<std::uint16_t> d_x(x.bits), d_w(w.bits);
      const OnDevice<float> d_bias(bias),
          d_logits(std::vector<float>(static_cast<std::size_t>(tokens * experts), -7.0f));
      const cuda::TensorCoreGateArgs a{d_x.data(), d_w.data(), d_bias.data(), tokens, hidden, experts, cores};
      ASSERT_EQ(cuda::gate_logits(a, d_logits.data(), nullptr), Status::kOk) << what;
      const std::vector<float> logits = d_logits.fetch();
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t e = 0; e < experts; ++e) {
          double sum = bias[static_cast<std::size_t>(e)], absolute = std::fabs(sum);
          for (std::int64_t i = 0; i < hidden; ++i) {
            const double product = static_cast<double>(x.values[static_cast<std::size_t>(t * hidden + i)]) *
                                   w.values[static_cast<std::size_t>(e * hidden + i)];
            sum += product, absolute += std::fabs(product);
          }
          ASSERT_NEAR(logits[static_cast<std::size_t>(t * experts + e)], sum,
                      bounds::tensor_core_dot(hidden, absolute) + 0x1p-24 * absolute)
              << what << " at " << t << ", " << e;
        }
      }
      if (experts > cuda::kMostFusedExperts) continue;
      RouteArgs<float> r;
      r.top_k = top_k, r.renormalise = true;
      if (grouped)
        r.score = Score::kSigmoid, r.group_score = GroupScore::kTop2Sum, r.groups = experts / 32, r.top_groups = 2;
      const auto slots = static_cast<std::size_t>(tokens * top_k);
      std::vector<std::int32_t> chosen(slots);
      std::vector<float> weights(slots);
      const OnDevice<std::int32_t> d_chosen(std::vector<std::int32_t>(slots, -7));
      const OnDevice<float> d_weights(std::vector<float>(slots, -7.0f)),
          again(std::vector<float>(logits.size(), -7.0f));
      ASSERT_EQ(
          cuda::gate_and_route(a, r, {d_chosen.data(), d_weights.data(), nullptr, nullptr}, again.data(), nullptr),
          Status::kOk)
          << what;
      expect_same(logits, again.fetch(), what + " logits, again");
      r.logits = logits.data(), r.tokens = tokens, r.experts = experts;
      ASSERT_EQ(route(r, {chosen.data(), weights.data(), nullptr, nullptr}), Status::kOk);
      expect_same(chosen, d_chosen.fetch(), what + " chosen");
      expect_same(weights, d_weights.fetch(), what + " weights");
    }
  }
}

/// Enough tokens for rare paths, among them quotients that one correction step does not set right by itself.
TEST_F(RouterCuda, RunToRun) {
  const std::int64_t tokens = test::sized(100000, 4000);
  const auto slots = static_cast<std::size_t>(tokens * 8);
  std::vector<float> logits(slots * 8);
  unit_gaussians(6, 0, 0, static_cast<std::int64_t>(logits.size()), logits.data());
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] *= static_cast<float>(1 << i / 64 % 7);  // up to +-300
  const OnDevice<float> d_logits(logits);
  std::vector<std::vector<float> > runs;
  for (int i = 0; i < 3; ++i) {
    const OnDevice<std::int32_t> chosen(std::vector<std::int32_t>(slots, 0));
    const OnDevice<float> weights(std::vector<float>(slots, 0.0f));
    RouteArgs<float> a;
    a.logits = d_logits.data(), a.tokens = tokens, a.experts = 64, a.top_k = 8, a.renormalise = true;
    ASSERT_EQ(cuda::route(a, {chosen.data(), weights.data(), nullptr, nullptr}, nullptr), Status::kOk);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    runs.push_back(weights.fetch());
  }
  EXPECT_EQ(runs[0], runs[1]);
  EXPECT_EQ(runs[0], runs[2]);
  std::vector<std::int32_t> chosen(slots);
  std::vector<float> weights(chosen.size());
  RouteArgs<float> a;
  a.logits = logits.data(), a.tokens = tokens, a.experts = 64, a.top_k = 8, a.renormalise = true;
  ASSERT_EQ(route(a, {chosen.data(), weights.data(), nullptr, nullptr}), Status::kOk);
  expect_same(weights, runs[0], "weights");
}

// The checks come before the device is asked for anything, so they run everywhere.
TEST(RouterCudaArguments, AreChecked) {
  RouteArgs<float> a;
  float logits = 0;
  std::int32_t chosen = 0;
  a.logits = &logits, a.tokens = 1, a.experts = 2000, a.top_k = 1;
  EXPECT_EQ(cuda::route(a, {&chosen, nullptr, nullptr, nullptr}, nullptr), Status::kBadShape);
  a.experts = 8, a.top_k = 9;
  EXPECT_EQ(cuda::route(a, {&chosen, nullptr, nullptr, nullptr}, nullptr), Status::kBadTopK);
  a.top_k = 1;
  EXPECT_EQ(cuda::route(a, {}, nullptr), Status::kNullPointer);
  a.tokens = 0;
  EXPECT_EQ(cuda::route(a, {}, nullptr), Status::kOk);
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
