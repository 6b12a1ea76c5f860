// Balance losses, z-loss and bias step on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(BalanceLossCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/balance_loss.h"
#include "kernels/host/bias_update.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/z_loss.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;

class BalanceLossCuda : public test::OnCuda {};

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(6, stream, 0, n, g.data());
  return {g.begin(), g.end()};
}

template <class T>
void check_balance(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, BalanceConvention convention,
                   bool masked, bool given, const std::string& what) {
  std::vector<T> p = gaussians<T>(tokens * experts, 1);
  for (T& v : p) v = static_cast<T>(std::fabs(static_cast<double>(v)));
  std::vector<std::int32_t> chosen;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < top_k; ++j)
      chosen.push_back(t % 11 == 3 ? -1 : static_cast<std::int32_t>((t * t + 3 * j) % experts));
  }
  std::vector<std::uint8_t> valid(static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < valid.size(); ++t) valid[t] = t % 5 != 0;
  const std::vector<std::int64_t> sets = {0, tokens / 3, tokens / 3, tokens};
  const std::int64_t rows = 3 * experts;
  std::vector<double> loss(1, -7), set_loss(3, -7), mean(static_cast<std::size_t>(rows), -7);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(rows), -7);
  std::vector<T> gradient(p.size(), T(-7));
  const OnDevice<T> d_p(p), d_gradient(gradient);
  const OnDevice<std::int32_t> d_chosen(chosen);
  const OnDevice<std::uint8_t> d_valid(valid);
  const OnDevice<std::int64_t> d_sets(sets), d_counts(counts);
  const OnDevice<double> d_loss(loss), d_set_loss(set_loss), d_mean(mean);
  const OnDevice<char> workspace(
      std::vector<char>(cuda::balance_loss_workspace(tokens, experts, convention.devices, 3), 1));
  BalanceLossArgs<T> a;
  a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.num_sets = 3, a.convention = convention;
  std::vector<std::int64_t> given_counts(static_cast<std::size_t>(rows)), given_tokens = {tokens, 7, 3 * tokens};
  for (std::size_t i = 0; i < given_counts.size(); ++i) given_counts[i] = static_cast<std::int64_t>(i * i % 97);
  const OnDevice<std::int64_t> d_given_counts(given_counts), d_given_tokens(given_tokens);
  if (given) a.counts = given_counts.data(), a.counted_tokens = given_tokens.data();
  a.probabilities = p.data(), a.chosen = chosen.data(), a.valid = masked ? valid.data() : nullptr, a.sets = sets.data();
  ASSERT_EQ(balance_loss(a, {loss.data(), set_loss.data(), counts.data(), mean.data(), gradient.data()}), Status::kOk)
      << what;
  a.probabilities = d_p.data(), a.chosen = d_chosen.data(), a.valid = masked ? d_valid.data() : nullptr,
  a.sets = d_sets.data();
  if (given) a.counts = d_given_counts.data(), a.counted_tokens = d_given_tokens.data();
  ASSERT_EQ(cuda::balance_loss(a, {d_loss.data(), d_set_loss.data(), d_counts.data(), d_mean.data(), d_gradient.data()},
                               workspace.data(), nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  expect_same(loss, d_loss.fetch(), what + " loss");
  expect_same(set_loss, d_set_loss.fetch(), what + " set loss");
  expect_same(counts, d_counts.fetch(), what + " counts");
  expect_same(mean, d_mean.fetch(), what + " mean");
  expect_same(gradient, d_gradient.fetch(), what + " gradient");
}

TEST_F(BalanceLossCuda, SameBitsAsTheHost) {
  for (const bool masked : {false, true}) {
    for (const Balanced balanced : {Balanced::kExperts, Balanced::kDevices, Balanced::kCommunication}) {
      BalanceConvention c;
      c.balanced = balanced;
      c.devices = 4;
      c.most_devices = 2;
      c.divisor = masked ? Divisor::kAllTokens : Divisor::kValidTokens;
      const std::string what = std::string(masked ? "masked " : "") + std::to_string(static_cast<int>(balanced));
      check_balance<float>(1000, 128, 8, c, masked, false, what);
      check_balance<double>(777, 160, 6, c, masked, false, what);
      check_balance<double>(2, 4, 1, c, masked, false, what);
      c.averaged = Averaged::kOverSum, c.sum_eps = masked ? 1e-20 : 0.5;
      check_balance<float>(1000, 128, 8, c, masked, false, what + ", over its sum");
      check_balance<double>(777, 160, 6, c, masked, balanced != Balanced::kCommunication,
                            what + ", over its sum, given counts");
    }
    BalanceConvention c;
    c.over_k = false, c.over_sets = OverSets::kSum;
    check_balance<double>(777, 160, 6, c, masked, false, "summed, without k");
    c = {};
    c.counted = Counted::kFirstChoice;
    check_balance<float>(300, 60, 4, c, masked, false, "first choice");
  }
}

template <class T>
void check_z(std::int64_t tokens, std::int64_t experts, T scale) {
  std::vector<T> logits = gaussians<T>(tokens * experts, 2);
  for (T& v : logits) v *= scale;
  if (tokens > 3) logits[static_cast<std::size_t>(experts)] = std::numeric_limits<T>::infinity();
  std::vector<std::uint8_t> valid(static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < valid.size(); ++t) valid[t] = t % 4 != 1;
  std::vector<double> loss(1, -7), lse(static_cast<std::size_t>(tokens), -7);
  std::vector<T> gradient(logits.size(), T(-7));
  const OnDevice<T> d_logits(logits), d_gradient(gradient);
  const OnDevice<std::uint8_t> d_valid(valid);
  const OnDevice<double> d_loss(loss), d_lse(lse);
  const OnDevice<char> workspace(std::vector<char>(cuda::z_loss_workspace(tokens), 1));
  ZLossArgs<T> a{logits.data(), valid.data(), tokens, experts, Divisor::kValidTokens};
  ASSERT_EQ(z_loss(a, {loss.data(), lse.data(), gradient.data()}), Status::kOk);
  a.logits = d_logits.data(), a.valid = d_valid.data();
  ASSERT_EQ(cuda::z_loss(a, {d_loss.data(), d_lse.data(), d_gradient.data()}, workspace.data(), nullptr), Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  expect_same(loss, d_loss.fetch(), "z-loss");
  expect_same(lse, d_lse.fetch(), "log-sum-exp");
  expect_same(gradient, d_gradient.fetch(), "gradient of the z-loss");
}

TEST_F(BalanceLossCuda, ZLossHasTheBitsOfTheHost) {
  check_z<float>(1, 1, 1);
  check_z<float>(3000, 128, 4);
  check_z<double>(513, 160, 300);
}

TEST_F(BalanceLossCuda, BiasStepHasTheBitsOfTheHost) {
  const std::int64_t layers = 5, experts = 256, ranks = 2, micro_batches = 3;
  const std::vector<double> bias = gaussians<double>(layers * experts, 3);
  std::vector<double> counts = gaussians<double>(ranks * micro_batches * layers * experts, 4), out(bias.size(), -7);
  for (double& v : counts) v = std::floor(500 + 90 * v);
  const OnDevice<double> d_bias(bias), d_counts(counts), d_out(out);
  for (const Centre centre : {Centre::kNothing, Centre::kStep, Centre::kBias}) {
    BiasUpdateArgs a;
    a.ranks = ranks, a.micro_batches = micro_batches;
    a.step = centre == Centre::kNothing ? BiasStep::kProportional : BiasStep::kSign;
    a.layers = layers, a.experts = experts, a.centre = centre, a.counts_dtype = Float::kBF16,
    a.bias_dtype = Float::kF32;
    a.bias = bias.data(), a.counts = counts.data();
    ASSERT_EQ(bias_update(a, out.data()), Status::kOk);
    a.bias = d_bias.data(), a.counts = d_counts.data();
    ASSERT_EQ(cuda::bias_update(a, d_out.data(), nullptr), Status::kOk);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    expect_same(out, d_out.fetch(), "bias");
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
