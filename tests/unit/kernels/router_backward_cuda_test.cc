// Gradients of the router on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterBackwardCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
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

struct Case {
  std::int64_t tokens, hidden, experts, top_k;
  Score score = Score::kSoftmax;
  bool after = false, renormalise = true;
  Float dtype = Float::kF64;
  double spread = 1;      // of the logits
  bool upstream = false;  // gradients of scores and logits from elsewhere, too
  double floor = 0, softcap = 0;
  bool scaled = false;
  std::int64_t always = 0;
  double norm = 1, offset = 0;
};

template <class T>
void check(const Case& c, const std::string& what) {
  const auto [tokens, hidden, experts, top_k] = std::array{c.tokens, c.hidden, c.experts, c.top_k};
  std::vector<T> logits = gaussians<T>(tokens * experts, 1);
  for (T& l : logits) l *= static_cast<T>(c.spread);
  const std::vector<T> x = gaussians<T>(tokens * hidden, 2), w = gaussians<T>(experts * hidden, 3);
  const std::vector<double> upstream = gaussians<double>(tokens * top_k, 4),
                            of_scores = gaussians<double>(tokens * experts, 5),
                            of_logits = gaussians<double>(tokens * experts, 6);
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(tokens * top_k));
  std::vector<T> weights(chosen.size());
  RouteBackwardArgs<T> a;
  RouteArgs<T>& f = a.forward;
  f.logits = logits.data();
  f.tokens = tokens, f.experts = experts, f.top_k = top_k, f.score = c.score, f.score_after_top_k = c.after,
  f.renormalise = c.renormalise;
  f.renormalise_eps = T(1e-9), f.scaling = T(2.5), f.tensor_dtype = c.dtype;
  f.renormalise_floor = static_cast<T>(c.floor), f.logit_softcap = static_cast<T>(c.softcap), f.always = c.always;
  f.renormalise_norm = static_cast<T>(c.norm), f.sigmoid_offset = static_cast<T>(c.offset);
  const std::vector<T> scale = gaussians<T>(experts, 7), always = gaussians<T>(tokens * c.always, 8);
  const std::vector<double> of_always = gaussians<double>(tokens * c.always, 9);
  std::vector<double> d_always(of_always.size(), -7);
  const test::OnDevice<T> g_scale(scale), g_always(always);
  const test::OnDevice<double> g_of_always(of_always), g_d_always(d_always);
  f.expert_scale = c.scaled ? scale.data() : nullptr, f.always_logits = always.data();
  a.always_weights = of_always.data(), a.d_always_logits = d_always.data();
  ASSERT_EQ(route(f, {chosen.data(), weights.data(), nullptr, nullptr}), Status::kOk) << what;
  for (std::size_t i = 5; i < chosen.size(); i += 11) chosen[i] = -1;              // dropped
  if (chosen.size() > 40 && top_k > 1) chosen[3 * top_k + 1] = chosen[3 * top_k];  // twice the same
  std::vector<double> d_logits(logits.size(), -7), d_w(w.size(), -7), d_x(x.size(), -7);
  const test::OnDevice<T> g_logits(logits), g_x(x), g_w(w);
  const test::OnDevice<double> g_upstream(upstream), g_of_scores(of_scores), g_of_logits(of_logits),
      g_d_logits(d_logits), g_d_w(d_w), g_d_x(d_x);
  const test::OnDevice<std::int32_t> g_chosen(chosen);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::route_backward_workspace(tokens, experts)));
  a.chosen = chosen.data(), a.weights = upstream.data();
  if (c.upstream && !c.after) a.scores = of_scores.data();
  if (c.upstream) a.logits = of_logits.data();
  ASSERT_EQ(route_backward(a, d_logits.data()), Status::kOk) << what;
  ASSERT_EQ(gate_backward(GateBackwardArgs<T>{d_logits.data(), x.data(), w.data(), tokens, hidden, experts}, d_w.data(),
                          d_x.data()),
            Status::kOk)
      << what;
  f.logits = g_logits.data(), a.chosen = g_chosen.data(), a.weights = g_upstream.data();
  f.expert_scale = c.scaled ? g_scale.data() : nullptr, f.always_logits = g_always.data();
  a.always_weights = g_of_always.data(), a.d_always_logits = g_d_always.data();
  if (a.scores != nullptr) a.scores = g_of_scores.data();
  if (a.logits != nullptr) a.logits = g_of_logits.data();
  ASSERT_EQ(cuda::route_backward(a, g_d_logits.data(), workspace.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cuda::gate_backward(GateBackwardArgs<T>{g_d_logits.data(), g_x.data(), g_w.data(), tokens, hidden, experts},
                                g_d_w.data(), g_d_x.data(), nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(d_logits, g_d_logits.fetch(), what + " logits");
  test::expect_same(d_always, g_d_always.fetch(), what + " always");
  test::expect_same(d_w, g_d_w.fetch(), what + " gate");
  test::expect_same(d_x, g_d_x.fetch(), what + " inputs");
  if constexpr (std::is_same_v<T, float>) {  // the same, rounded once, for the tensor cores
    const std::int64_t stride = cuda::padded_experts(experts);
    const test::OnDevice<std::uint16_t> g_rounded(
        std::vector<std::uint16_t>(static_cast<std::size_t>(tokens * stride), 0x7fc0));
    const Status status = cuda::route_backward(a, g_rounded.data(), nullptr);
    if (experts > 384 || top_k > 32 || is_narrow(c.dtype) || is_rare(f)) {
      EXPECT_EQ(status, Status::kBadShape) << what;
      return;
    }
    ASSERT_EQ(status, Status::kOk) << what;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
    std::vector<float> rounded(static_cast<std::size_t>(tokens * stride)), got;
    for (std::int64_t at = 0; at < tokens * experts; ++at)
      rounded[at / experts * stride + at % experts] = static_cast<float>(round_to(d_logits[at], Float::kBF16));
    for (const std::uint16_t v : g_rounded.fetch())
      got.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(v) << 16));
    test::expect_same(rounded, got, what + " logits in bfloat16");
  }
}

