// Counts of choices on a CUDA device against the host.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(ExpertLoadCuda, CountsAreThoseOfTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <string>
#include <vector>

#include "kernels/cuda/expert_load.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class ExpertLoadCuda : public test::OnCuda {};

template <class Id>
void check(std::int64_t tokens, std::int64_t top_k, std::int64_t experts, bool masked) {
  std::vector<Id> chosen;
  std::vector<std::uint8_t> valid;
  for (std::int64_t t = 0; t < tokens; ++t) {
    valid.push_back(t % 7 != 3);
    for (std::int64_t j = 0; j < top_k; ++j)
      chosen.push_back(static_cast<Id>((t * t * 31 + j * 17) % (experts + 2) - 1));
  }
  std::vector<std::int64_t> counts(static_cast<std::size_t>(experts), -7), outside(1, -7);
  const test::OnDevice<Id> d_chosen(chosen);
  const test::OnDevice<std::uint8_t> d_valid(valid);
  const test::OnDevice<std::int64_t> d_counts(counts), d_outside(outside);
  ASSERT_EQ(count_choices(CountArgs<Id>{chosen.data(), masked ? valid.data() : nullptr, tokens, top_k, experts},
                          counts.data(), outside.data()),
            Status::kOk);
  ASSERT_EQ(
      cuda::count_choices(CountArgs<Id>{d_chosen.data(), masked ? d_valid.data() : nullptr, tokens, top_k, experts},
                          d_counts.data(), d_outside.data(), nullptr),
      Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  test::expect_same(counts, d_counts.fetch(), "counts");
  test::expect_same(outside, d_outside.fetch(), "outside");
}

TEST_F(ExpertLoadCuda, CountsAreThoseOfTheHost) {
  for (const bool masked : {false, true}) {
    check<std::int16_t>(100'000, 8, 256, masked);
    check<std::int32_t>(12'345, 6, 160, masked);
    check<std::int32_t>(1, 1, 1, masked);
  }
}

TEST_F(ExpertLoadCuda, PairsAreThoseOfTheHost) {
  const std::int64_t tokens = 5000, top_k = 6, experts = 60;
  std::vector<std::int32_t> chosen;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < top_k; ++j)
      chosen.push_back(static_cast<std::int32_t>((t * t + j * 11) % (experts + 2) - 1));
  }
  std::vector<std::int64_t> together(static_cast<std::size_t>(experts * experts), -7);
  const test::OnDevice<std::int32_t> d_chosen(chosen);
  const test::OnDevice<std::int64_t> d_together(together);
  ASSERT_EQ(co_activation({chosen.data(), nullptr, tokens, top_k, experts}, together.data()), Status::kOk);
  ASSERT_EQ(cuda::co_activation({d_chosen.data(), nullptr, tokens, top_k, experts}, d_together.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  test::expect_same(together, d_together.fetch(), "together");
}

template <class T>
void check_statistics(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool masked) {
  std::vector<T> p;
  std::vector<std::int32_t> chosen;
  std::vector<std::uint8_t> valid;
  for (std::int64_t t = 0; t < tokens; ++t) {
    valid.push_back(!masked || t % 3 != 1);
    for (std::int64_t e = 0; e < experts; ++e)
      p.push_back(e % 7 == 5 ? T(0)
                             : static_cast<T>(static_cast<double>((t * 37 + e * e) % 101) /
                                              (50.0 * static_cast<double>(experts))));
    for (std::int64_t j = 0; j < top_k; ++j) chosen.push_back(static_cast<std::int32_t>((t + j) % experts));
  }
  std::vector<RoutingStatistics> out(1);
  const test::OnDevice<T> d_p(p);
  const test::OnDevice<std::int32_t> d_chosen(chosen);
  const test::OnDevice<std::uint8_t> d_valid(valid);
  const test::OnDevice<RoutingStatistics> d_out(out);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::routing_statistics_workspace(tokens, experts), 1));
  ASSERT_EQ(routing_statistics(RoutingStatisticsArgs<T>{p.data(), chosen.data(), valid.data(), tokens, experts, top_k},
                               out.data()),
            Status::kOk);
  ASSERT_EQ(cuda::routing_statistics(
                RoutingStatisticsArgs<T>{d_p.data(), d_chosen.data(), d_valid.data(), tokens, experts, top_k},
                d_out.data(), workspace.data(), nullptr),
            Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const RoutingStatistics got = d_out.fetch()[0];
  const std::string what = std::to_string(tokens) + "x" + std::to_string(experts);
  test::expect_same<double>({out[0].token_entropy, out[0].mean_entropy, out[0].mutual_information, out[0].confidence},
                            {got.token_entropy, got.mean_entropy, got.mutual_information, got.confidence}, what);
}

TEST_F(ExpertLoadCuda, StatisticsHaveTheBitsOfTheHost) {
  for (const bool masked : {false, true}) {
    check_statistics<float>(700, 60, 4, masked);
    check_statistics<double>(257, 384, 32, masked);
    check_statistics<double>(1, 1, 1, masked);
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
