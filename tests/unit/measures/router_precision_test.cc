// The router-precision measure on small checkpoints written here.
#include "audit/measures/router_precision.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "audit/inputs/inputs.h"
#include "audit/measures/measure.h"
#include "audit/measures/router_inputs.h"
#include "kernels/host/gaussian.h"
#include "tests/unit/inputs/temp_tree.h"
#include "tests/unit/measures/router_checkpoint.h"

namespace moeaudit {
extern const Measure measure_header_scan;
namespace {

using namespace test;  // NOLINT: router_checkpoint.h

/// Share over all routers of one mode, with the tokens behind it.
std::pair<double, std::int64_t> share(const PrecisionTable& t, const std::string& mode) {
  double flipped = 0;
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < t.mode.size(); ++i) {
    if (t.mode[i] != mode) continue;
    flipped += t.flipped[i] * static_cast<double>(t.tokens[i]);
    tokens += t.tokens[i];
  }
  return {tokens > 0 ? flipped / static_cast<double>(tokens) : -1, tokens};
}

/// What bfloat16 rounding of the logits must do to unit Gaussian logits. Rounding is monotone, so the k-th and (k+1)-th
/// logit cannot pass each other; they can only become equal, and then the lower index wins, which is the wrong one half
/// of the time. Two values a small gap g apart, in a place where the format's spacing is h, share a rounding cell with
/// probability max(0, 1 - g/h); over a gap density that is flat on the scale of h this integrates to density * h / 2.
/// The density of the k-th and the (k+1)-th of E coinciding at z is E! / ((k-1)! (E-k-1)!) F^(E-k-1) (1-F)^(k-1) f^2.
/// So the share of flips is the integral of that density times h(z) / 4.
double expected_bf16_flips(std::int64_t experts, std::int64_t top_k) {
  const double n = static_cast<double>(experts), k = static_cast<double>(top_k);
  const double log_count = std::lgamma(n + 1) - std::lgamma(k) - std::lgamma(n - k);
  double sum = 0;
  const double step = 1e-4;
  for (double z = -6 + step / 2; z < 6; z += step) {
    const double below = 0.5 * std::erfc(-z / std::sqrt(2.0)), above = 0.5 * std::erfc(z / std::sqrt(2.0));
    const double density = std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0));
    const double h = std::ldexp(1.0, std::ilogb(z) - 7);
    sum += std::exp(log_count + (n - k - 1) * std::log(below) + (k - 1) * std::log(above)) * density * density * h / 4 *
           step;
  }
  return sum;
}

TEST(RouterPrecision, TheDerivationGivesTheKnownScale) {
  EXPECT_NEAR(expected_bf16_flips(8, 2), 0.002, 0.0005);   // 0.2 %
  EXPECT_NEAR(expected_bf16_flips(128, 8), 0.035, 0.006);  // 3-4 %
}

TEST(RouterPrecision, FlipsAreOfTheExpectedScale) {
  for (const Model& m : {Model{12, 8, 512, 2}, Model{4, 128, 512, 8}}) {
    const Measured r = measure(facts_of(m), weights_of(m).open("scale"));
    ASSERT_TRUE(r.facts.router_precision.known());
    const auto [got, tokens] = share(r.table(), "bf16");
    const double want = expected_bf16_flips(m.experts, m.top_k);
    // Layers share the tokens but not the gates, so their flips are independent: five binomial deviations. The logits
    // of a random gate are Gaussian only up to its rows' lengths (relative deviation sqrt(1/(2 hidden)) = 3 %) and
    // their correlations (of order 1/sqrt(hidden) = 4 %), which scale the density of gaps: 10 % for both.
    const double deviation = std::sqrt(want * (1 - want) / static_cast<double>(tokens));
    EXPECT_NEAR(got, want, 5 * deviation + 0.1 * want) << m.experts << " experts";
    EXPECT_LE(share(r.table(), "fp32").first, 1e-4);
    // float16 has three more bits: its spacing is 8 times smaller, and with it the share of ties.
    const double fp16_want = want / 8, fp16_deviation = std::sqrt(fp16_want / static_cast<double>(tokens));
    EXPECT_NEAR(share(r.table(), "fp16").first, fp16_want, 5 * fp16_deviation + 0.1 * fp16_want);
  }
}

TEST(RouterPrecision, ResultsDoNotDependOnTheThreads) {
  const Model m{3, 16, 256, 4};
  const TensorStore store = weights_of(m).open("threads");
  expect_same_tables(measure(facts_of(m), store, {}, 1), measure(facts_of(m), store, {}, 3));
}

