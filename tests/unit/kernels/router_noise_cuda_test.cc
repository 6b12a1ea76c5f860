// The noise of routers on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterNoiseCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <vector>

#include "kernels/cuda/router_noise.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class RouterNoiseCuda : public test::OnCuda {};

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream, float scale) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(24, stream, 0, n, g.data());
  for (float& v : g) v *= scale;
  return {g.begin(), g.end()};
}

template <class T>
void check(std::int64_t tokens, std::int64_t experts) {
  const std::int64_t n = tokens * experts;
  const auto logits = gaussians<T>(n, 1, 1), noise = gaussians<T>(n, 2, 1), noise_logits = gaussians<T>(n, 3, 8);
  const auto upstream = gaussians<double>(n, 4, 1);
  const test::OnDevice<T> d_logits(logits), d_noise(noise), d_noise_logits(noise_logits), d_out(logits),
      d_jittered(logits);
  const test::OnDevice<double> d_upstream(upstream), d_slope(upstream);
  std::vector<T> out(logits), product(logits);
  std::vector<double> slope(upstream);
  NoisyLogitsArgs<T> a;
  a.logits = logits.data(), a.noise = noise.data(), a.noise_logits = noise_logits.data(), a.tokens = tokens,
  a.experts = experts, a.eps = 1e-2;
  ASSERT_EQ(noisy_logits(a, out.data()), Status::kOk);
  ASSERT_EQ(noisy_logits_backward(a, upstream.data(), slope.data()), Status::kOk);
  ASSERT_EQ(jitter(logits.data(), noise.data(), n, Float::kBF16, product.data()), Status::kOk);
  a.logits = d_logits.data(), a.noise = d_noise.data(), a.noise_logits = d_noise_logits.data();
  ASSERT_EQ(cuda::noisy_logits(a, d_out.data(), nullptr), Status::kOk);
  ASSERT_EQ(cuda::noisy_logits_backward(a, d_upstream.data(), d_slope.data(), nullptr), Status::kOk);
  ASSERT_EQ(cuda::jitter(d_logits.data(), d_noise.data(), n, Float::kBF16, d_jittered.data(), nullptr), Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  test::expect_same(out, d_out.fetch(), "noisy logits");
  test::expect_same(slope, d_slope.fetch(), "slope");
  test::expect_same(product, d_jittered.fetch(), "jitter");
}

TEST_F(RouterNoiseCuda, SameBitsAsTheHost) {
  check<float>(1, 1);
  check<float>(300, 60);
  check<double>(77, 144);
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
