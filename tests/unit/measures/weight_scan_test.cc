// Every value of the fixtures and of quantised tensors against fixtures/make/weight_scan_golden.py; faults that a test
// planted; files that change while they are read.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "audit/measures/value_scan.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_header_scan;
extern const Measure measure_router_rows;
extern const Measure measure_weight_scan;
namespace {

using namespace test;

const nlohmann::json& golden() {
  static const nlohmann::json json = read_json(fixture("measures/weight_scan_golden.json"));
  return json;
}

Bench scan(const nlohmann::json& facts, TensorStore store, int threads = 1) {
  Bench bench;
  bench.facts = testing::facts_from_json(facts);
  bench.model = std::move(store);
  bench.threads = threads;
  bench.run(measure_header_scan);
  bench.run(measure_router_rows);
  bench.run(measure_weight_scan);
  return bench;
}

double number(const nlohmann::json& j) { return j.is_string() ? std::nan("") : j.get<double>(); }

/// A sum of n float64 numbers in any order is within n u / (1 - n u) times the sum of their magnitudes of the exact one
/// (Higham, section 4.2); the golden one is exact but for one rounding, and so is each square.
void expect_sums(double sum, double square, std::int64_t n, const nlohmann::json& want) {
  const double u = 0x1p-53, gamma = (static_cast<double>(n) + 2) * u / (1 - (static_cast<double>(n) + 2) * u);
  EXPECT_LE(std::fabs(sum - number(want["sum"])), gamma * number(want["absolute"]));
  EXPECT_LE(std::fabs(square - number(want["sum_of_squares"])), gamma * number(want["sum_of_squares"]));
}

/// An expert of a router that is stored [hidden, experts] is a column; experts of a second set are none of the scanned ones.
TEST(WeightScanMeasure, ARouterThatIsStoredTheOtherWayRound) {
  nlohmann::json facts = model_facts(fixture("models/ernie4_5_vl_moe-tf5"));
  const Bench bench = scan(facts, open_weights(fixture("models/ernie4_5_vl_moe-tf5")));
  ASSERT_TRUE(bench.facts.router_rows.known()) << bench.facts.router_rows.why_unknown();
  const RouterRows& rows = bench.facts.router_rows.value();
  ASSERT_EQ(rows.expert, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7}));
  const TensorView& gate = *bench.model.find("model.layers.1.mlp.gate.weight");
  std::vector<double> values(64 * 8);
  ASSERT_TRUE(decode(gate, 0, 64 * 8, values.data()));
  for (std::size_t e = 0; e < 8; ++e) {
    double square = 0, most = -INFINITY;
    for (std::size_t h = 0; h < 64; ++h) square += values[h * 8 + e] * values[h * 8 + e], most = std::max(most, values[h * 8 + e]);
    EXPECT_NEAR(rows.sum_of_squares[e], square, 1e-12 * square);
    EXPECT_EQ(rows.max[e], most);
    EXPECT_EQ(rows.elements[e], 64);
  }
  const WeightScan& t = bench.facts.weight_scan.value();
  std::set<int> experts;
  for (std::size_t i = 0; i < t.tensor.size(); ++i) {
    if (t.part[i] == Part::kRoutedExpert) experts.insert(t.expert[i]);
    if (t.tensor[i].find(".experts.8.") != std::string::npos) EXPECT_EQ(t.part[i], Part::kOther) << t.tensor[i];
  }
  EXPECT_EQ(experts.size(), 8u);
}

struct Totals {
  std::int64_t units = 0, elements = 0, non_finite = 0, zeros = 0;
  double min = INFINITY, max = -INFINITY, sum = 0, square = 0;
};

