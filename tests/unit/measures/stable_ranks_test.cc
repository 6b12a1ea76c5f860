// Stable ranks of the fixtures' experts against NumPy's SVD (fixtures/make/stable_ranks_golden.py), and the block that
// is read of large matrices.
#include <cmath>
#include <set>

#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_stable_ranks;
namespace {

using namespace test;

/// A scan that lists these matrices.
struct Listed {
  std::string tensor;
  int expert;
  std::int64_t first, elements, columns;
  int layer = 0;
};

Bench measure(TensorStore store, const std::vector<Listed>& matrices, int threads = 1) {
  WeightScan scan;
  for (const Listed& m : matrices) {
    const TensorView* t = store.find(m.tensor);
    EXPECT_TRUE(t) << m.tensor;
    scan.tensor.push_back(m.tensor);
    scan.file.push_back(store.files()[static_cast<std::size_t>(t->file)]);
    scan.dtype.push_back(t->dtype);
    scan.part.push_back(Part::kRoutedExpert);
    scan.layer.push_back(m.layer);
    scan.expert.push_back(m.expert);
    scan.projection.push_back(m.tensor);
    scan.first.push_back(m.first);
    scan.elements.push_back(m.elements);
    scan.columns.push_back(m.columns);
    scan.non_finite.push_back(0);
    scan.zeros.push_back(0);
  }
  Bench bench;
  bench.model = std::move(store);
  bench.threads = threads;
  bench.facts.weight_scan.set(std::move(scan), Origin::kMeasured, {});
  bench.run(measure_stable_ranks);
  return bench;
}

TEST(StableRanks, TheFixturesExpertsAgainstAnSvd) {
  std::size_t compared = 0;
  double widest = 0;
  const nlohmann::json golden = read_json(fixture("measures/stable_ranks.json"));
  for (const auto& [folder, expected] : golden.items()) {
    SCOPED_TRACE(folder);
    TensorStore store = open_weights(fixture(folder));
    std::vector<Listed> matrices;
    for (const auto& row : expected) {
      const TensorView* t = store.find(row[0].get<std::string>());
      ASSERT_TRUE(t) << row;
      const std::int64_t columns = t->shape.back(), elements = t->shape[t->shape.size() - 2] * columns;
      const int slice = row[1];
      matrices.push_back({row[0], slice < 0 ? 0 : slice, slice < 0 ? 0 : slice * elements, elements, columns});
    }
    const Bench bench = measure(open_weights(fixture(folder)), matrices);
    const StableRanks& ranks = bench.facts.stable_ranks.value();
    ASSERT_EQ(ranks.stable_rank.size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double truth = expected[i][2];
      EXPECT_GE(ranks.stable_rank[i], truth * (1 - 1e-9)) << expected[i];  // the golden file has ten digits
      EXPECT_LE(ranks.stable_rank[i], truth * 1.15) << expected[i];
      widest = std::max(widest, ranks.stable_rank[i] / truth);
      ++compared;
    }
  }
  EXPECT_EQ(compared, 96u + 64u + 64u + 24u);  // 4 layers x 8 experts x 3 or 2; 1 layer x 8 x 3
  RecordProperty("largest_ratio_to_svd", std::to_string(widest));
}

/// Row r, column c of an m x n matrix from f(r, c).
template <class F>
TensorStore one_matrix(const TempTree& tree, std::int64_t m, std::int64_t n, F f) {
  std::vector<float> values;
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t c = 0; c < n; ++c) values.push_back(static_cast<float>(f(r, c)));
  }
  WeightFile file;
  file.add_f32("w", {m, n}, values);
  return open_weights(tree.write("model.safetensors", file.text()));
}

