// The gate whose sum is rounded on the way, on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RoundedGateCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <string>
#include <vector>

#include "kernels/cuda/rounded_gate.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class RoundedGateCuda : public test::OnCuda {};

TEST_F(RoundedGateCuda, SameBitsAsTheHost) {
  const std::int64_t tokens = 19, hidden = 150, experts = 9;
  std::vector<float> x(static_cast<std::size_t>(tokens * hidden)), w(static_cast<std::size_t>(experts * hidden));
  std::vector<float> logits(static_cast<std::size_t>(tokens * experts), -7.0f);
  unit_gaussians(3, 1, 0, tokens * hidden, x.data());
  unit_gaussians(3, 2, 0, experts * hidden, w.data());
  for (const Float dtype : {Float::kF32, Float::kBF16, Float::kF16}) {
    round_values(x.data(), tokens * hidden, dtype, x.data());
    round_values(w.data(), experts * hidden, dtype, w.data());
    const test::OnDevice<float> d_x(x), d_w(w), d_logits(logits);
    for (const std::int64_t stretch : {1, 64, 150}) {
      RoundedGateArgs a{x.data(), w.data(), w.data(), tokens, hidden, experts, dtype, stretch};
      ASSERT_EQ(rounded_gate_logits(a, logits.data()), Status::kOk);
      a.x = d_x.data(), a.w = a.bias = d_w.data();
      ASSERT_EQ(cuda::rounded_gate_logits(a, d_logits.data(), nullptr), Status::kOk);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      test::expect_same(logits, d_logits.fetch(),
                        std::string(name_of(dtype)) + ", stretches of " + std::to_string(stretch));
    }
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
