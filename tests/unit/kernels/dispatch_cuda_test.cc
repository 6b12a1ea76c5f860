// Drops beyond the capacity on a CUDA device against the host.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(DispatchCuda, PlacesAreThoseOfTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/dispatch.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class DispatchCuda : public test::OnCuda {};

template <class T>
void check(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, std::int64_t capacity, DropOrder order,
           const std::string& what) {
  const auto n = static_cast<std::size_t>(tokens * top_k);
  std::vector<float> g(n), h(n), s(static_cast<std::size_t>(tokens * experts));
  unit_gaussians(2, 1, 0, tokens * top_k, g.data());
  unit_gaussians(2, 2, 0, tokens * top_k, h.data());
  unit_gaussians(2, 3, 0, tokens * experts, s.data());
  std::vector<T> weights, keys, scores;
  for (std::size_t i = 0; i < s.size(); ++i)  // coarse, so that their largest tie; some are none
    scores.push_back(i % 977 == 5 ? std::numeric_limits<T>::quiet_NaN()
                                  : static_cast<T>(std::nearbyint(2 * static_cast<double>(s[i]))));
  std::vector<std::int32_t> chosen;
  for (std::size_t i = 0; i < n; ++i) {
    weights.push_back(static_cast<T>(std::fabs(std::nearbyint(8 * static_cast<double>(g[i])))));
    keys.push_back(static_cast<T>(std::nearbyint(4 * static_cast<double>(h[i]))));
    chosen.push_back(i % 9 == 4 ? -1 : static_cast<std::int32_t>((i * i + i / 3) % static_cast<std::size_t>(experts)));
  }
  std::vector<std::int32_t> place(n, -7);
  std::vector<T> out(n, T(-7));
  std::vector<std::int64_t> kept(static_cast<std::size_t>(experts), -7), dropped(1, -7), lost(1, -7);
  const test::OnDevice<T> d_weights(weights), d_keys(keys), d_scores(scores), d_out(out);
  const test::OnDevice<std::int32_t> d_chosen(chosen), d_place(place);
  const test::OnDevice<std::int64_t> d_kept(kept), d_dropped(dropped), d_lost(lost);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::drop_workspace(tokens, experts, top_k), 1));
  DropArgs<T> a;
  a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.capacity = capacity, a.order = order, a.renormalise = true;
  a.chosen = chosen.data(), a.weights = weights.data(), a.keys = keys.data();
  a.scores = scores.data();
  ASSERT_EQ(drop(a, {place.data(), out.data(), kept.data(), dropped.data(), lost.data()}), Status::kOk) << what;
  a.chosen = d_chosen.data(), a.weights = d_weights.data(), a.keys = d_keys.data();
  a.scores = d_scores.data();
  ASSERT_EQ(cuda::drop(a, {d_place.data(), d_out.data(), d_kept.data(), d_dropped.data(), d_lost.data()},
                       workspace.data(), nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(place, d_place.fetch(), what + " place");
  test::expect_same(out, d_out.fetch(), what + " weights");
  test::expect_same(kept, d_kept.fetch(), what + " kept");
  test::expect_same(dropped, d_dropped.fetch(), what + " dropped");
  test::expect_same(lost, d_lost.fetch(), what + " lost");
}

TEST_F(DispatchCuda, PlacesAreThoseOfTheHost) {
  for (const DropOrder order :
       {DropOrder::kTokens, DropOrder::kChoices, DropOrder::kWeights, DropOrder::kKeys, DropOrder::kBatchPrioritised}) {
    const std::string what = "order " + std::to_string(static_cast<int>(order));
    check<float>(3000, 64, 4, 150, order, what);
    check<double>(500, 160, 6, 3, order, what);
    check<double>(1, 1, 1, 0, order, what);
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
