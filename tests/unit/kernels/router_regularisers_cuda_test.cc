// Regularisers of the router on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RouterRegularisersCuda, SameBitsAsTheHost) {
  GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)";
}

#else

#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/router_regularisers.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;
using Doubles = std::vector<double>;

class RouterRegularisersCuda : public test::OnCuda {};

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(15, stream, 0, n, g.data());
  return {g.begin(), g.end()};
}
Doubles filled(std::int64_t n) { return Doubles(static_cast<std::size_t>(n), -7); }
OnDevice<char> workspace_of(std::size_t bytes) { return OnDevice<char>(std::vector<char>(bytes, 1)); }

struct Case {
  std::int64_t tokens, experts, top_k;
  bool masked;
  std::vector<std::uint8_t> valid;
  std::vector<std::int32_t> chosen;
  std::string what;
};
Case case_of(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool masked) {
  Case c{tokens, experts, top_k, masked, {}, {}, {}};
  for (std::int64_t t = 0; t < tokens; ++t) {
    c.valid.push_back(!masked || t % 5 != 2);
    for (std::int64_t j = 0; j < top_k; ++j)
      c.chosen.push_back((t + j) % 13 == 6 ? -1 : static_cast<std::int32_t>((t * 7 + j) % experts));
  }
  c.what =
      std::to_string(tokens) + "x" + std::to_string(experts) + "/" + std::to_string(top_k) + (masked ? " masked" : "");
  return c;
}
std::vector<Case> cases() {
  std::vector<Case> out;
  for (const bool masked : {false, true}) {
    out.push_back(case_of(1, 1, 1, masked));
    out.push_back(case_of(3, 8, 8, masked));
    out.push_back(case_of(600, 60, 4, masked));
    out.push_back(case_of(test::sized(257, 37), 384, 32, masked));
  }
  out.push_back(case_of(0, 4, 4, false));
  return out;
}

