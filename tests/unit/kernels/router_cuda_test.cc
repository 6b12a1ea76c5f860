// The CUDA router against the host router: the same bits, at shapes that fill and do not fill warps.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/router.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;

class RouterCuda : public test::OnCuda {};

template <class T>
void check(RouteArgs<T> a, std::int64_t tokens, bool correction, const std::string& what) {
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
  const auto chosen_size = static_cast<std::size_t>(tokens * a.top_k);
  std::vector<std::int32_t> chosen(chosen_size, -7), runner_up(static_cast<std::size_t>(tokens), -7);
  std::vector<T> weights(chosen_size, T(-7)), choice(logits.size(), T(-7));
  const OnDevice<T> d_logits(logits), d_bias(bias), d_weights(weights), d_choice(choice);
  const OnDevice<std::int32_t> d_chosen(chosen), d_runner_up(runner_up);
  a.tokens = tokens;
  a.logits = logits.data();
  a.correction_bias = correction ? bias.data() : nullptr;
  ASSERT_EQ(route(a, {chosen.data(), weights.data(), runner_up.data(), choice.data()}), Status::kOk);
  a.logits = d_logits.data();
  a.correction_bias = correction ? d_bias.data() : nullptr;
  ASSERT_EQ(cuda::route(a, {d_chosen.data(), d_weights.data(), d_runner_up.data(), d_choice.data()}, nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  expect_same(chosen, d_chosen.fetch(), what + " chosen");
  expect_same(runner_up, d_runner_up.fetch(), what + " runner-up");
  expect_same(weights, d_weights.fetch(), what + " weights");
  expect_same(choice, d_choice.fetch(), what + " choice");
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
        a.group_score = groups > 1 ? GroupScore::kTop2Sum : GroupScore::kNone;
        a.renormalise = true, a.renormalise_eps = T(1e-20), a.scaling = T(2.5);
        const std::string what = std::to_string(experts) + " experts, score " + std::to_string(static_cast<int>(score));
        check(a, 37, score != Score::kSoftmax, what);
        a.group_mask_is_zero = true;
        if (groups > 1) check(a, 5, true, what + ", zero mask");
        if (score == Score::kSoftmax && groups == 1) {
          a.softmax_after_top_k = true, a.renormalise = false;
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

TEST_F(RouterCuda, RunToRun) {
  std::vector<float> logits(100000 * 64);
  unit_gaussians(6, 0, 0, static_cast<std::int64_t>(logits.size()), logits.data());
  const OnDevice<float> d_logits(logits);
  std::vector<std::vector<float> > runs;
  for (int i = 0; i < 3; ++i) {
    const OnDevice<std::int32_t> chosen(std::vector<std::int32_t>(100000 * 8));
    const OnDevice<float> weights(std::vector<float>(100000 * 8));
    RouteArgs<float> a;
    a.logits = d_logits.data(), a.tokens = 100000, a.experts = 64, a.top_k = 8, a.renormalise = true;
    ASSERT_EQ(cuda::route(a, {chosen.data(), weights.data(), nullptr, nullptr}, nullptr), Status::kOk);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    runs.push_back(weights.fetch());
  }
  EXPECT_EQ(runs[0], runs[1]);
  EXPECT_EQ(runs[0], runs[2]);
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
