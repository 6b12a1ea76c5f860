// Counts of choices on a CUDA device against the host.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(ExpertLoadCuda, CountsAreThoseOfTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

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

}  // namespace
}  // namespace moeaudit::kernels

#endif
