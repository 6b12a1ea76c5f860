// Metrics of routing on a CUDA device against the host.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(RoutingMetricsCuda, CountsAreThoseOfTheHost) {
  GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)";
}

#else

#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/routing_metrics.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;

class RoutingMetricsCuda : public test::OnCuda {};

std::vector<std::int32_t> choices(std::int64_t tokens, std::int64_t top_k, std::int64_t experts, std::int64_t step) {
  std::vector<std::int32_t> chosen;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < top_k; ++j)
      chosen.push_back((t + j) % 17 == 4 ? -1 : static_cast<std::int32_t>((t * step + j) % experts));
  }
  return chosen;
}
std::vector<std::uint8_t> mask(std::int64_t tokens, bool masked) {
  std::vector<std::uint8_t> valid;
  for (std::int64_t t = 0; t < tokens; ++t) valid.push_back(!masked || t % 6 != 1);
  return valid;
}

template <class T>
void check_margins(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool masked) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts));
  unit_gaussians(18, 1, 0, tokens * experts, g.data());
  std::vector<T> choice(g.begin(), g.end());
  for (std::size_t i = 0; i < choice.size(); i += 5) choice[i] = T(0.25);  // ties
  if (choice.size() > 40)
    choice[7] = std::numeric_limits<T>::quiet_NaN(), choice[31] = -std::numeric_limits<T>::infinity();
  const std::vector<std::int32_t> chosen = choices(tokens, top_k, experts, 5);
  const std::vector<std::uint8_t> valid = mask(tokens, masked);
  std::vector<double> margin(static_cast<std::size_t>(tokens), -7);
  std::vector<MarginCounts> counts(1);
  const OnDevice<T> d_choice(choice);
  const OnDevice<std::int32_t> d_chosen(chosen);
  const OnDevice<std::uint8_t> d_valid(valid);
  const OnDevice<double> d_margin(margin);
  const OnDevice<MarginCounts> d_counts(counts);
  MarginArgs<T> a;
  a.tokens = tokens, a.experts = experts, a.top_k = top_k;
  a.choice = choice.data(), a.chosen = chosen.data(), a.valid = valid.data();
  ASSERT_EQ(routing_margins(a, {margin.data(), counts.data()}), Status::kOk);
  a.choice = d_choice.data(), a.chosen = d_chosen.data(), a.valid = d_valid.data();
  ASSERT_EQ(cuda::routing_margins(a, {d_margin.data(), d_counts.data()}, nullptr), Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const MarginCounts want = counts[0], got = d_counts.fetch()[0];
  const std::string what = "margins " + std::to_string(tokens) + "x" + std::to_string(experts);
  expect_same(margin, d_margin.fetch(), what);
  expect_same<std::int64_t>({want.tokens, want.near_ties, want.ties, want.inverted, want.nan},
                            {got.tokens, got.near_ties, got.ties, got.inverted, got.nan}, what);
}

TEST_F(RoutingMetricsCuda, Margins) {
  for (const bool masked : {false, true}) {
    check_margins<float>(1, 1, 1, masked);
    check_margins<float>(1000, 60, 4, masked);
    check_margins<double>(130, 384, 32, masked);
  }
}

TEST_F(RoutingMetricsCuda, Agreement) {
  for (const bool masked : {false, true}) {
    for (const std::int64_t tokens : {1, 128, 3001}) {
      const std::vector<std::int32_t> now = choices(tokens, 8, 64, 3), then = choices(tokens, 4, 64, 2);
      const std::vector<std::uint8_t> valid = mask(tokens, masked);
      AgreementArgs a{now.data(), then.data(), valid.data(), tokens, 8, 4};
      std::vector<std::int64_t> table(static_cast<std::size_t>(agreement_rows(a) * agreement_columns(a)), -7);
      std::vector<AgreementCounts> counts(1);
      const OnDevice<std::int32_t> d_now(now), d_then(then);
      const OnDevice<std::uint8_t> d_valid(valid);
      const OnDevice<std::int64_t> d_table(table);
      const OnDevice<AgreementCounts> d_counts(counts);
      ASSERT_EQ(count_agreement(a, table.data(), counts.data()), Status::kOk);
      a.now = d_now.data(), a.reference = d_then.data(), a.valid = d_valid.data();
      ASSERT_EQ(cuda::count_agreement(a, d_table.data(), d_counts.data(), nullptr), Status::kOk);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      const AgreementCounts want = counts[0], got = d_counts.fetch()[0];
      expect_same(table, d_table.fetch(), "agreement");
      expect_same<std::int64_t>({want.tokens, want.same_first, want.chosen_now, want.chosen_then},
                                {got.tokens, got.same_first, got.chosen_now, got.chosen_then}, "agreement counts");
    }
  }
}

TEST_F(RoutingMetricsCuda, Settled) {
  for (const bool masked : {false, true}) {
    for (const std::int64_t tokens : {1, 128, 3001}) {
      const std::int64_t checkpoints = 5;
      std::vector<std::int32_t> first;
      for (std::int64_t i = 0; i < checkpoints * tokens; ++i)
        first.push_back(static_cast<std::int32_t>(i * i % 7 % (checkpoints + 1 - i / tokens) - 1));
      const std::vector<std::uint8_t> valid = mask(tokens, masked);
      std::vector<std::int64_t> settled(static_cast<std::size_t>(checkpoints), -7);
      const OnDevice<std::int32_t> d_first(first);
      const OnDevice<std::uint8_t> d_valid(valid);
      const OnDevice<std::int64_t> d_settled(settled);
      ASSERT_EQ(count_settled({first.data(), valid.data(), checkpoints, tokens}, settled.data()), Status::kOk);
      ASSERT_EQ(cuda::count_settled({d_first.data(), d_valid.data(), checkpoints, tokens}, d_settled.data(), nullptr),
                Status::kOk);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      expect_same(settled, d_settled.fetch(), "settled");
    }
  }
}

TEST_F(RoutingMetricsCuda, CountsByLabel) {
  for (const bool masked : {false, true}) {
    const std::int64_t tokens = 4000, top_k = 6, experts = 160, num_labels = 300;
    const std::vector<std::int32_t> chosen = choices(tokens, top_k, experts, 7);
    std::vector<std::int32_t> labels;
    for (std::int64_t t = 0; t < tokens; ++t) labels.push_back(static_cast<std::int32_t>(t * t % (num_labels + 2) - 1));
    const std::vector<std::uint8_t> valid = mask(tokens, masked);
    std::vector<std::int64_t> table(static_cast<std::size_t>(num_labels * experts), -7), outside(1, -7);
    const OnDevice<std::int32_t> d_chosen(chosen), d_labels(labels);
    const OnDevice<std::uint8_t> d_valid(valid);
    const OnDevice<std::int64_t> d_table(table), d_outside(outside);
    ASSERT_EQ(count_by_label({chosen.data(), valid.data(), tokens, top_k, experts}, labels.data(), num_labels,
                             table.data(), outside.data()),
              Status::kOk);
    ASSERT_EQ(cuda::count_by_label({d_chosen.data(), d_valid.data(), tokens, top_k, experts}, d_labels.data(),
                                   num_labels, d_table.data(), d_outside.data(), nullptr),
              Status::kOk);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    expect_same(table, d_table.fetch(), "table");
    expect_same(outside, d_outside.fetch(), "outside");
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
