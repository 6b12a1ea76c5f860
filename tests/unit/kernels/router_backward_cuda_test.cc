// Gradients of the router on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterBackwardCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <string>
#include <vector>

#include "kernels/cuda/router_backward.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class RouterBackwardCuda : public test::OnCuda {};

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(9, stream, 0, n, g.data());
  return {g.begin(), g.end()};
}

template <class T>
void check(std::int64_t tokens, std::int64_t hidden, std::int64_t experts, std::int64_t top_k, Score score, bool after,
           bool renormalise, const std::string& what) {
  const std::vector<T> logits = gaussians<T>(tokens * experts, 1), x = gaussians<T>(tokens * hidden, 2),
                       w = gaussians<T>(experts * hidden, 3);
  const std::vector<double> upstream = gaussians<double>(tokens * top_k, 4);
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(tokens * top_k));
  std::vector<T> weights(chosen.size());
  RouteBackwardArgs<T> a;
  RouteArgs<T>& f = a.forward;
  f.logits = logits.data();
  f.tokens = tokens, f.experts = experts, f.top_k = top_k, f.score = score, f.softmax_after_top_k = after,
  f.renormalise = renormalise;
  f.renormalise_eps = T(1e-9);
  ASSERT_EQ(route(f, {chosen.data(), weights.data(), nullptr, nullptr}), Status::kOk) << what;
  std::vector<double> d_logits(logits.size(), -7), d_w(w.size(), -7), d_x(x.size(), -7);
  const test::OnDevice<T> g_logits(logits), g_x(x), g_w(w);
  const test::OnDevice<double> g_upstream(upstream), g_d_logits(d_logits), g_d_w(d_w), g_d_x(d_x);
  const test::OnDevice<std::int32_t> g_chosen(chosen);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::route_backward_workspace(tokens, experts)));
  a.chosen = chosen.data(), a.weights = upstream.data();
  ASSERT_EQ(route_backward(a, d_logits.data()), Status::kOk) << what;
  ASSERT_EQ(gate_backward(GateBackwardArgs<T>{d_logits.data(), x.data(), w.data(), tokens, hidden, experts}, d_w.data(),
                          d_x.data()),
            Status::kOk)
      << what;
  f.logits = g_logits.data(), a.chosen = g_chosen.data(), a.weights = g_upstream.data();
  ASSERT_EQ(cuda::route_backward(a, g_d_logits.data(), workspace.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cuda::gate_backward(GateBackwardArgs<T>{g_d_logits.data(), g_x.data(), g_w.data(), tokens, hidden, experts},
                                g_d_w.data(), g_d_x.data(), nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(d_logits, g_d_logits.fetch(), what + " logits");
  test::expect_same(d_w, g_d_w.fetch(), what + " gate");
  test::expect_same(d_x, g_d_x.fetch(), what + " inputs");
}

TEST_F(RouterBackwardCuda, SameBitsAsTheHost) {
  check<float>(300, 200, 64, 8, Score::kSoftmax, false, true, "softmax");
  check<double>(100, 64, 160, 6, Score::kSigmoid, false, true, "sigmoid");
  check<double>(77, 65, 32, 4, Score::kSoftmax, true, false, "after top-k");
  check<float>(1, 1, 1, 1, Score::kSqrtSoftplus, false, false, "one");
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
