// Cross-entropy on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(TokenLossCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <vector>

#include "kernels/cuda/token_loss.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class TokenLossCuda : public test::OnCuda {};

template <class T>
void check(std::int64_t tokens, std::int64_t words) {
  std::vector<float> g(static_cast<std::size_t>(tokens * words));
  unit_gaussians(7, 1, 0, tokens * words, g.data());
  std::vector<T> logits(g.begin(), g.end()), gradient(logits.size(), T(-7));
  std::vector<std::int64_t> labels, count(1, -7);
  for (std::int64_t t = 0; t < tokens; ++t) labels.push_back(t % 5 == 2 ? kIgnored : t * 7 % words);
  std::vector<double> sum(1, -7), each(static_cast<std::size_t>(tokens), -7);
  const test::OnDevice<T> d_logits(logits), d_gradient(gradient);
  const test::OnDevice<std::int64_t> d_labels(labels), d_count(count);
  const test::OnDevice<double> d_sum(sum), d_each(each);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::cross_entropy_workspace(tokens), 1));
  CrossEntropyArgs<T> a{logits.data(), labels.data(), tokens, words, 0.125};
  ASSERT_EQ(cross_entropy(a, {sum.data(), count.data(), each.data(), gradient.data()}), Status::kOk);
  a.logits = d_logits.data(), a.labels = d_labels.data();
  ASSERT_EQ(cuda::cross_entropy(a, {d_sum.data(), d_count.data(), d_each.data(), d_gradient.data()}, workspace.data(),
                                nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  test::expect_same(sum, d_sum.fetch(), "sum");
  test::expect_same(count, d_count.fetch(), "labels");
  test::expect_same(each, d_each.fetch(), "token losses");
  test::expect_same(gradient, d_gradient.fetch(), "gradient");
}

TEST_F(TokenLossCuda, SameBitsAsTheHost) {
  check<float>(1, 1);
  check<float>(600, 1000);
  check<double>(33, 32000);
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
