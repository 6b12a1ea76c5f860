// Permute and combine on a CUDA device against the host: the same rows, the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(PermuteCuda, RowsAreThoseOfTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <string>
#include <vector>

#include "kernels/cuda/permute.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

class PermuteCuda : public test::OnCuda {};

std::vector<float> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(7, stream, 0, n, g.data());
  return g;
}

template <class T>
std::vector<float> widened(const std::vector<T>& v) {
  std::vector<float> out;
  for (const T& x : v) out.push_back(static_cast<float>(widen(x)));
  return out;
}

/// crowded: every choice goes to one of two experts. capacity 0: no padding.
template <class T>
void check(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, std::int64_t hidden, bool crowded,
           std::int64_t capacity) {
  const std::string what = std::to_string(tokens) + "x" + std::to_string(experts) + "/" + std::to_string(top_k) + "x" +
                           std::to_string(hidden) + (crowded ? " crowded " : " ") + std::to_string(capacity);
  const std::int64_t slots = tokens * top_k;
  std::vector<std::int32_t> chosen, place;
  std::vector<std::int32_t> filled(static_cast<std::size_t>(experts));
  for (std::int64_t i = 0; i < slots; ++i) {
    const std::int64_t e = i % 9 == 4 ? -1 : (crowded ? i % 2 * (experts - 1) : (i * i + i / 3) % experts);
    chosen.push_back(static_cast<std::int32_t>(e));
    const std::int32_t next = e < 0 ? 0 : filled[static_cast<std::size_t>(e)]++;
    place.push_back(e < 0 || next >= capacity ? -1 : next);
  }
  PermuteArgs a;
  a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.capacity = capacity;
  a.chosen = chosen.data(), a.place = capacity > 0 ? place.data() : nullptr;
  const std::int64_t rows = permuted_rows(a);
  const RowShape shape{tokens, top_k, rows, hidden};
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(experts + 1), -7);
  std::vector<std::int32_t> slot_of_row(static_cast<std::size_t>(rows), -7), row_of_slot(chosen.size(), -7);
  std::vector<T> x, in, d_y;
  for (const float v : gaussians(tokens * hidden, 1)) x.push_back(narrow<T>(v));
  for (const float v : gaussians(rows * hidden, 2)) in.push_back(narrow<T>(v));
  for (const float v : gaussians(tokens * hidden, 3)) d_y.push_back(narrow<T>(v));
  std::vector<Wide<T> > weights;
  for (const float v : gaussians(slots, 4)) weights.push_back(v);
  std::vector<T> gathered(in.size()), y(x.size()), d_rows(in.size()), d_x(x.size());
  std::vector<Wide<T> > d_weights(weights.size(), 7);
  const test::OnDevice<std::int32_t> d_chosen(chosen), d_place(place), d_slot(slot_of_row), d_row(row_of_slot);
  const test::OnDevice<std::int64_t> d_offsets(offsets);
  const test::OnDevice<T> on_x(x), on_in(in), on_d_y(d_y), on_gathered(gathered), on_y(y), on_d_rows(d_rows),
      on_d_x(d_x);
  const test::OnDevice<Wide<T> > on_weights(weights), on_d_weights(d_weights);
  const test::OnDevice<char> workspace(std::vector<char>(cuda::permute_workspace(tokens, experts, top_k), 1));
  const Permutation p{offsets.data(), slot_of_row.data(), row_of_slot.data()};
  ASSERT_EQ(permute(a, p), Status::kOk) << what;
  ASSERT_EQ(gather(p, shape, x.data(), gathered.data()), Status::kOk) << what;
  ASSERT_EQ(combine(p, shape, in.data(), weights.data(), y.data()), Status::kOk) << what;
  ASSERT_EQ(combine(p, shape, in.data(), static_cast<Wide<T>*>(nullptr), d_x.data()), Status::kOk) << what;
  ASSERT_EQ(combine_backward(p, shape, in.data(), weights.data(), d_y.data(), d_rows.data(), d_weights.data()),
            Status::kOk)
      << what;
  a.chosen = d_chosen.data(), a.place = capacity > 0 ? d_place.data() : nullptr;
  const Permutation q{d_offsets.data(), d_slot.data(), d_row.data()};
  ASSERT_EQ(cuda::permute(a, q, workspace.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cuda::gather(q, shape, on_x.data(), on_gathered.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cuda::combine(q, shape, on_in.data(), on_weights.data(), on_y.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cuda::combine(q, shape, on_in.data(), static_cast<Wide<T>*>(nullptr), on_d_x.data(), nullptr), Status::kOk)
      << what;
  ASSERT_EQ(cuda::combine_backward(q, shape, on_in.data(), on_weights.data(), on_d_y.data(), on_d_rows.data(),
                                   on_d_weights.data(), nullptr),
            Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  test::expect_same(offsets, d_offsets.fetch(), what + " offsets");
  test::expect_same(slot_of_row, d_slot.fetch(), what + " slot of row");
  test::expect_same(row_of_slot, d_row.fetch(), what + " row of slot");
  test::expect_same(widened(gathered), widened(on_gathered.fetch()), what + " gather");
  test::expect_same(widened(y), widened(on_y.fetch()), what + " combine");
  test::expect_same(widened(d_x), widened(on_d_x.fetch()), what + " gradient of gather");
  test::expect_same(widened(d_rows), widened(on_d_rows.fetch()), what + " d rows");
  test::expect_same(d_weights, on_d_weights.fetch(), what + " d weights");
}

TEST_F(PermuteCuda, RowsAreThoseOfTheHost) {
  for (const bool crowded : {false, true}) {
    for (const std::int64_t capacity : {0, 40}) {
      check<float>(1, 1, 1, 5, crowded, capacity);
      check<float>(test::sized(3001, 1100), 128, 8, 48, crowded, capacity);
      check<double>(test::sized(700, 200), 384, 6, 33, crowded, capacity);
      check<BFloat16>(test::sized(1030, 300), 160, 4, 64, crowded, capacity);
      check<BFloat16>(5, 8, 8, 7, crowded, capacity);
    }
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
