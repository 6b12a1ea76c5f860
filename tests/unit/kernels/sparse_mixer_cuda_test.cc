// SparseMixer on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(SparseMixerCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/sparse_mixer.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class SparseMixerCuda : public test::OnCuda {};

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream, Float dtype) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(25, stream, 0, n, g.data());
  for (float& v : g) v = static_cast<float>(round_to(static_cast<double>(v), dtype));
  return {g.begin(), g.end()};
}

template <class T>
void check(std::int64_t tokens, std::int64_t experts, double jitter, Float dtype, bool training) {
  const std::string what = std::to_string(tokens) + "x" + std::to_string(experts) + (training ? " training" : "");
  const auto all = static_cast<std::size_t>(tokens * experts), slots = static_cast<std::size_t>(2 * tokens);
  auto logits = gaussians<T>(tokens * experts, 1, dtype);
  if (all > 40) {
    logits[0] = std::numeric_limits<T>::quiet_NaN(), logits[all - 1] = std::numeric_limits<T>::infinity();
    logits[all / 2] = -std::numeric_limits<T>::infinity(), logits[all / 3] = logits[all / 3 + 1];
  }
  const auto draws = gaussians<T>(2 * tokens, 2, dtype);
  const auto upstream = gaussians<double>(2 * tokens, 3, dtype);
  std::vector<std::int32_t> given, chosen(slots, -7);
  for (std::size_t i = 0; i < slots; ++i)
    given.push_back(static_cast<std::int32_t>((i * i + i / 2) % static_cast<std::size_t>(experts)));
  std::vector<T> weights(slots, T(-7)), p(2 * all, T(-7));
  std::vector<std::uint8_t> kept(2 * all, 7);
  std::vector<double> d(all, -7);
  const test::OnDevice<T> d_logits(logits), d_draws(draws), d_weights(weights), d_p(p);
  const test::OnDevice<std::int32_t> d_given(given), d_chosen(chosen);
  const test::OnDevice<std::uint8_t> d_kept(kept);
  const test::OnDevice<double> d_upstream(upstream), d_d(d);
  SparseMixerBackwardArgs<T> b;
  SparseMixerArgs<T>& a = b.forward;
  a.logits = logits.data(), a.tokens = tokens, a.experts = experts, a.jitter = jitter,
  a.logits_dtype = a.tensor_dtype = dtype;
  if (training) a.given = given.data(), a.draws = draws.data();
  ASSERT_EQ(sparse_mixer(a, {chosen.data(), weights.data(), kept.data(), p.data()}), Status::kOk) << what;
  b.chosen = chosen.data(), b.weights = upstream.data();
  ASSERT_EQ(sparse_mixer_backward(b, d.data()), Status::kOk) << what;
  a.logits = d_logits.data();
  if (training) a.given = d_given.data(), a.draws = d_draws.data();
  ASSERT_EQ(cuda::sparse_mixer(a, {d_chosen.data(), d_weights.data(), d_kept.data(), d_p.data()}, nullptr), Status::kOk)
      << what;
  b.chosen = d_chosen.data(), b.weights = d_upstream.data();
  ASSERT_EQ(cuda::sparse_mixer_backward(b, d_d.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(chosen, d_chosen.fetch(), what + " chosen");
  test::expect_same(weights, d_weights.fetch(), what + " weights");
  test::expect_same(kept, d_kept.fetch(), what + " kept");
  test::expect_same(p, d_p.fetch(), what + " probabilities");
  test::expect_same(d, d_d.fetch(), what + " gradient");
}

TEST_F(SparseMixerCuda, SameBitsAsTheHost) {
  for (const bool training : {false, true}) {
    check<float>(1, 2, 0.01, Float::kF32, training);
    check<float>(300, 16, 0.1, Float::kBF16, training);
    check<float>(129, 60, 0.3, Float::kF16, training);
    check<double>(77, 144, 0.05, Float::kF64, training);
    check<double>(50, 8, 0.2, Float::kF32, training);
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
