// Gradients of the router on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterBackwardCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <array>
#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/router_backward.h"
#include "kernels/host/bounds.h"
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
           bool renormalise, const std::string& what, Float dtype = Float::kF64) {
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
  f.renormalise_eps = T(1e-9), f.tensor_dtype = dtype;
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
  check<float>(33, 8, 384, 32, Score::kSoftmax, false, true, "widest in registers");
  check<double>(33, 8, 385, 8, Score::kSoftmax, false, true, "one more");
  check<float>(33, 8, 64, 33, Score::kSigmoid, false, true, "33 choices");
  check<float>(33, 8, 64, 8, Score::kSoftmax, false, true, "bfloat16 tensors", Float::kBF16);
  check<float>(33, 8, 60, 4, Score::kSigmoid, false, true, "float16 tensors", Float::kF16);
}

/// bfloat16 values, as bits and as doubles.
struct LowPrecision {
  std::vector<double> values;
  std::vector<std::uint16_t> bits;
  LowPrecision(std::int64_t count, std::uint64_t stream) : values(gaussians<double>(count, stream)) {
    for (double& v : values) {
      v = round_to(v, Float::kBF16);
      bits.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(v)) >> 16));
    }
  }
};

TEST_F(RouterBackwardCuda, TensorCoreGate) {
  for (const auto& [tokens, hidden, experts] : std::vector<std::array<std::int64_t, 3> >{
           {1, 8, 1}, {70, 64, 8}, {200, 136, 60}, {129, 264, 128}, {64, 128, 144}, {300, 200, 256}, {5000, 72, 40}}) {
    for (const cuda::TensorCores cores : test::tensor_cores()) {
      const std::string what = std::to_string(tokens) + " x " + std::to_string(hidden) + " x " +
                               std::to_string(experts) + (cores == cuda::TensorCores::kWarp ? "" : ", warpgroups");
      const LowPrecision x(tokens * hidden, 5), w(experts * hidden, 6);
      std::vector<double> g = gaussians<double>(tokens * experts, 7);
      const bool narrows = tokens == 70;  // else g is bfloat16 already, and the bounds are tighter
      for (double& v : g) v = narrows ? v : round_to(v, Float::kBF16);
      const test::OnDevice<std::uint16_t> d_x(x.bits), d_w(w.bits),
          out_x(std::vector<std::uint16_t>(x.bits.size(), 0x7fc0));
      const test::OnDevice<double> d_g(g);
      const test::OnDevice<float> out_w(std::vector<float>(w.bits.size(), -7.0f));
      const test::OnDevice<char> workspace(std::vector<char>(cuda::gate_backward_workspace(tokens, hidden, experts)));
      ASSERT_EQ(cuda::gate_backward(cuda::TensorCoreGateBackwardArgs{d_g.data(), d_x.data(), d_w.data(), tokens, hidden,
                                                                     experts, cores},
                                    out_w.data(), out_x.data(), workspace.data(), nullptr),
                Status::kOk)
          << what;
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
      std::vector<double> d_w_host(w.values.size()), d_x_host(x.values.size()), d_w_size(d_w_host.size()),
          d_x_size(d_x_host.size());
      const auto size = [](std::vector<double> v) {
        for (double& d : v) d = std::fabs(d);
        return v;
      };
      const std::vector<double> g_size = size(g), x_size = size(x.values), w_size = size(w.values);
      ASSERT_EQ(
          gate_backward(GateBackwardArgs<double>{g.data(), x.values.data(), w.values.data(), tokens, hidden, experts},
                        d_w_host.data(), d_x_host.data()),
          Status::kOk);
      ASSERT_EQ(
          gate_backward(GateBackwardArgs<double>{g_size.data(), x_size.data(), w_size.data(), tokens, hidden, experts},
                        d_w_size.data(), d_x_size.data()),
          Status::kOk);
      const double u = narrows ? unit_roundoff(Float::kBF16) : 0.0;  // of the gradient of the logits
      const std::vector<float> got_w = out_w.fetch();
      for (std::size_t i = 0; i < got_w.size(); ++i) {
        const double sum = d_w_size[i] * (1 + u);
        ASSERT_NEAR(got_w[i], d_w_host[i],
                    u * d_w_size[i] + bounds::tensor_core_dot(tokens, sum) + bounds::gamma(32, 0x1p-24) * sum)
            << what << " gate at " << i;
      }
      const std::vector<std::uint16_t> got_x = out_x.fetch();
      for (std::size_t i = 0; i < got_x.size(); ++i) {
        const double got = std::bit_cast<float>(static_cast<std::uint32_t>(got_x[i]) << 16);
        const double before = u * d_x_size[i] + bounds::tensor_core_dot(experts, d_x_size[i] * (1 + u));
        ASSERT_NEAR(got, d_x_host[i], bounds::rounded(d_x_host[i], before, Float::kBF16)) << what << " inputs at " << i;
      }
    }
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