TEST(RouterPrecision, ExecutedIsTheModeThatTheRunUses) {
  const Model m{2, 8, 256, 2};
  FactSheet facts = facts_of(m);
  facts.router_dtype.set(DType::kBF16, Origin::kDerived, {});
  const TensorStore store = weights_of(m).open("executed");
  const Measured r = measure(facts, store);
  EXPECT_EQ(share(r.table(), "executed"), share(r.table(), "bf16"));
  EXPECT_EQ(share(measure(facts_of(m), store).table(), "executed").second, 0);  // unknown: not reported
}

TEST(RouterPrecision, ExecutedRoundsTheWeightToTheDtypeItIsLoadedIn) {
  const Model m{1, 64, 256, 8};
  std::vector<float> gate(static_cast<std::size_t>(m.experts * m.hidden));
  kernels::unit_gaussians(5, 0, 0, m.experts * m.hidden, gate.data());
  for (float& v : gate) v /= 16;  // float32 values that bfloat16 does not hold
  Weights w;
  w.add(gate_name(0), {m.experts, m.hidden}, gate, false);
  const TensorStore store = w.open("loaded");
  FactSheet facts = facts_of(m);
  facts.router_dtype.set(DType::kF32, Origin::kDerived, {});
  EXPECT_LT(share(measure(facts, store).table(), "executed").first, 0.001);
  facts.load_dtype.set(DType::kBF16, Origin::kStated, {});
  EXPECT_GT(share(measure(facts, store).table(), "executed").first, 0.005);  // a float32 matmul of rounded weights
}

TEST(RouterPrecision, QuantisedRouterIsMeasuredWhenKnown) {
  const Model m{2, 8, 256, 2};
  FactSheet facts = facts_of(m);
  const TensorStore store = weights_of(m).open("quantised");
  EXPECT_EQ(share(measure(facts, store).table(), "nf4").second, 0);
  facts.router_quantised.set(true, Origin::kDerived, {});
  facts.quant_bits.set(4, Origin::kStated, {});
  const Measured r = measure(facts, store);
  // NF4 keeps about 4 bits of each weight; the error of a logit is of order 0.1, fifty times that of bfloat16.
  EXPECT_GT(share(r.table(), "nf4").first, 10 * share(r.table(), "bf16").first);
  EXPECT_EQ(share(r.table(), "int8").second, 0);
}

TEST(RouterPrecision, OverflowInFloat16) {
  const Model m{1, 4, 64, 1};
  std::vector<float> gate(4 * 64, 0.0f);
  gate[0] = 2048.0f;  // logit of expert 0: 2048 x[0]; float16 ends at 65504
  Weights w;
  w.add(gate_name(0), {4, 64}, gate);
  Weights states;
  std::vector<float> x(3 * 64, 0.0f);
  x[0] = 31.0f;       // 63488: fits
  x[64] = 32.0f;      // 65536: does not
  x[128] = -4096.0f;  // -8388608: does not
  states.add("x", {3, 64}, x);
  const Measured r = measure(facts_of(m), w.open("overflow"), states.open("overflow_states"));
  const PrecisionTable& t = r.table();
  for (std::size_t i = 0; i < t.mode.size(); ++i) EXPECT_EQ(t.overflowed[i], t.mode[i] == "fp16" ? 2 : 0) << t.mode[i];
  EXPECT_EQ(t.max_abs_logit[0], 8388608.0);
  EXPECT_FALSE(t.probe);
  EXPECT_EQ(t.tokens[0], 3);
}

TEST(RouterPrecision, TiesOfTheRoundedLogitsGoToTheLowerIndex) {
  // Logits 1 and 1 + 2^-9 by hand: bfloat16 makes both 1, and expert 0 wins where float64 has expert 1. float16 keeps
  // them.
  Weights w, states;
  w.add(gate_name(0), {2, 2}, {1.0f, 0.0f, 1.0f, 0x1p-9f});
  states.add("x", {1, 2}, {1.0f, 1.0f});
  const Model m{1, 2, 2, 1};
  const PrecisionTable t = measure(facts_of(m), w.open("tie"), states.open("tie_states")).table();
  EXPECT_EQ(share(t, "bf16").first, 1.0);
  EXPECT_EQ(share(t, "fp16").first, 0.0);
  for (std::size_t i = 0; i < t.mode.size(); ++i)
    EXPECT_EQ(t.near_ties[i], t.mode[i] == "bf16" ? 1.0 : 0.0) << t.mode[i];
}