TEST(WeightScanMeasure, EveryProjectionOfTheFixtures) {
  std::size_t compared = 0;
  for (const auto& [name, expected] : golden()["models"].items()) {
    SCOPED_TRACE(name);
    const Bench bench = scan(model_facts(fixture(name)), open_weights(fixture(name)));
    ASSERT_TRUE(bench.facts.weight_scan.known()) << bench.facts.weight_scan.why_unknown();
    const WeightScan& t = bench.facts.weight_scan.value();
    std::map<std::string, Totals> found;
    for (std::size_t i = 0; i < t.tensor.size(); ++i) {
      Totals& sum = found[t.projection[i]];
      ++sum.units;
      sum.elements += t.elements[i];
      sum.non_finite += t.non_finite[i];
      sum.zeros += t.zeros[i];
      sum.min = std::min(sum.min, t.min[i]);
      sum.max = std::max(sum.max, t.max[i]);
      sum.sum += t.sum[i];
      sum.square += t.sum_of_squares[i];
      EXPECT_EQ(t.hash[i].size(), 16u);
      EXPECT_EQ(t.first_index[i], -1);
    }
    ASSERT_EQ(found.size(), expected["projections"].size());
    for (const auto& [projection, want] : expected["projections"].items()) {
      SCOPED_TRACE(projection);
      const Totals& got = found[projection];
      EXPECT_EQ(got.units, want["units"]);
      EXPECT_EQ(got.elements, want["elements"]);
      EXPECT_EQ(got.non_finite, want["non_finite"]);
      EXPECT_EQ(got.zeros, want["zeros"]);
      EXPECT_EQ(got.min, number(want["min"]));
      EXPECT_EQ(got.max, number(want["max"]));
      expect_sums(got.sum, got.square, got.elements, want);
      ++compared;
    }
    if (expected["router_rows"] == 0) {
      EXPECT_FALSE(bench.facts.router_rows.known());
      continue;
    }
    const RouterRows& rows = bench.facts.router_rows.value();
    ASSERT_EQ(rows.layer.size(), expected["router_rows"]);
    const auto& last = expected["last_router_row"];
    for (std::size_t i = 0; i < rows.layer.size(); ++i) {
      if (rows.tensor[i] != last[0] || rows.expert[i] != last[1]) continue;
      EXPECT_EQ(rows.elements[i], last[2]["elements"]);
      EXPECT_EQ(rows.min[i], number(last[2]["min"]));
      EXPECT_EQ(rows.max[i], number(last[2]["max"]));
      expect_sums(rows.sum[i], rows.sum_of_squares[i], rows.elements[i], last[2]);
      ++compared;
    }
  }
  EXPECT_GT(compared, 250u);
}

TEST(WeightScanMeasure, StacksAreCutIntoExperts) {
  const Bench bench = scan(model_facts(fixture("models/gpt_oss-tf5")), open_weights(fixture("models/gpt_oss-tf5")));
  const WeightScan& t = bench.facts.weight_scan.value();
  std::map<std::string, std::vector<std::size_t>> rows;
  for (std::size_t i = 0; i < t.tensor.size(); ++i) rows[t.tensor[i]].push_back(i);
  const auto& stack = rows["model.layers.1.mlp.experts.gate_up_proj"];
  ASSERT_EQ(stack.size(), 8u);
  for (std::size_t e = 0; e < stack.size(); ++e) {
    const std::size_t i = stack[e];
    EXPECT_EQ(t.expert[i], static_cast<int>(e));
    EXPECT_EQ(t.layer[i], 1);
    EXPECT_EQ(t.part[i], Part::kRoutedExpert);
    EXPECT_EQ(t.first[i], static_cast<std::int64_t>(e) * t.elements[i]);
    EXPECT_EQ(t.projection[i], "model.layers.{L}.mlp.experts.gate_up_proj");
    // the slice by itself
    const TensorView& view = *bench.model.find(t.tensor[i]);
    std::vector<double> scratch(static_cast<std::size_t>(ValueScan::scratch_length()));
    const auto alone = ValueScan(bench.model, view).run(t.first[i], t.elements[i], scratch.data());
    EXPECT_EQ(hash_text(alone.hash), t.hash[i]);
    EXPECT_EQ(alone.sum_of_squares, t.sum_of_squares[i]);
  }
  EXPECT_EQ(rows["model.layers.1.mlp.experts.down_proj_bias"].size(), 8u);
  EXPECT_EQ(rows["model.layers.1.mlp.router.weight"].size(), 1u);
}

TEST(WeightScanMeasure, QuantisedTensorsAreTheValuesTheyStandFor) {
  const Bench bench = scan({}, open_weights(fixture("measures/quantised.safetensors")));
  const WeightScan& t = bench.facts.weight_scan.value();
  const auto& expected = golden()["quantised"];
  ASSERT_EQ(t.tensor.size(), expected.size());  // side tensors have no rows
  for (std::size_t i = 0; i < t.tensor.size(); ++i) {
    SCOPED_TRACE(t.tensor[i]);
    ASSERT_TRUE(expected.contains(t.tensor[i]));
    const auto& want = expected[t.tensor[i]];
    EXPECT_EQ(t.elements[i], want["elements"]);
    EXPECT_EQ(t.zeros[i], want["zeros"]);
    EXPECT_EQ(t.non_finite[i], 0);
    EXPECT_EQ(t.min[i], number(want["min"]));
    EXPECT_EQ(t.max[i], number(want["max"]));
    expect_sums(t.sum[i], t.sum_of_squares[i], t.elements[i], want);
  }
  EXPECT_NE(bench.records.back().note.find("2 of them nf4 with scales, 2 of them nvfp4 with scales"), std::string::npos)
      << bench.records.back().note;
}

