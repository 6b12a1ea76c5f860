// Values of router tensors: the fixtures (fixtures/make/measures_golden.py) and planted faults.
#include "tests/unit/measures/fixture_model.h"

#include <cmath>
#include <limits>
#include <map>

namespace moeaudit {
extern const Measure measure_header_scan;
extern const Measure measure_router_values;
namespace {

using namespace test;

Bench scan(const nlohmann::json& facts, TensorStore store) {
  Bench bench;
  bench.facts = testing::facts_from_json(facts);
  bench.model = std::move(store);
  bench.run(measure_header_scan);
  bench.run(measure_router_values);
  return bench;
}

TEST(RouterValues, EveryRouterTensorOfTheFixtures) {
  std::size_t tensors = 0, buffers = 0;
  const nlohmann::json golden = read_json(fixture("measures/golden.json"));
  for (const auto& [name, expected] : golden["models"].items()) {
    SCOPED_TRACE(name);
    const Bench bench = scan(model_facts(fixture(name)), open_weights(fixture(name)));
    ASSERT_EQ(bench.facts.router_values.known(), !expected["values"].empty());
    if (!bench.facts.router_values.known()) continue;
    const RouterValues& v = bench.facts.router_values.value();
    std::map<std::string, std::size_t> row;
    for (std::size_t i = 0; i < v.tensor.size(); ++i) row[v.tensor[i]] = i;
    ASSERT_EQ(row.size(), expected["values"].size());
    for (const auto& e : expected["values"]) {
      SCOPED_TRACE(e["tensor"]);
      ASSERT_TRUE(row.count(e["tensor"]));
      const std::size_t i = row[e["tensor"]];
      EXPECT_EQ(v.is_buffer[i] != 0, e["is_buffer"]);
      EXPECT_EQ(v.non_finite[i], e["non_finite"]);
      EXPECT_EQ(v.first_index[i], e["first_index"]);
      EXPECT_EQ(v.zero_rows[i], e["zero_rows"]);
      EXPECT_EQ(v.first_zero_row[i], e["first_zero_row"]);
      ++tensors;
      buffers += v.is_buffer[i] != 0;
    }
  }
  EXPECT_EQ(tensors, 62u + 8u + 6u);  // 62 routers, biases of gpt_oss, correction biases of deepseek_v3
  EXPECT_EQ(buffers, 6u);
}

/// Where a router is stored [hidden, experts], an expert without weights is a column of zeros, and a row of them is none.
TEST(RouterValues, AnExpertOfARouterThatIsStoredTheOtherWayRound) {
  const std::string router = "model.layers.1.mlp.gate.weight";
  const TensorStore whole = open_weights(fixture("models/ernie4_5_vl_moe-tf5"));
  WeightFile file;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    if (whole[i].name != router) file.copy(whole[i], std::string(whole[i].name));
  }
  std::vector<float> values(64 * 8, 0.5f);
  for (std::size_t h = 0; h < 64; ++h) values[h * 8 + 5] = 0;
  for (std::size_t e = 0; e < 8; ++e) values[17 * 8 + e] = 0;
  file.add_f32(router, {64, 8}, values);
  const TempTree tree;
  tree.write("model.safetensors", file.text());
  const Bench bench = scan(model_facts(fixture("models/ernie4_5_vl_moe-tf5")), open_weights(tree.path()));
  const RouterValues& v = bench.facts.router_values.value();
  const auto at = static_cast<std::size_t>(std::find(v.tensor.begin(), v.tensor.end(), router) - v.tensor.begin());
  ASSERT_LT(at, v.tensor.size());
  EXPECT_EQ(v.zero_rows[at], 1);
  EXPECT_EQ(v.first_zero_row[at], 5);
}

/// mixtral-tf4 with one router replaced.
TensorStore with_router(const TempTree& tree, const std::vector<float>& values, const std::string& dtype = "F32") {
  const TensorStore whole = open_weights(fixture("models/mixtral-tf4"));
  const std::string router = "model.layers.2.block_sparse_moe.gate.weight";
  WeightFile file;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    if (whole[i].name != router) file.copy(whole[i], std::string(whole[i].name));
  }
  if (dtype == "F32") file.add_f32(router, {8, 64}, values);
  else file.add_zeros(router, {256, 1}, dtype);
  return open_weights(tree.write("model.safetensors", file.text()));
}

TEST(RouterValues, PlantedFaultsAreFoundWhereTheyAre) {
  const TempTree tree;
  std::vector<float> values(8 * 64, 0.25f);
  values[3 * 64 + 5] = std::numeric_limits<float>::quiet_NaN();
  values[7 * 64] = -std::numeric_limits<float>::infinity();
  for (int row : {4, 6}) std::fill_n(values.begin() + row * 64, 64, row == 4 ? 0.0f : -0.0f);
  const Bench bench = scan(model_facts(fixture("models/mixtral-tf4")), with_router(tree, values));
  const RouterValues& v = bench.facts.router_values.value();
  ASSERT_EQ(v.layer, (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(v.non_finite, (std::vector<std::int64_t>{0, 0, 2, 0}));
  EXPECT_EQ(v.first_index, (std::vector<std::int64_t>{-1, -1, 3 * 64 + 5, -1}));
  EXPECT_EQ(v.zero_rows, (std::vector<std::int64_t>{0, 0, 2, 0}));
  EXPECT_EQ(v.first_zero_row, (std::vector<std::int64_t>{-1, -1, 4, -1}));
}

TEST(RouterValues, QuantisedRoutersAreNotReadAsNumbers) {
  const TempTree tree;
  const Bench bench = scan(model_facts(fixture("models/mixtral-tf4")), with_router(tree, {}, "U8"));
  EXPECT_EQ(bench.facts.router_values.value().layer, (std::vector<int>{0, 1, 3}));
  EXPECT_NE(bench.records.back().note.find("not read: model.layers.2.block_sparse_moe.gate.weight (U8)"), std::string::npos);
}

TEST(RouterValues, SaysWhyItCannotTell) {
  const Bench bench = scan({}, TensorStore());
  EXPECT_EQ(bench.facts.router_values.why_unknown(), "no weights of the model are among the inputs");
}

}  // namespace
}  // namespace moeaudit