/// Gates of zeros: both scores are equal, and the correction bias alone decides. One layer a pair of biases.
PrecisionTable with_biases(const std::string& stem, const std::vector<std::pair<float, float>>& biases) {
  const Model m{static_cast<int>(biases.size()), 2, 8, 1};
  Weights w;
  FactSheet facts = facts_of(m);
  RouterTable routers = facts.routers.value();
  for (std::size_t l = 0; l < biases.size(); ++l) {
    const std::string layer = std::to_string(l);
    w.add(gate_name(static_cast<int>(l)), {2, 8}, std::vector<float>(16, 0.0f));
    routers.bias[l] = "bias." + layer;
    w.add(routers.bias[l], {2}, {biases[l].first, biases[l].second}, false);
  }
  facts.routers.set(routers, Origin::kMeasured, {});
  Routing r = facts.routing.value();
  r.scoring = Scoring::kSigmoid;
  r.correction_bias = true;
  facts.routing.set(r, Origin::kFamily, {});
  return measure(std::move(facts), w.open(stem)).table();
}

double flipped_in(const PrecisionTable& t, int layer, const std::string& mode) {
  for (std::size_t i = 0; i < t.mode.size(); ++i) {
    if (t.layer[i] == layer && t.mode[i] == mode) return t.flipped[i];
  }
  return -1;
}

TEST(RouterPrecision, ARoundedCorrectionBiasMovesTheChoice) {
  // Neighbours in bfloat16 are 2^-9 apart at 0.25, in float16 2^-12.
  const PrecisionTable t = with_biases("bias_rounded", {{0.25f, 0.2501f}, {0.2501f, 0.25f}, {0.25f, 0.253f}});
  EXPECT_EQ(flipped_in(t, 0, "bias bf16"), 1.0);  // both 0.25: the lower index wins, where float32 has expert 1
  EXPECT_EQ(flipped_in(t, 0, "bias fp16"), 1.0);
  EXPECT_EQ(flipped_in(t, 1, "bias bf16"), 0.0);  // the lower index won before, too
  EXPECT_EQ(flipped_in(t, 2, "bias bf16"), 0.0);  // 0.253 rounds to 0.25390625, still above
  EXPECT_EQ(flipped_in(t, 0, "bias bf16 lost"), -1.0);
  EXPECT_EQ(flipped_in(t, 0, "bf16"), 0.0);       // the logits are 0 in every precision
}

TEST(RouterPrecision, ABiasOnTheGridIsMovedWithinItsCells) {
  std::vector<std::pair<float, float>> biases(64, {0.25f, 0.25f});  // equal: the draw decides, either way
  biases.push_back({0.25f, 0.251953125f});                          // neighbours: their cells do not overlap
  biases.push_back({0.0f, 0.0f});                                   // a fresh model: nothing was rounded
  const PrecisionTable t = with_biases("bias_lost", biases);
  int flipped = 0;
  for (int layer = 0; layer < 64; ++layer) {
    const double share = flipped_in(t, layer, "bias bf16 lost");
    EXPECT_TRUE(share == 0.0 || share == 1.0) << share;
    flipped += share == 1.0;
  }
  EXPECT_GT(flipped, 16);  // half of 64, deviation 4
  EXPECT_LT(flipped, 48);
  EXPECT_EQ(flipped_in(t, 64, "bias bf16 lost"), 0.0);
  EXPECT_EQ(flipped_in(t, 65, "bias bf16 lost"), -1.0);
  EXPECT_EQ(flipped_in(t, 0, "bias bf16"), -1.0);
  EXPECT_EQ(flipped_in(t, 0, "bias fp16 lost"), -1.0);
}

TEST(RouterPrecision, HiddenStatesPerLayerAndSkippedRows) {
  const Model m{2, 8, 64, 2};
  Weights states;
  std::vector<float> x = bf16_gaussians(10 * 64, 50, 1);
  states.add("layers.1.hidden", {2, 5, 64}, x);
  x[3 * 64] = std::nanf("");
  states.add("model.layers.0", {10, 64}, x);
  const Measured r = measure(facts_of(m), weights_of(m).open("per_layer"), states.open("per_layer_states"));
  const PrecisionTable& t = r.table();
  for (std::size_t i = 0; i < t.layer.size(); ++i) EXPECT_EQ(t.tokens[i], t.layer[i] == 0 ? 9 : 10);
  EXPECT_NE(r.records[0].note.find("1 rows that are not finite left out"), std::string::npos) << r.records[0].note;
}

/// As an audit has them: layers whose experts a table of token ids gives, and a gate that scores experts which every token has.
Measured of_fixture(const std::string& model) {
  RunOptions options;
  options.paths = {fixture("models/" + model)};
  options.assume = {{"transformers", "5.23.0"}};
  LoadedRun run = std::move(load_runs(options).at(0));
  std::vector<MeasureRecord> records;
  MeasureContext context{run.facts, run.model, run.base, run.adapter, run.hidden_states, 1, true, {}, records};
  measure_header_scan.run(context);
  return measure(std::move(run.facts), run.model);
}