TEST(WeightScanMeasure, PowersOfTwoScaleEightBitFloats) {
  for (const char* dtype : {"U8", "F8_E8M0"}) {
    const TempTree tree;
    WeightFile file;
    file.add("a.weight", "F8_E4M3", {2, 64}, std::string(128, '\x38'));  // ones
    file.add("a.weight_scale", dtype, {2, 2}, "\x7f\x80\x7e\x82");
    const Bench bench = scan({}, open_weights(tree.write("model.safetensors", file.text())));
    const WeightScan& t = bench.facts.weight_scan.value();
    ASSERT_EQ(t.tensor, (std::vector<std::string>{"a.weight"}));
    EXPECT_EQ(t.sum[0], 32 * (1 + 2 + 0.5 + 8));
    EXPECT_EQ(t.max[0], 8);
  }
}

TEST(WeightScanMeasure, Fp4InInt8) {
  const TempTree tree;
  WeightFile file;
  file.add("experts.down_proj", "I8", {2, 2, 16}, std::string(64, '\x21'));  // 0.5, then 1
  file.add("experts.down_proj_scale_inv", "F8_E8M0", {2, 2, 1}, "\x7f\x80\x7e\x82");
  const Bench bench = scan({}, open_weights(tree.write("model.safetensors", file.text())));
  const WeightScan& t = bench.facts.weight_scan.value();
  ASSERT_EQ(t.tensor, (std::vector<std::string>{"experts.down_proj"}));
  EXPECT_EQ(t.elements[0], 128);
  EXPECT_EQ(t.sum[0], 16 * 1.5 * (1 + 2 + 0.5 + 8));
  EXPECT_EQ(t.max[0], 8);
}