TEST_F(RouterBackwardCuda, SameBitsAsTheHost) {
  check<float>({300, 200, 64, 8}, "softmax");
  check<double>({100, 64, 160, 6, Score::kSigmoid}, "sigmoid");
  check<double>({77, 65, 32, 4, Score::kSoftmax, true, false}, "after top-k");
  check<float>({1, 1, 1, 1, Score::kSqrtSoftplus, false, false}, "one");
  check<float>({33, 8, 384, 32}, "widest in registers");
  check<double>({33, 8, 385, 8}, "one more");
  check<float>({33, 8, 64, 33, Score::kSigmoid}, "33 choices");
  check<float>({33, 8, 64, 8, Score::kSoftmax, false, true, Float::kBF16}, "bfloat16 tensors");
  check<float>({33, 8, 60, 4, Score::kSigmoid, false, true, Float::kF16}, "float16 tensors");
  check<float>({33, 8, 60, 4, Score::kSqrtSoftplus, false, true, Float::kBF16}, "square root of softplus, bfloat16");
  for (const Float dtype : {Float::kF64, Float::kBF16}) {
    const Case plain{20, 8, 60, 4, Score::kSigmoid, false, true, dtype, 1, true};
    Case c = plain;
    c.floor = 2.5;
    check<float>(c, "floor");
    c = plain, c.softcap = 2;
    check<float>(c, "capped");
    c = plain, c.scaled = true;
    check<float>(c, "scaled by expert");
    for (const double p : {0.5, 1.5, 2.0, 3.0, HUGE_VAL}) {
      c = plain, c.norm = p;
      check<float>(c, "norm " + std::to_string(p));
    }
    c = plain, c.offset = 0.25;
    check<float>(c, "offset");
    c = plain, c.after = true;
    check<float>(c, "sigmoid after top-k");
  }
  Case c{20, 8, 60, 4, Score::kSigmoid, false, true, Float::kF64, 1, true};
  c.always = 3, c.norm = HUGE_VAL, c.offset = 0.25;
  check<double>(c, "the largest");
  c.floor = 3, c.softcap = 2, c.scaled = true, c.norm = 1, c.offset = 0;
  check<float>(c, "all of it");
  check<double>(c, "all of it");
  c.norm = 3, c.offset = 0.25, c.floor = 1.5;
  check<float>(c, "all of it, norm");
}

