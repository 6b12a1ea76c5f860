// Expert choice on a CUDA device against the host: the same tokens in the same order.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(ExpertChoiceCuda, SameTokensAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/expert_choice.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class ExpertChoiceCuda : public test::OnCuda {};

template <class T>
void check(std::int64_t tokens, std::int64_t experts, std::int64_t capacity, float grid, bool padding) {
  const std::string what = std::to_string(tokens) + "x" + std::to_string(experts) + "/" + std::to_string(capacity);
  std::vector<float> g(static_cast<std::size_t>(tokens * experts));
  unit_gaussians(18, 1, 0, tokens * experts, g.data());
  std::vector<T> scores;
  for (const float v : g) scores.push_back(static_cast<T>(grid > 0 ? std::nearbyint(v / grid) * grid : v));
  if (tokens > 9) scores[9 * experts] = std::numeric_limits<T>::quiet_NaN();
  std::vector<std::uint8_t> valid(static_cast<std::size_t>(tokens), 1);
  for (std::size_t t = 0; padding && t < valid.size(); ++t) valid[t] = t % 3 != 1;
  const auto slots = static_cast<std::size_t>(experts * capacity);
  std::vector<std::int32_t> chosen(slots, -7), taken(static_cast<std::size_t>(tokens), -7);
  std::vector<T> weights(slots, T(-7));
  ExpertChoiceArgs<T> a;
  a.scores = scores.data(), a.valid = valid.data(), a.tokens = tokens, a.experts = experts, a.capacity = capacity;
  const test::OnDevice<T> d_scores(scores), d_weights(weights);
  const test::OnDevice<std::uint8_t> d_valid(valid);
  const test::OnDevice<std::int32_t> d_chosen(chosen), d_taken(taken);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::expert_choice_workspace(experts, capacity)));
  ASSERT_EQ(expert_choice(a, {chosen.data(), weights.data(), taken.data()}), Status::kOk) << what;
  a.scores = d_scores.data(), a.valid = d_valid.data();
  ASSERT_EQ(cuda::expert_choice(a, {d_chosen.data(), d_weights.data(), d_taken.data()}, workspace.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(chosen, d_chosen.fetch(), what + " tokens");
  test::expect_same(weights, d_weights.fetch(), what + " weights");
  test::expect_same(taken, d_taken.fetch(), what + " taken");
  std::vector<double> upstream(slots), d_host(scores.size(), -7);
  for (std::size_t i = 0; i < slots; ++i) upstream[i] = static_cast<double>(i) + 0.5;
  const test::OnDevice<double> d_upstream(upstream), d_device(d_host);
  ASSERT_EQ(expert_choice_backward(chosen.data(), upstream.data(), tokens, experts, capacity, d_host.data()),
            Status::kOk);
  ASSERT_EQ(cuda::expert_choice_backward(d_chosen.data(), d_upstream.data(), tokens, experts, capacity, d_device.data(),
                                         nullptr),
            Status::kOk);
  test::expect_same(d_host, d_device.fetch(), what + " gradient");
}

TEST_F(ExpertChoiceCuda, SameTokensAsTheHost) {
  check<float>(1, 1, 1, 0, false);
  check<float>(300, 8, 75, 0.5f, false);
  check<double>(257, 3, 257, 1.0f, true);
  check<double>(1000, 160, 12, 0, true);
  check<float>(5000, 64, 156, 0, false);
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