template <class T>
void check_importance(const Case& c, bool sparse) {
  const std::int64_t width = sparse ? c.top_k : c.experts;
  const std::vector<T> gates = gaussians<T>(c.tokens * width, 1);
  std::vector<T> gradient(gates.size(), T(-7));
  Doubles loss = filled(1), importance = filled(c.experts);
  const OnDevice<T> d_gates(gates), d_gradient(gradient);
  const OnDevice<std::int32_t> d_chosen(c.chosen);
  const OnDevice<std::uint8_t> d_valid(c.valid);
  const OnDevice<double> d_loss(loss), d_importance(importance);
  const auto workspace = workspace_of(cuda::importance_loss_workspace(c.tokens, c.experts));
  ImportanceLossArgs<T> a;
  a.tokens = c.tokens, a.experts = c.experts, a.width = width, a.weight = 0.3, a.cv = {Variance::kSample, 1e-10};
  a.gates = gates.data(), a.chosen = sparse ? c.chosen.data() : nullptr, a.valid = c.valid.data();
  ASSERT_EQ(importance_loss(a, {loss.data(), importance.data(), gradient.data()}), Status::kOk) << c.what;
  a.gates = d_gates.data(), a.chosen = sparse ? d_chosen.data() : nullptr, a.valid = d_valid.data();
  ASSERT_EQ(
      cuda::importance_loss(a, {d_loss.data(), d_importance.data(), d_gradient.data()}, workspace.data(), nullptr),
      Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << c.what;
  expect_same(loss, d_loss.fetch(), "importance loss " + c.what);
  expect_same(importance, d_importance.fetch(), "importance " + c.what);
  expect_same(gradient, d_gradient.fetch(), "importance gradient " + c.what);
}

TEST_F(RouterRegularisersCuda, Importance) {
  for (const Case& c : cases()) {
    check_importance<float>(c, true);
    check_importance<double>(c, false);
  }
}

template <class T>
void check_load(const Case& c, bool with_raw, LoadThreshold threshold) {
  const std::int64_t n = c.tokens * c.experts;
  std::vector<T> clean = gaussians<T>(n, 2);
  const std::vector<T> noise = gaussians<T>(n, 3), raw = gaussians<T>(n, 4);
  for (std::size_t i = 0; i < clean.size(); i += 9) clean[i] = T(0.5);  // equals
  std::vector<T> d_clean(clean.size(), T(-7)), d_raw(clean.size(), T(-7));
  Doubles loss = filled(1), load = filled(c.experts), probability = filled(n);
  const OnDevice<T> g_clean(clean), g_noise(noise), g_raw(raw), g_d_clean(d_clean), g_d_raw(d_raw);
  const OnDevice<std::uint8_t> d_valid(c.valid);
  const OnDevice<double> d_loss(loss), d_load(load), d_probability(probability);
  const auto workspace = workspace_of(cuda::load_loss_workspace(c.tokens, c.experts));
  LoadLossArgs<T> a;
  a.tokens = c.tokens, a.experts = c.experts, a.top_k = c.top_k, a.added = with_raw ? 0.01 : 0.2,
  a.threshold = threshold;
  a.cv.eps = 1e-10;
  a.clean = clean.data(), a.noise = noise.data(), a.raw = with_raw ? raw.data() : nullptr, a.valid = c.valid.data();
  ASSERT_EQ(
      load_loss(a, {loss.data(), load.data(), probability.data(), d_clean.data(), with_raw ? d_raw.data() : nullptr}),
      Status::kOk);
  a.clean = g_clean.data(), a.noise = g_noise.data(), a.raw = with_raw ? g_raw.data() : nullptr,
  a.valid = d_valid.data();
  ASSERT_EQ(cuda::load_loss(a,
                            {d_loss.data(), d_load.data(), d_probability.data(), g_d_clean.data(),
                             with_raw ? g_d_raw.data() : nullptr},
                            workspace.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << c.what;
  expect_same(probability, d_probability.fetch(), "P " + c.what);
  expect_same(load, d_load.fetch(), "load " + c.what);
  expect_same(loss, d_loss.fetch(), "load loss " + c.what);
  expect_same(d_clean, g_d_clean.fetch(), "d clean " + c.what);
  expect_same(d_raw, g_d_raw.fetch(), "d raw " + c.what);
}

TEST_F(RouterRegularisersCuda, Load) {
  for (const Case& c : cases()) {
    check_load<float>(c, true, LoadThreshold::kWithoutSelf);
    check_load<double>(c, false, LoadThreshold::kLastChosen);
  }
}

template <class T>
void check_entropy(const Case& c, EntropyOf of, EntropySense sense) {
  const std::int64_t n = c.tokens * c.experts;
  std::vector<T> z = gaussians<T>(n, 5), gradient(z.size(), T(-7));
  for (T& v : z) v *= T(3);
  if (n > 8) z[5] = -std::numeric_limits<T>::infinity();
  Doubles loss = filled(1), entropy = filled(1), token = filled(c.tokens), mean = filled(c.experts);
  const OnDevice<T> d_z(z), d_gradient(gradient);
  const OnDevice<std::uint8_t> d_valid(c.valid);
  const OnDevice<double> d_loss(loss), d_entropy(entropy), d_token(token), d_mean(mean);
  const auto workspace = workspace_of(cuda::entropy_loss_workspace(c.tokens, c.experts));
  EntropyLossArgs<T> a;
  a.tokens = c.tokens, a.experts = c.experts, a.of = of, a.sense = sense, a.threshold = 9, a.weight = 0.7;
  a.logits = z.data(), a.valid = c.valid.data();
  ASSERT_EQ(entropy_loss(a, {loss.data(), entropy.data(), token.data(), mean.data(), gradient.data()}), Status::kOk);
  a.logits = d_z.data(), a.valid = d_valid.data();
  ASSERT_EQ(cuda::entropy_loss(a, {d_loss.data(), d_entropy.data(), d_token.data(), d_mean.data(), d_gradient.data()},
                               workspace.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << c.what;
  expect_same(token, d_token.fetch(), "entropy of tokens " + c.what);
  expect_same(mean, d_mean.fetch(), "mean probability " + c.what);
  expect_same(entropy, d_entropy.fetch(), "entropy " + c.what);
  expect_same(loss, d_loss.fetch(), "entropy loss " + c.what);
  expect_same(gradient, d_gradient.fetch(), "entropy gradient " + c.what);
}

TEST_F(RouterRegularisersCuda, Entropy) {
  for (const Case& c : cases()) {
    check_entropy<float>(c, EntropyOf::kTokens, EntropySense::kPenalty);
    check_entropy<double>(c, EntropyOf::kMean, EntropySense::kShortfall);
  }
}

template <class T>
void check_gate(std::int64_t experts, std::int64_t hidden, GramNorm norm) {
  const std::vector<T> w = gaussians<T>(experts * hidden, 6);
  std::vector<T> gradient(w.size(), T(-7));
  Doubles loss = filled(1), gram = filled(experts * experts);
  const OnDevice<T> d_w(w), d_gradient(gradient);
  const OnDevice<double> d_loss(loss), d_gram(gram);
  const auto workspace = workspace_of(cuda::gate_orthogonality_workspace(experts));
  ASSERT_EQ(gate_orthogonality(GateOrthogonalityArgs<T>{w.data(), experts, hidden, norm, 0.1},
                               {loss.data(), gram.data(), gradient.data()}),
            Status::kOk);
  const GateOrthogonalityArgs<T> a{d_w.data(), experts, hidden, norm, 0.1};
  const std::string what = std::to_string(experts) + "x" + std::to_string(hidden);
  for (const bool own_gram : {true, false}) {  // the Gram matrix in the result, or in the workspace
    ASSERT_EQ(cuda::gate_orthogonality(a, {d_loss.data(), own_gram ? d_gram.data() : nullptr, d_gradient.data()},
                                       workspace.data(), nullptr),
              Status::kOk);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
    expect_same(gram, d_gram.fetch(), "Gram matrix " + what);
    expect_same(loss, d_loss.fetch(), "gate loss " + what);
    expect_same(gradient, d_gradient.fetch(), "gate gradient " + what);
  }
}

TEST_F(RouterRegularisersCuda, GateOrthogonality) {
  check_gate<float>(1, 1, GramNorm::kEntrywiseL1);
  check_gate<float>(60, 1000, GramNorm::kEntrywiseL1);
  check_gate<double>(144, 77, GramNorm::kSquaredFrobenius);
}

template <class T>
void check_overlap(const Case& c, std::int64_t hidden, Overlap overlap, OverPairs over, bool all) {
  const std::vector<T> x = gaussians<T>(c.tokens * c.top_k * hidden, 7);
  std::vector<T> gradient(x.size(), T(-7));
  Doubles loss = filled(1), token = filled(c.tokens);
  const OnDevice<T> d_x(x), d_gradient(gradient);
  const OnDevice<std::int32_t> d_chosen(c.chosen);
  const OnDevice<std::uint8_t> d_valid(c.valid);
  const OnDevice<double> d_loss(loss), d_token(token);
  const auto workspace = workspace_of(cuda::expert_overlap_workspace(c.tokens, c.top_k));
  ExpertOverlapArgs<T> a;
  a.tokens = c.tokens, a.top_k = c.top_k, a.hidden = hidden, a.overlap = overlap, a.over_pairs = over, a.weight = 0.4;
  a.outputs = x.data(), a.chosen = all ? nullptr : c.chosen.data(), a.valid = c.valid.data();
  ASSERT_EQ(expert_overlap(a, {loss.data(), token.data(), gradient.data()}), Status::kOk);
  a.outputs = d_x.data(), a.chosen = all ? nullptr : d_chosen.data(), a.valid = d_valid.data();
  ASSERT_EQ(cuda::expert_overlap(a, {d_loss.data(), d_token.data(), d_gradient.data()}, workspace.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << c.what;
  expect_same(token, d_token.fetch(), "overlap of tokens " + c.what);
  expect_same(loss, d_loss.fetch(), "overlap " + c.what);
  expect_same(gradient, d_gradient.fetch(), "overlap gradient " + c.what);
}

TEST_F(RouterRegularisersCuda, ExpertOverlap) {
  for (const Case& c : cases()) {
    check_overlap<float>(c, 33, Overlap::kProjection, OverPairs::kSum, true);
    check_overlap<double>(c, 20, Overlap::kCosine, OverPairs::kMean, false);
    check_overlap<float>(c, 1, Overlap::kSquaredProjection, OverPairs::kMean, false);
  }
}

template <class T>
void check_variance(const Case& c, bool mean_over_tokens) {
  const std::vector<T> scores = gaussians<T>(c.tokens * c.experts, 8);
  std::vector<T> gradient(scores.size(), T(-7));
  Doubles loss = filled(1), mean = filled(c.experts);
  const OnDevice<T> d_scores(scores), d_gradient(gradient);
  const OnDevice<std::uint8_t> d_valid(c.valid);
  const OnDevice<double> d_loss(loss), d_mean(mean);
  const auto workspace = workspace_of(cuda::score_variance_workspace(c.tokens, c.experts));
  ScoreVarianceArgs<T> a{scores.data(), c.valid.data(), c.tokens, c.experts, mean_over_tokens, 0.6};
  ASSERT_EQ(score_variance(a, {loss.data(), mean.data(), gradient.data()}), Status::kOk);
  a.scores = d_scores.data(), a.valid = d_valid.data();
  ASSERT_EQ(cuda::score_variance(a, {d_loss.data(), d_mean.data(), d_gradient.data()}, workspace.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << c.what;
  expect_same(mean, d_mean.fetch(), "mean score " + c.what);
  expect_same(loss, d_loss.fetch(), "variance " + c.what);
  expect_same(gradient, d_gradient.fetch(), "variance gradient " + c.what);
}

TEST_F(RouterRegularisersCuda, ScoreVariance) {
  for (const Case& c : cases()) {
    check_variance<float>(c, true);
    check_variance<double>(c, false);
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