TEST(RouterPrecision, RoutersOfOtherKinds) {
  const Measured table = of_fixture("deepseek_v4-tf5");
  EXPECT_EQ(std::set<int>(table.table().layer.begin(), table.table().layer.end()), (std::set<int>{1, 2}));
  EXPECT_NE(table.records[0].note.find("1 router left out, the first because model.layers.0.ffn.gate.weight weighs experts that a table"),
            std::string::npos)
      << table.records[0].note;
  for (const std::string model : {"inkling-tf5", "inkling_text-tf5"}) {
    const Measured always = of_fixture(model);
    const PrecisionTable& t = always.table();
    ASSERT_GT(t.mode.size(), 3u) << always.records[0].note;
    for (std::size_t i = 0; i < t.mode.size(); ++i) {
      EXPECT_EQ(t.layer[i], 1);
      // Weights add up to 8 with those that every token has, times 1.0 or so.
      if (t.mode[i] == "fp32") EXPECT_LT(t.flipped[i], 1e-3);
      if (t.mode[i] == "fp32") EXPECT_LT(t.weight_error[i], 1e-5);
      if (t.mode[i] == "bf16") EXPECT_GT(t.weight_error[i], 1e-4);
      if (t.mode[i] == "bf16") EXPECT_LT(t.weight_error[i], 0.1);
    }
  }
}

TEST(RouterPrecision, SaysWhyItCouldNotTell) {
  const Model m{1, 8, 64, 2};
  const TensorStore store = weights_of(m).open("why");
  EXPECT_EQ(measure(facts_of(m), store, {}, 1, false).facts.router_precision.why_unknown(), "--static");
  EXPECT_FALSE(measure(FactSheet(), store).facts.router_precision.known());

  Weights states;
  states.add("x", {3, 32}, std::vector<float>(96, 1.0f));
  const std::string narrow = measure(facts_of(m), store, states.open("narrow")).facts.router_precision.why_unknown();
  EXPECT_NE(narrow.find("not a float tensor [tokens, 64]"), std::string::npos) << narrow;

  FactSheet many = facts_of(m);
  many.top_k.set(9, Origin::kStated, {});
  const std::string top_k = measure(many, store).facts.router_precision.why_unknown();
  EXPECT_NE(top_k.find("top_k"), std::string::npos) << top_k;

  Weights broken;
  std::vector<float> gate(8 * 64, 1.0f);
  gate[5] = std::nanf("");
  broken.add(gate_name(0), {8, 64}, gate);
  const std::string nan = measure(facts_of(m), broken.open("broken")).facts.router_precision.why_unknown();
  EXPECT_NE(nan.find("not finite"), std::string::npos) << nan;
}

TEST(RouterPrecision, TheProbeHasUnitRmsTimesTheNormWeight) {
  RouterInputs inputs(TensorStore{}, kernels::Float::kF32);
  inputs.make_probe(5, 300, 2);
  std::vector<float> x(5 * 300), norm(300, 2.0f);
  EXPECT_EQ(inputs.fill(norm.data(), nullptr, 300, 0, 5, 5, x.data()), 5);
  for (int t = 0; t < 5; ++t) {
    double squares = 0;
    for (int i = 0; i < 300; ++i) squares += static_cast<double>(x[t * 300 + i]) * x[t * 300 + i];
    EXPECT_NEAR(std::sqrt(squares / 300), 2.0, 2.0 * 0x1p-24);  // every element was rounded to float32 once
  }
}

// Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson without continuity correction).
TEST(Wilson, PublishedIntervals) {
  const auto expect = [](std::int64_t hits, std::int64_t n, double low, double high) {
    const auto [l, h] = wilson_interval(hits, n);
    EXPECT_NEAR(l, low, 5e-5) << hits << "/" << n;
    EXPECT_NEAR(h, high, 5e-5) << hits << "/" << n;
  };
  expect(81, 263, 0.2553, 0.3662);
  expect(15, 148, 0.0624, 0.1605);
  expect(0, 20, 0.0, 0.1611);
  expect(1, 29, 0.0061, 0.1718);
  EXPECT_EQ(wilson_interval(5, 5).second, 1.0);
  EXPECT_EQ(wilson_interval(0, 0), (std::pair<double, double>{0.0, 1.0}));
}

TEST(AffordableTokens, MixtralInFullDeepSeekInPart) {
  EXPECT_EQ(affordable_tokens({32, 8, 4096, 3, 1}), 4096);
  const std::int64_t v3 = affordable_tokens({58, 256, 7168, 3, 1});
  EXPECT_GE(v3, 48);
  EXPECT_LT(v3, 1000);
  EXPECT_EQ(affordable_tokens({10000, 512, 16384, 5, 1}), 48);
}

}  // namespace
}  // namespace moeaudit
