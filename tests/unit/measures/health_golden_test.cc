// Every number of expert health against NumPy's (fixtures/make/health_golden.py), which shares no code with it.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "audit/measures/expert_health.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using nlohmann::json;

json golden() { return json::parse(std::ifstream(test::fixture("measures/health.json"))); }

std::unique_ptr<Trace> open(const std::string& path) {
  std::vector<InputProblem> problems;
  auto trace = open_trace(std::string(MOE_AUDIT_SOURCE_DIR) + "/" + path, {}, &problems);
  EXPECT_TRUE(trace && problems.empty()) << path;
  return trace;
}

/// Probabilities are float32; percentiles of margins are bins of 1/128.
double tolerance(const std::string& name, double value) {
  const bool percentile = name.starts_with("margin_p");
  return (percentile ? 1.0 / 128 : 2e-5) * std::fabs(value) + 1e-6;
}

void expect_values(const json& wanted, const LayerHealth& l, double HealthMetric::*field) {
  for (const auto& [name, value] : wanted.items()) {
    const HealthMetric* m = l.find(name);
    ASSERT_TRUE(m) << name;
    EXPECT_NEAR(m->*field, value.get<double>(), tolerance(name, value.get<double>())) << name << ", layer " << l.layer;
  }
}

TEST(HealthGolden, EveryNumber) {
  int values = 0, intervals = 0;
  const json all = golden();
  for (const auto& [path, item] : all.items()) {
    SCOPED_TRACE(path);
    const auto trace = open(path);
    std::unique_ptr<Trace> against;
    HealthOptions options;
    options.co_activation = true;
    if (item.contains("against")) against = open(item["against"].get<std::string>());
    options.against = against.get();
    const HealthReport r = measure_health(*trace, options);
    EXPECT_TRUE(r.weight_problems.empty());
    ASSERT_EQ(r.layers.size(), item["layers"].size());
    for (const LayerHealth& l : r.layers) {
      const json& wanted = item["layers"][std::to_string(l.layer)];
      EXPECT_EQ(json(l.load), wanted["load"]);
      expect_values(wanted["metrics"], l, &HealthMetric::value);
      expect_values(wanted["floors"], l, &HealthMetric::floor);
      values += static_cast<int>(wanted["metrics"].size() + wanted["floors"].size());
      if (wanted.contains("tokens")) {
        EXPECT_EQ(l.tokens, wanted["tokens"].get<std::int64_t>());
      }
      if (wanted.contains("dropped")) {
        EXPECT_EQ(json(l.dropped), wanted["dropped"]);
      }
      if (wanted.contains("co_activation")) {
        std::vector<std::int64_t> pairs;
        for (const json& row : wanted["co_activation"]) pairs.insert(pairs.end(), row.begin(), row.end());
        EXPECT_EQ(l.co_activation, pairs);
      }
      for (const auto& [name, list] : {std::pair{"importance", &l.importance}, {"gate_mass", &l.gate_mass}}) {
        if (!wanted.contains(name)) continue;
        ASSERT_EQ(list->size(), wanted[name].size()) << name;
        for (std::size_t e = 0; e < list->size(); ++e) EXPECT_NEAR((*list)[e], wanted[name][e].get<double>(), 2e-5) << name << " " << e;
      }
      for (const auto& [name, ends] : wanted["intervals"].items()) {
        const HealthMetric* m = l.find(name);
        ASSERT_TRUE(m) << name;
        ++intervals;
        const double low = ends[0], high = ends[1], error = 0.1 * (high - low) + 1e-6;
        const bool to_one = name.ends_with("entropy") || name == "choice_jaccard" || name == "confidence";
        EXPECT_NEAR(m->low, std::max(low, 0.0), error) << name << ", layer " << l.layer;
        EXPECT_NEAR(m->high, to_one ? std::min(high, 1.0) : high, error) << name << ", layer " << l.layer;
      }
    }
  }
  EXPECT_GT(values, 600);
  EXPECT_EQ(intervals, 20);
}

/// Each metric of docs/health.md that a layer can have is in the trace that has everything, with the interval that the page
/// promises.
TEST(HealthGolden, IntervalsAreThere) {
  const auto trace = open("fixtures/health/trace"), against = open("fixtures/health/other_checkpoint");
  HealthOptions options;
  options.against = against.get();
  for (const LayerHealth& l : measure_health(*trace, options).layers) {
    EXPECT_EQ(l.blocks, 16);
    EXPECT_EQ(l.utilisation_interval.size(), 16u);
    for (const HealthMetric& m : l.metrics) {
      const bool without = m.name.ends_with("_worst") || m.name.ends_with("_mean") || m.name == "margin_min" ||
                           m.name == "idle_experts" || m.name == "dead_experts";  // 2 steps, 4 micro-batches: too few
      EXPECT_EQ(std::isnan(m.low), without) << m.name;
      if (!without) {
        EXPECT_LE(m.low, m.high) << m.name;
      }
    }
    for (std::size_t e = 0; e < 16; ++e) {
      EXPECT_LT(l.utilisation_interval[e].first, l.utilisation[e]);
      EXPECT_GT(l.utilisation_interval[e].second, l.utilisation[e]);
    }
  }
}

TEST(HealthGolden, ThreadsDoNotShowInIntervals) {
  const auto trace = open("fixtures/health/trace");
  HealthOptions one, many;
  many.threads = 5;
  const HealthReport a = measure_health(*trace, one), b = measure_health(*trace, many);
  for (std::size_t i = 0; i < a.layers.size(); ++i) {
    for (std::size_t j = 0; j < a.layers[i].metrics.size(); ++j) {
      const HealthMetric &x = a.layers[i].metrics[j], &y = b.layers[i].metrics[j];
      EXPECT_TRUE(x.low == y.low || std::isnan(x.low)) << x.name;
      EXPECT_TRUE(x.high == y.high || std::isnan(x.high)) << x.name;
    }
  }
}

/// The same choices as numpy.save, numpy.savez and safetensors write them.
TEST(HealthGolden, RoutedExpertsArrays) {
  const json load = golden()["fixtures/health/trace"];
  const auto loads = [](const char* file) {
    const auto trace = open(std::string("fixtures/health/") + file);
    std::vector<std::vector<std::int64_t>> all;
    for (const LayerHealth& l : measure_health(*trace, {}).layers) all.push_back(l.load);
    return all;
  };
  const auto npy = loads("routed_experts.npy"), npz = loads("routed_experts.npz");
  EXPECT_EQ(npy.size(), 2u);
  EXPECT_EQ(loads("unnamed.npz"), npy);
  EXPECT_EQ(loads("routed_experts.safetensors"), npz);
  std::int64_t all = 0, kept = 0;
  for (const std::int64_t n : npy[0]) all += n;
  for (const std::int64_t n : npz[0]) kept += n;
  EXPECT_EQ(all, 192 * 4);
  std::vector<WeightProblem> none;
  const auto trace = open("fixtures/health/trace");
  std::int64_t tokens = 0;
  const MicroBatch mb = trace->open(trace->micro_batches()[0], &none);
  std::vector<std::uint8_t> mask(192);
  ASSERT_TRUE(read_flags(*mb.token_mask, 0, 192, mask.data()));
  for (const std::uint8_t m : mask) tokens += m;
  EXPECT_EQ(kept, tokens * 4) << "the attention_mask takes padding out";
}

}  // namespace
}  // namespace moeaudit