template <class T>
void check_scales(std::int64_t tokens, std::int64_t top_k, std::int64_t experts) {
  const std::string what = std::to_string(tokens) + " x " + std::to_string(top_k) + " of " + std::to_string(experts);
  const std::vector<T> unscaled = gaussians<T>(tokens * top_k, 1);
  const std::vector<double> upstream = gaussians<double>(tokens * top_k, 2);
  std::vector<std::int32_t> chosen(unscaled.size());
  for (std::size_t i = 0; i < chosen.size(); ++i)
    chosen[i] = i % 11 == 5 ? -1 : static_cast<std::int32_t>(static_cast<std::int64_t>(i * 7) % experts);
  std::vector<double> d(static_cast<std::size_t>(experts), -7);
  const test::OnDevice<T> g_unscaled(unscaled);
  const test::OnDevice<double> g_upstream(upstream), g_d(d);
  const test::OnDevice<std::int32_t> g_chosen(chosen);
  ASSERT_EQ(expert_scale_backward(ExpertScaleBackwardArgs<T>{unscaled.data(), chosen.data(), upstream.data(), tokens,
                                                             top_k, experts},
                                  d.data()),
            Status::kOk)
      << what;
  ASSERT_EQ(cuda::expert_scale_backward(ExpertScaleBackwardArgs<T>{g_unscaled.data(), g_chosen.data(),
                                                                   g_upstream.data(), tokens, top_k, experts},
                                        g_d.data(), nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(d, g_d.fetch(), what);
}

TEST_F(RouterBackwardCuda, ScaleOfExperts) {
  check_scales<double>(100, 8, 128);
  check_scales<float>(1000, 2, 5);
  check_scales<float>(3, 4, 385);
  check_scales<double>(0, 1, 7);
  check_scales<double>(33, 1, 1);
}

/// Every number of lanes that share a token, full and not, with what is added from elsewhere, logits so far apart that
/// exponentials leave the normal numbers, and logits that are none.
TEST_F(RouterBackwardCuda, SharedWarps) {
  for (const std::int64_t experts : {3, 8, 16, 29, 32, 60, 128, 144, 256, 300}) {
    const std::string what = std::to_string(experts) + " experts";
    const std::int64_t k = experts < 8 ? 2 : 8;
    check<float>({37, 4, experts, k, Score::kSoftmax, false, true, Float::kF64, 1, true}, what);
    check<float>({37, 4, experts, k, Score::kSoftmax, true, false, Float::kF64, 400, true},
                 what + ", far, after top-k");
    check<double>({37, 4, experts, k, Score::kSoftmax, false, true, Float::kF64, 400}, what + ", far");
    check<double>({11, 4, experts, k, Score::kSigmoid, false, true, Float::kF64, 30, true}, what + ", sigmoid");
    check<float>({5, 4, experts, k, Score::kSqrtSoftplus, false, true, Float::kF64, 30}, what + ", sqrtsoftplus");
    check<float>({5, 4, experts, k, Score::kSoftmax, false, true, Float::kF64, std::numeric_limits<double>::infinity()},
                 what + ", infinite");
  }
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
      const std::vector<std::uint16_t> got_x = out_x.fetch();
      // The same from gradients that are rounded already.
      const std::int64_t stride = cuda::padded_experts(experts);
      std::vector<std::uint16_t> rounded(static_cast<std::size_t>(tokens * stride));
      for (std::int64_t at = 0; at < tokens * experts; ++at)
        rounded[at / experts * stride + at % experts] = static_cast<std::uint16_t>(
            std::bit_cast<std::uint32_t>(static_cast<float>(round_to(g[at], Float::kBF16))) >> 16);
      const test::OnDevice<std::uint16_t> d_rounded(rounded);
      ASSERT_EQ(cuda::gate_backward(cuda::TensorCoreGateBackwardArgs{nullptr, d_x.data(), d_w.data(), tokens, hidden,
                                                                     experts, cores, d_rounded.data()},
                                    out_w.data(), out_x.data(), workspace.data(), nullptr),
                Status::kOk)
          << what;
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
      test::expect_same(got_w, out_w.fetch(), what + " gate");
      test::expect_same(got_x, out_x.fetch(), what + " inputs");
      for (std::size_t i = 0; i < got_w.size(); ++i) {
        const double sum = d_w_size[i] * (1 + u);
        ASSERT_NEAR(got_w[i], d_w_host[i],
                    u * d_w_size[i] + bounds::tensor_core_dot(tokens, sum) + bounds::gamma(32, 0x1p-24) * sum)
            << what << " gate at " << i;
      }
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