/// Tensors that need several pieces and batches' worth of work, in an odd order of dtypes.
WeightFile large() {
  WeightFile file;
  std::vector<float> v(700'001);
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(std::sin(static_cast<double>(i)));
  file.add_f32("a", {700'001}, v);
  std::string bytes(3'000'002, '\0');
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7 % 61);
  file.add("b", "BF16", {1'500'001}, bytes);
  file.add("c", "F8_E4M3", {3'000'002}, bytes);
  file.add("d", "I32", {750'000}, bytes.substr(2));
  file.add("empty", "F32", {0, 4}, "");
  return file;
}

TEST(WeightScanMeasure, ThreadsDoNotShow) {
  const TempTree tree;
  const std::string path = tree.write("model.safetensors", large().text());
  const Bench one = scan({}, open_weights(path));
  for (const int threads : {2, 3, 16}) {
    const Bench more = scan({}, open_weights(path), threads);
    const WeightScan &a = one.facts.weight_scan.value(), &b = more.facts.weight_scan.value();
    EXPECT_EQ(a.tensor, b.tensor);
    EXPECT_EQ(a.hash, b.hash);
    const auto same = [](const std::vector<double>& x, const std::vector<double>& y) {
      return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0;
    };
    EXPECT_TRUE(same(a.sum, b.sum) && same(a.sum_of_squares, b.sum_of_squares) && same(a.min, b.min) &&
                same(a.max, b.max));
  }
}

TEST(WeightScanMeasure, WhatHoldsNoValuesIsHashedAndNamed) {
  const TempTree tree;
  const Bench bench = scan({}, open_weights(tree.write("model.safetensors", large().text())));
  const WeightScan& t = bench.facts.weight_scan.value();
  ASSERT_EQ(t.tensor, (std::vector<std::string>{"a", "b", "c", "d", "empty"}));
  EXPECT_TRUE(std::isnan(t.min[3]) && std::isnan(t.max[3]) && std::isnan(t.sum[3]) && std::isnan(t.sum_of_squares[3]));
  EXPECT_EQ(t.non_finite[3], 0);
  EXPECT_EQ(t.elements[4], 0);
  EXPECT_TRUE(std::isnan(t.min[4]));
  EXPECT_NE(bench.records.back().note.find("cannot be decoded: 1, the first d (I32)"), std::string::npos);
}

TEST(WeightScanMeasure, PlantedFaultsAreFoundWhereTheyAre) {
  const TempTree tree;
  WeightFile file;
  std::vector<float> v(600'000, 0.5f);
  v[300'001] = std::numeric_limits<float>::quiet_NaN();
  v[599'999] = std::numeric_limits<float>::infinity();
  v[7] = -0.0f;
  file.add_f32("model.layers.3.mlp.experts.5.up_proj.weight", {600, 1000}, v);
  const Bench bench = scan({}, open_weights(tree.write("model.safetensors", file.text())));
  const WeightScan& t = bench.facts.weight_scan.value();
  EXPECT_EQ(t.non_finite[0], 2);
  EXPECT_EQ(t.first_index[0], 300'001);
  EXPECT_EQ(t.columns[0], 1000);
  EXPECT_EQ(t.zeros[0], 1);
  EXPECT_EQ(t.sum[0], 0.5 * 599'997);
  EXPECT_EQ(t.layer[0], 3);
  EXPECT_EQ(t.expert[0], 5);
  EXPECT_EQ(t.part[0], Part::kRoutedExpert);
  EXPECT_EQ(t.projection[0], "model.layers.{L}.mlp.experts.{e}.up_proj.weight");
}

/// Side tensors that do not fit are not believed: their codes are only hashed.
TEST(WeightScanMeasure, ScalesThatDoNotFitAreNotUsed) {
  const TempTree tree;
  WeightFile file;
  file.add_zeros("a.weight", {200, 300}, "F8_E4M3");
  file.add_zeros("a.weight_scale_inv", {3, 3});  // two rows of blocks were due
  file.add_zeros("b_blocks", {2, 4, 2, 16}, "U8");
  file.add_zeros("b_scales", {2, 4, 1}, "U8");  // too few
  file.add_zeros("c.weight", {10, 1}, "U8");    // nf4 whose shape claims more than there is
  file.add_zeros("c.weight.absmax", {1});
  file.add_zeros("c.weight.quant_map", {16});
  const std::string state =
      R"({"quant_type": "nf4", "blocksize": 64, "shape": [99999999999, 99999999999], "dtype": "bfloat16"})";
  file.add("c.weight.quant_state.bitsandbytes__nf4", "U8", {static_cast<std::int64_t>(state.size())}, state);
  const Bench bench = scan({}, open_weights(tree.write("model.safetensors", file.text())));
  const WeightScan& t = bench.facts.weight_scan.value();
  EXPECT_EQ(t.tensor.size(), 8u);  // nothing was taken for a side tensor
  for (std::size_t i = 0; i < t.tensor.size(); ++i) {
    if (t.tensor[i] == "b_blocks" || t.tensor[i] == "c.weight") {
      EXPECT_TRUE(std::isnan(t.sum[i])) << t.tensor[i];
    }
    if (t.tensor[i] == "a.weight") {
      EXPECT_EQ(t.zeros[i], 60'000);  // float8 as it stands
    }
  }
}

/// The file loses its end after it was opened: a fault of the file, not the end of the process.
TEST(WeightScanMeasure, AFileThatShrinksIsReported) {
  const TempTree tree;
  const std::string path = tree.write("model.safetensors", large().text());
  Bench bench;
  bench.model = open_weights(path);
  std::filesystem::resize_file(path, 3'000'000);
  bench.run(measure_weight_scan);
  ASSERT_TRUE(bench.facts.weight_problems.known());
  const auto& problems = bench.facts.weight_problems.value();
  ASSERT_EQ(problems.size(), 3u);  // b is cut, c and d are gone
  EXPECT_EQ(problems[0].tensor, "b");
  EXPECT_EQ(problems[0].file, path);
  EXPECT_EQ(bench.facts.weight_scan.value().tensor, (std::vector<std::string>{"a", "empty"}));
}

TEST(WeightScanMeasure, SaysWhyItDidNotRun) {
  Bench none;
  none.run(measure_weight_scan);
  EXPECT_EQ(none.facts.weight_scan.why_unknown(), "no weights of the model are among the inputs");
  Bench headers;
  headers.model = open_weights(fixture("models/mixtral-tf4"));
  MeasureContext context{headers.facts, headers.model, headers.base, headers.adapter, headers.hidden_states, 1, false, {}, headers.records};
  measure_weight_scan.run(context);
  EXPECT_EQ(headers.facts.weight_scan.why_unknown(), "the values were not read; --full reads them all");
  context.full = true;
  measure_weight_scan.run(context);
  EXPECT_TRUE(headers.facts.weight_scan.known());
}

TEST(WeightScanMeasure, LargeFilesOnlyWhenAskedTo) {
  const TempTree tree;
  WeightFile header;
  header.add("big", "BF16", {1'100'000'000}, "");
  std::string text = header.text();
  const std::size_t at = text.find("[0,0]");
  ASSERT_NE(at, std::string::npos);
  text.replace(at, 5, "[0,2200000000]");
  const std::uint64_t length = text.size() - 8;
  std::memcpy(text.data(), &length, 8);
  const std::string path = tree.write("model.safetensors", text);
  std::filesystem::resize_file(path, text.size() + 2'200'000'000);  // sparse
  const Bench bench = scan({}, open_weights(path));
  EXPECT_EQ(bench.facts.weight_scan.why_unknown(),
            "the files hold 2.2 GB, and an audit without --full reads the values of at most 2.0 GB");
}

}  // namespace
}  // namespace moeaudit