TEST(StableRanks, OrthogonalRowsAndAnOuterProductAreExact) {
  const TempTree tree;
  // 300 x 600 of rank 1: so is every block. Products of powers of two are exact.
  Bench bench = measure(
      one_matrix(tree, 300, 600, [](auto r, auto c) { return std::ldexp(1.0, static_cast<int>(r % 5 - c % 7)); }),
      {{"w", 0, 0, 300 * 600, 600}});
  ASSERT_EQ(bench.facts.stable_ranks.value().stable_rank.size(), 1u);
  EXPECT_NEAR(bench.facts.stable_ranks.value().stable_rank[0], 1.0, 1e-12);
  EXPECT_EQ(bench.facts.stable_ranks.value().rows[0], 256);
  EXPECT_EQ(bench.facts.stable_ranks.value().columns[0], 256);
  // diag(2, 1, 1, ..., 1), 20 x 20: (4 + 19) / 4.
  bench = measure(one_matrix(tree, 20, 20, [](auto r, auto c) { return r != c   ? 0.0
                                                                       : r == 0 ? 2.0
                                                                                : 1.0; }),
                  {{"w", 0, 0, 400, 20}});
  EXPECT_NEAR(bench.facts.stable_ranks.value().stable_rank[0], 23.0 / 4, 0.05 * 23 / 4);
}

TEST(StableRanks, TheBlockIsSpreadOverTheWholeMatrix) {
  const TempTree tree;
  // 512 x 1024: every second row, columns 0-63, 320-383, 640-703, 960-1023. What is elsewhere is not read.
  const auto inside = [](std::int64_t c) { return c % 320 < 64; };
  Bench bench =
      measure(one_matrix(tree, 512, 1024, [&](auto r, auto c) { return r % 2 == 1 || !inside(c) ? 1.0 : 0.0; }),
              {{"w", 0, 0, 512 * 1024, 1024}});
  EXPECT_TRUE(bench.facts.stable_ranks.value().layer.empty());  // the block is zero
  bench = measure(one_matrix(tree, 512, 1024, [&](auto r, auto c) { return r == 510 && c == 1023 ? 1.0 : 0.0; }),
                  {{"w", 0, 0, 512 * 1024, 1024}});
  EXPECT_EQ(bench.facts.stable_ranks.value().stable_rank, (std::vector<double>{1.0}));
}

TEST(StableRanks, TheSameForAnyNumberOfThreads) {
  std::vector<Listed> matrices;
  for (int e = 0; e < 8; ++e) {
    for (const char* w : {"w1", "w2", "w3"}) {
      matrices.push_back({"model.layers.0.block_sparse_moe.experts." + std::to_string(e) + "." + w + ".weight", e, 0,
                          32 * 64, std::string(w) == "w2" ? 32 : 64});
    }
  }
  const std::string folder = fixture("models/mixtral-tf4");
  const Bench one = measure(open_weights(folder), matrices, 1), five = measure(open_weights(folder), matrices, 5);
  EXPECT_EQ(one.facts.stable_ranks.value().stable_rank, five.facts.stable_ranks.value().stable_rank);
}

TEST(StableRanks, OfTooManyMatricesEvenlySpacedLayersAreMeasured) {
  std::vector<Listed> matrices;  // 6 layers x 100, where 500 are measured without --full: 5 layers
  for (int i = 0; i < 600; ++i) {
    matrices.push_back({"model.layers.0.block_sparse_moe.experts.0.w1.weight", i % 100, 0, 32 * 64, 64, i / 100});
  }
  const Bench bench = measure(open_weights(fixture("models/mixtral-tf4")), matrices);
  const std::vector<int>& layer = bench.facts.stable_ranks.value().layer;
  EXPECT_EQ(layer.size(), 500u);
  EXPECT_EQ(std::set<int>(layer.begin(), layer.end()), (std::set<int>{1, 2, 3, 4, 5}));
  ASSERT_EQ(bench.records.size(), 1u);
  EXPECT_EQ(bench.records[0].note, "500 matrices of experts in 5 of 6 layers");
}

TEST(StableRanks, UnknownWithoutAScan) {
  Bench bench;
  bench.facts.weight_scan.explain_unknown("no --full");
  bench.run(measure_stable_ranks);
  EXPECT_FALSE(bench.facts.stable_ranks.known());
  EXPECT_EQ(bench.facts.stable_ranks.why_unknown(), "no --full");
}

}  // namespace
}  // namespace moeaudit
