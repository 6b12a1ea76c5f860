// Expert health: published counts, a small trace against naive sums, and what padding, sampling, bad pieces and few tokens
// do.
#include "audit/measures/expert_health.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "audit/measures/measure.h"
#include "tests/unit/inputs/temp_tree.h"
#include "tests/unit/traces/trace_files.h"

namespace moeaudit {
extern const Measure measure_trace_loads;
namespace {

using test::SafetensorsText;
using test::TempTree;

HealthReport health_of(const std::string& path, HealthOptions options = {}, const TraceOptions& trace_options = {}) {
  std::vector<InputProblem> problems;
  const auto trace = open_trace(path, trace_options, &problems);
  EXPECT_TRUE(trace);
  return trace ? measure_health(*trace, options) : HealthReport{};
}

double value(const LayerHealth& l, const char* name) {
  const HealthMetric* m = l.find(name);
  EXPECT_TRUE(m) << name;
  return m ? m->value : std::nan("");
}

/// Published counts of healthy models: MaxVio, population CV, entropy and Gini as in facts collected from the same files
/// by another program, to the digits given there.
TEST(ExpertHealth, OlmoeOnC4) {
  const HealthReport r = health_of(test::fixture("expert_counts/olmoe-1b-7b_c4.json"));
  ASSERT_EQ(r.layers.size(), 3u);
  const double max_violation[] = {2.02, 1.66, 1.50}, cv[] = {.32, .40, .51}, entropy[] = {.990, .982, .968}, gini[] = {.14, .21, .29}, least[] = {.30, .20, .19};
  for (std::size_t i = 0; i < 3; ++i) {
    const LayerHealth& l = r.layers[i];
    EXPECT_NEAR(value(l, "max_violation_pooled"), max_violation[i], 0.005);
    EXPECT_NEAR(value(l, "cv_population"), cv[i], 0.005);
    EXPECT_NEAR(value(l, "normalised_entropy"), entropy[i], 0.0005);
    EXPECT_NEAR(value(l, "gini"), gini[i], 0.005);
    EXPECT_NEAR(1 - value(l, "min_violation_pooled"), least[i], 0.005);
    EXPECT_EQ(value(l, "dead_experts"), 0);
    EXPECT_EQ(value(l, "cold_experts"), 0);
    EXPECT_EQ(l.tokens, 208896);  // 1,671,168 choices, 8 a token
    EXPECT_TRUE(l.find("max_violation_pooled")->cannot_tell.empty());
    EXPECT_LT(l.find("max_violation_pooled")->floor, 0.02);
  }
  EXPECT_EQ(r.across.front().name, "max_violation_pooled");
  EXPECT_EQ(r.across.front().worst_layer, 0);
}

TEST(ExpertHealth, NoHealthyModelHasADeadExpert) {
  for (const char* name : {"mixtral-8x7b_c4", "mixtral-8x7b_github", "olmoe-1b-7b_c4", "olmoe-1b-7b_github", "olmoe-1b-7b_tulu"}) {
    for (const LayerHealth& l : health_of(test::fixture(std::string("expert_counts/") + name + ".json")).layers) {
      EXPECT_EQ(value(l, "dead_experts"), 0) << name;
      EXPECT_TRUE(l.find("dead_experts")->cannot_tell.empty()) << name << ": 200,000 tokens are enough to say so";
    }
  }
}

// ---- a trace made here -------------------------------------------------------------------------------------------------

constexpr int kTokens = 96, kExperts = 5, kTopK = 2, kSequences = 4;

struct Made {
  std::vector<float> logits;
  std::vector<std::int16_t> chosen, recomputed;
  std::vector<float> weights;
  std::vector<std::uint8_t> mask, dropped;
};

Made make(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Made m;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<float> z(kExperts);
    for (float& v : z) v = normal(random);
    z[1] += 1;  // one expert is liked
    std::vector<int> order = {0, 1, 2, 3, 4};
    std::sort(order.begin(), order.end(), [&](int a, int b) { return z[static_cast<std::size_t>(a)] > z[static_cast<std::size_t>(b)]; });
    m.logits.insert(m.logits.end(), z.begin(), z.end());
    for (int j = 0; j < kTopK; ++j) m.chosen.push_back(static_cast<std::int16_t>(order[static_cast<std::size_t>(j)]));
    m.recomputed.push_back(m.chosen[m.chosen.size() - 1]);  // the same set in another order ...
    m.recomputed.push_back(t % 8 == 0 ? static_cast<std::int16_t>(order[2]) : m.chosen[m.chosen.size() - 2]);  // ... but for an eighth
    m.weights.push_back(0.75f);
    m.weights.push_back(0.25f);
    m.mask.push_back(t % 24 < 20);
    m.dropped.push_back(t % 4 == 0);
    m.dropped.push_back(t % 8 == 0);
  }
  return m;
}

void write_head(const TempTree& tree, const std::string& more = "") {
  tree.write("trace.json", R"({"format": "moe-audit-trace", "version": 1, "model": {"model_type": "mixtral", "num_experts": 5, "top_k": 2, "hidden_size": 64}, "layers": [{"layer": 3}])" + more + "}");
}

std::string record(int step, int micro_batch, const std::string& more = "") {
  return R"({"kind": "micro_batch", "step": )" + std::to_string(step) + R"(, "micro_batch": )" + std::to_string(micro_batch) +
         R"(, "file": "s)" + std::to_string(step) + "m" + std::to_string(micro_batch) + R"(.safetensors", "tokens": 96, "batch": [4, 24])" + more + "}\n";
}

SafetensorsText tensors(const Made& m) {
  SafetensorsText text;
  text.add("token_mask", "U8", {kTokens}, m.mask)
      .add("layer.3.router_logits", "F32", {kTokens, kExperts}, m.logits)
      .add("layer.3.selected_experts", "I16", {kTokens, kTopK}, m.chosen)
      .add("layer.3.recomputed_selected_experts", "I16", {kTokens, kTopK}, m.recomputed)
      .add("layer.3.routing_weights", "F32", {kTokens, kTopK}, m.weights)
      .add("layer.3.dropped", "U8", {kTokens, kTopK}, m.dropped);
  return text;
}

/// The same numbers by plain loops over all micro-batches.
struct Naive {
  std::vector<double> load = std::vector<double>(kExperts), importance = load, gate = load;
  double tokens = 0, entropy = 0, confidence = 0, changed = 0, dropped = 0, lost = 0;
  std::vector<double> margins;

  void add(const Made& m) {
    for (int t = 0; t < kTokens; ++t) {
      if (!m.mask[static_cast<std::size_t>(t)]) continue;
      ++tokens;
      const float* z = m.logits.data() + t * kExperts;
      double sum = 0;
      for (int e = 0; e < kExperts; ++e) sum += std::exp(static_cast<double>(z[e]));
      for (int e = 0; e < kExperts; ++e) {
        const double p = std::exp(static_cast<double>(z[e])) / sum;
        importance[static_cast<std::size_t>(e)] += p;
        entropy -= p * std::log(p);
      }
      std::vector<float> sorted(z, z + kExperts);
      std::sort(sorted.rbegin(), sorted.rend());
      margins.push_back(static_cast<double>(sorted[kTopK - 1]) - static_cast<double>(sorted[kTopK]));
      int gone = 0;
      for (int j = 0; j < kTopK; ++j) {
        const auto i = static_cast<std::size_t>(t * kTopK + j);
        const auto e = static_cast<std::size_t>(m.chosen[i]);
        ++load[e];
        gate[e] += static_cast<double>(m.weights[i]);
        confidence += std::exp(static_cast<double>(z[e])) / sum;
        gone += m.dropped[i];
      }
      dropped += gone;
      lost += gone == kTopK;
      changed += t % 8 == 0;
    }
  }
};

class HealthTrace : public testing::Test {
 protected:
  void write(const std::vector<std::pair<int, int>>& batches) {
    write_head(tree);
    std::string records;
    unsigned seed = 1;
    for (const auto& [step, micro_batch] : batches) {
      const Made m = make(seed++);
      naive.add(m);
      tree.write("s" + std::to_string(step) + "m" + std::to_string(micro_batch) + ".safetensors", tensors(m).text());
      records += record(step, micro_batch);
    }
    tree.write("records.jsonl", records);
  }
  TempTree tree;
  Naive naive;
};

TEST_F(HealthTrace, AgainstPlainLoops) {
  write({{0, 0}, {0, 1}, {1, 0}, {1, 1}});
  const HealthReport r = health_of(tree.path());
  EXPECT_TRUE(r.weight_problems.empty());
  EXPECT_EQ(r.steps, 2);
  EXPECT_EQ(r.micro_batches, 4);
  EXPECT_EQ(r.score, "softmax");
  EXPECT_EQ(r.score_from, "family");
  ASSERT_EQ(r.layers.size(), 1u);
  const LayerHealth& l = r.layers[0];
  EXPECT_EQ(l.layer, 3);
  EXPECT_EQ(l.tokens, 4 * 80) << "padding is left out";
  double most = 0, importance_mass = 0, gate_mass = 0, mean_entropy = 0;
  for (const double n : naive.load) most = std::max(most, n);
  for (const double p : naive.importance) importance_mass += p;
  for (const double g : naive.gate) gate_mass += g;
  for (std::size_t e = 0; e < kExperts; ++e) {
    EXPECT_EQ(static_cast<double>(l.load[e]), naive.load[e]);
    EXPECT_NEAR(l.importance[e], naive.importance[e] / (importance_mass / kExperts), 1e-5);
    EXPECT_NEAR(l.gate_mass[e], naive.gate[e] / (gate_mass / kExperts), 1e-12);
    const double q = naive.importance[e] / importance_mass;
    mean_entropy -= q * std::log(q);
  }
  EXPECT_NEAR(value(l, "max_violation_pooled"), most / (naive.tokens * kTopK / kExperts) - 1, 1e-12);
  EXPECT_NEAR(value(l, "token_entropy"), naive.entropy / naive.tokens / std::log(5.0), 1e-5);
  EXPECT_NEAR(value(l, "mutual_information"), mean_entropy - naive.entropy / naive.tokens, 1e-5);
  EXPECT_NEAR(value(l, "confidence"), naive.confidence / naive.tokens, 1e-5);
  EXPECT_DOUBLE_EQ(value(l, "recompute_changed"), naive.changed / naive.tokens) << "another order of the same experts is no change";
  EXPECT_DOUBLE_EQ(value(l, "dropped_choices"), naive.dropped / (naive.tokens * kTopK));
  EXPECT_DOUBLE_EQ(value(l, "tokens_with_all_dropped"), naive.lost / naive.tokens);
  EXPECT_EQ(value(l, "choices_off_the_top_k"), 0);
  EXPECT_EQ(value(l, "choice_jaccard"), 1);
  std::sort(naive.margins.begin(), naive.margins.end());
  EXPECT_DOUBLE_EQ(value(l, "margin_min"), naive.margins.front());
  EXPECT_NEAR(value(l, "margin_p50") / naive.margins[naive.margins.size() / 2 - 1], 1, 0.006);
  EXPECT_EQ(value(l, "choices_of_no_expert"), 0);
  const HealthMetric* m = l.find("max_violation_pooled");
  EXPECT_EQ(l.blocks, 16) << "sequences";
  EXPECT_LT(m->low, m->value);
  EXPECT_GT(m->high, m->value * 0.9);
  EXPECT_GE(value(l, "max_violation_step_mean"), m->value) << "MaxVio is convex: smaller windows show no less";
  EXPECT_GE(value(l, "max_violation_micro_batch_mean"), value(l, "max_violation_step_mean"));
  EXPECT_FALSE(l.find("max_violation_micro_batch_mean")->cannot_tell.empty()) << "32 choices an expert";
  EXPECT_TRUE(m->cannot_tell.empty()) << "128 choices an expert";
}

TEST_F(HealthTrace, ThreadsDoNotShow) {
  write({{0, 0}, {0, 1}, {2, 0}});
  HealthOptions many;
  many.threads = 7;
  const HealthReport a = health_of(tree.path()), b = health_of(tree.path(), many);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (std::size_t i = 0; i < a.layers[0].metrics.size(); ++i) {
    const HealthMetric &x = a.layers[0].metrics[i], &y = b.layers[0].metrics[i];
    EXPECT_EQ(x.name, y.name);
    EXPECT_EQ(std::isnan(x.value) ? 0 : x.value, std::isnan(y.value) ? 0 : y.value) << x.name;
  }
}

TEST_F(HealthTrace, ABiasedChoiceHasNoMarginInTheLogits) {
  write_head(tree);
  Made m = make(5);
  for (int t = 0; t < kTokens; t += 4) m.chosen[static_cast<std::size_t>(2 * t)] = m.chosen[static_cast<std::size_t>(2 * t + 1)] == 4 ? 3 : 4;  // a bias's doing
  tree.write("s0m0.safetensors", tensors(m).text());
  tree.write("records.jsonl", record(0, 0));
  const HealthReport r = health_of(tree.path());
  EXPECT_GT(value(r.layers[0], "choices_off_the_top_k"), 0.1);
  EXPECT_LT(value(r.layers[0], "choice_jaccard"), 1);
  EXPECT_NE(r.layers[0].find("margin_p10")->cannot_tell.find("correction bias"), std::string::npos);
}

TEST_F(HealthTrace, LogitsAloneAndNonFiniteOnes) {
  write_head(tree);
  Made m = make(6);
  m.logits[5 * 7] = std::nanf("");
  m.logits[5 * 9 + 1] = INFINITY;
  tree.write("s0m0.safetensors", SafetensorsText().add("layer.3.router_logits", "F32", {kTokens, kExperts}, m.logits).text());
  tree.write("records.jsonl", record(0, 0));
  const HealthReport r = health_of(tree.path());
  EXPECT_EQ(r.layers[0].choices_from, "top k of the logits");
  EXPECT_DOUBLE_EQ(value(r.layers[0], "tokens_with_non_finite_logits"), 2.0 / 96);
  EXPECT_EQ(r.layers[0].tokens, 94);
  EXPECT_TRUE(std::isfinite(value(r.layers[0], "token_entropy")));
}

TEST_F(HealthTrace, ChoicesOfNoExpert) {
  write_head(tree);
  Made m = make(7);
  m.chosen[0] = -1;
  m.chosen[11] = 5;
  tree.write("s0m0.safetensors", tensors(m).text());
  tree.write("records.jsonl", record(0, 0));
  const HealthReport r = health_of(tree.path());
  EXPECT_DOUBLE_EQ(value(r.layers[0], "choices_of_no_expert"), 2.0 / 160);
  EXPECT_EQ(r.layers[0].choices, 158);
}

TEST_F(HealthTrace, ABadPieceIsNamedAndTheRestMeasured) {
  write({{0, 0}, {0, 1}});
  tree.write("s0m1.safetensors", "no safetensors");
  const HealthReport r = health_of(tree.path());
  ASSERT_FALSE(r.weight_problems.empty());
  EXPECT_NE(r.weight_problems[0].file.find("s0m1.safetensors"), std::string::npos);
  EXPECT_EQ(r.layers.at(0).tokens, 80);
}

TEST_F(HealthTrace, EvaluationIsNotTraining) {
  write({{0, 0}});
  const Made m = make(9);
  tree.write("s0m1.safetensors", tensors(m).text());
  tree.write("records.jsonl", record(0, 0) + record(0, 1, R"(, "training": false)"));
  EXPECT_EQ(health_of(tree.path()).layers[0].tokens, 80);
}

TEST_F(HealthTrace, Sampled) {
  write_head(tree);
  const Made m = make(10);
  std::vector<std::int32_t> at;
  std::vector<std::int16_t> chosen;
  for (int t = 0; t < kTokens; t += 3) {
    at.push_back(t);
    chosen.insert(chosen.end(), m.chosen.begin() + 2 * t, m.chosen.begin() + 2 * t + 2);
  }
  tree.write("s0m0.safetensors", SafetensorsText().add("sampled", "I32", {32}, at).add("layer.3.selected_experts", "I16", {32, 2}, chosen).text());
  tree.write("records.jsonl", record(0, 0, R"(, "sampled_tokens": 32)"));
  const HealthReport r = health_of(tree.path());
  EXPECT_EQ(r.layers[0].tokens, 32);
  EXPECT_EQ(r.layers[0].blocks, 4) << "24 tokens a sequence, 8 of them kept";
}

TEST_F(HealthTrace, AgainstAnotherCheckpoint) {
  write({{0, 0}});
  const TempTree other;
  write_head(other);
  Made m = make(1);
  for (int t = 0; t < kTokens; t += 2) m.chosen[static_cast<std::size_t>(2 * t)] = -1;  // half of the tokens keep one of two
  other.write("s0m0.safetensors", tensors(m).text());
  other.write("records.jsonl", record(0, 0));
  std::vector<InputProblem> problems;
  const auto against = open_trace(other.path(), {}, &problems);
  HealthOptions options;
  options.against = against.get();
  const HealthReport r = health_of(tree.path(), options);
  EXPECT_DOUBLE_EQ(value(r.layers[0], "saturation"), 0.75);
  EXPECT_DOUBLE_EQ(r.layers[0].find("saturation")->chance, 0.4);
  EXPECT_DOUBLE_EQ(value(r.layers[0], "routing_changed"), 0.5);
  options.against = nullptr;
  EXPECT_EQ(health_of(tree.path(), options).layers[0].find("saturation"), nullptr);
}

TEST_F(HealthTrace, CoActivation) {
  write_head(tree);
  Made m = make(11);
  for (int t = 0; t < kTokens; ++t) {  // 0 and 1 always together, else 2 with 3 or 4
    m.chosen[static_cast<std::size_t>(2 * t)] = t % 2 == 0 ? 1 : 2;
    m.chosen[static_cast<std::size_t>(2 * t + 1)] = t % 2 == 0 ? 0 : t % 4 == 1 ? 3 : 4;
  }
  tree.write("s0m0.safetensors", tensors(m).text());
  tree.write("records.jsonl", record(0, 0));
  HealthOptions options;
  options.co_activation = true;
  const LayerHealth l = health_of(tree.path(), options).layers.at(0);
  ASSERT_FALSE(l.together.empty());
  EXPECT_EQ(l.together[0].first, 0);
  EXPECT_EQ(l.together[0].second, 1);
  EXPECT_EQ(l.together[0].together, 40);
  EXPECT_DOUBLE_EQ(l.together[0].lift, 40.0 / (40.0 * 40.0 / 80.0));
  EXPECT_EQ(l.co_activation.size(), 25u);
  EXPECT_EQ(l.co_activation[0], 40);
  EXPECT_EQ(l.co_activation[1], 40);
}

TEST(ExpertHealth, FewTokensCannotTell) {
  const TempTree tree;
  tree.write("c.json", R"({"num_experts": 4, "top_k": 1, "layers": {"0": [40, 10, 0, 10]}})");
  const HealthReport r = health_of(tree.path("c.json"));
  EXPECT_FALSE(r.layers[0].find("max_violation_pooled")->cannot_tell.empty());
  EXPECT_FALSE(r.layers[0].find("dead_experts")->cannot_tell.empty()) << "an idle expert of 60 tokens is not dead";
  EXPECT_EQ(value(r.layers[0], "idle_experts"), 1);
  tree.write("c.json", R"({"num_experts": 4, "top_k": 1, "layers": {"0": [400, 100, 0, 100]}})");
  EXPECT_TRUE(health_of(tree.path("c.json")).layers[0].find("dead_experts")->cannot_tell.empty());
}

// ---- the forecast --------------------------------------------------------------------------------------------------------

class Placement : public testing::Test {
 protected:
  void SetUp() override {
    tree.write("c.json", R"({"num_experts": 4, "top_k": 2, "hidden_size": 100, "layers": {"0": [300, 300, 100, 100], "1": [200, 200, 200, 200]}})");
  }
  PlacementForecast forecast(const std::string& map, std::int64_t ranks, std::vector<double> speeds = {}) {
    problems.clear();
    HealthOptions o;
    o.placement.ranks = ranks;
    o.placement.speeds = std::move(speeds);
    if (!map.empty()) o.placement.map = read_expert_map(tree.write("map.json", map), ranks, &problems);
    if (!map.empty() && !o.placement.map) return {};
    const HealthReport r = health_of(tree.path("c.json"), o);
    problems.insert(problems.end(), r.problems.begin(), r.problems.end());
    return r.placement;
  }
  std::string only_problem() const { return problems.size() == 1 ? problems[0].what : std::to_string(problems.size()) + " problems"; }

  TempTree tree;
  std::vector<InputProblem> problems;
};

TEST_F(Placement, ContiguousRuns) {
  const PlacementForecast p = forecast("", 2);
  EXPECT_TRUE(problems.empty());
  EXPECT_DOUBLE_EQ(p.worst, 1.5);
  EXPECT_EQ(p.worst_layer, 0);
  EXPECT_DOUBLE_EQ(p.straggler_factor, (600.0 + 400) / 800);
  ASSERT_EQ(p.layers.size(), 2u);
  EXPECT_EQ(p.layers[0].load, (std::vector<double>{1.5, 0.5}));
  EXPECT_EQ(p.layers[0].slowest_rank, 0);
  // 800 choices, half of them to the other rank, 100 values of 2 bytes there and back; 400 tokens.
  EXPECT_FALSE(p.recorded_sources);
  EXPECT_DOUBLE_EQ(p.layers[0].leaving, 0.5);
  EXPECT_DOUBLE_EQ(p.layers[0].bytes, 800 * 0.5 * 100 * 2 * 2);
  EXPECT_DOUBLE_EQ(p.bytes, 2 * p.layers[0].bytes);
  EXPECT_DOUBLE_EQ(p.bytes_per_token, p.bytes / 400);
  // Of 4 experts 2 on a rank, 2 chosen: c^2 = (2 - 1)(4 - 2) / (2 (4 - 1)) = 1/3 a token.
  EXPECT_DOUBLE_EQ(p.layers[0].even_router, 1 + std::sqrt(2 * std::log(2.0) / 3 / 400));
}

TEST_F(Placement, GivenMaps) {
  for (const char* map : {"[0, 1, 1, 0]", "[[0, 1, 1, 0], [1, 0, 0, 1]]", R"({"expert_to_rank": [0, 1, 1, 0]})", R"({"physical_to_logical_map": [[0, 3, 1, 2]]})"}) {
    const PlacementForecast p = forecast(map, 2);
    EXPECT_TRUE(problems.empty()) << map;
    EXPECT_DOUBLE_EQ(p.straggler_factor, 1) << map;
  }
  EXPECT_EQ(forecast("[0, 1, 2, 0]", 0).ranks, 3) << "by the largest rank";
}

TEST_F(Placement, CopiesShareTheLoad) {
  // Six slots on two ranks: expert 0 and 1 twice. Layer 0: 150 + 150 + 100 each.
  const PlacementForecast p = forecast(R"({"physical_to_logical_map": [[0, 1, 2, 0, 1, 3], [0, 1, 2, 0, 1, 3]]})", 2);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(p.layers[0].load, (std::vector<double>{1, 1}));
  // Both copies on rank 0: 300 + 150, 150 + 100 + 100.
  EXPECT_EQ(forecast(R"({"physical_to_logical_map": [0, 0, 1, 1, 2, 3]})", 2).layers[0].load, (std::vector<double>{450.0 / 400, 350.0 / 400}));
}

TEST_F(Placement, DeviceSpeeds) {
  const PlacementForecast p = forecast("", 2, {1, 0.5});
  // Layer 0: 600 / 1 and 200 / 0.5; layer 1: 400 and 800; divided as the speeds are, 800 / 1.5 each.
  EXPECT_DOUBLE_EQ(p.layers[0].max_over_mean, 600 / (800 / 1.5));
  EXPECT_EQ(p.layers[1].slowest_rank, 1);
  EXPECT_DOUBLE_EQ(p.straggler_factor, (600.0 + 800) / (1600 / 1.5));
  EXPECT_TRUE(forecast("", 2, {1, 1, 1}).layers.empty());
  EXPECT_EQ(only_problem(), "3 speeds for 2 ranks");
}

TEST_F(Placement, MapsThatDoNotFit) {
  for (const auto& [map, ranks, says] : std::vector<std::tuple<std::string, int, std::string>>{
           {"[0, 1, 1]", 2, "puts expert 3 of layer 0 on no rank"},
           {"[0, 1, 1, 0, 1]", 2, "names expert 4; layer 0 has 4"},
           {"[0, 1, 2, 0]", 2, "expert 2 is on rank 2, the ranks are 0 to 1"},
           {"[0, 1, -1, 0]", 0, "the rank of expert 2 is no number from 0 on"},
           {"[0, 1, 1.5, 0]", 2, "the rank of expert 2 is no number from 0 on"},
           {"[0, 99999999, 0, 0]", 0, "the rank of expert 1 is no number from 0 on"},
           {"[0, 1, 50, 0]", 0, "has fewer experts than the 51 ranks"},
           {"[0, 0, 0, 0]", 0, "has one rank: there is nothing to forecast"},
           {"[[0, 1, 1, 0], 3]", 2, "holds something beside lists of numbers"},
           {"[[0, 1, 1, 0], []]", 2, "holds something beside lists of numbers"},
           {R"({"layers": 3})", 2, "is no map of experts: neither a list, nor expert_to_rank, nor physical_to_logical_map"},
           {"7", 2, "is no map of experts: neither a list, nor expert_to_rank, nor physical_to_logical_map"},
           {R"({"physical_to_logical_map": [[0, 1, 2, 3]]})", 0, "does not say on how many ranks its slots lie"},
           {R"({"physical_to_logical_map": [[0, 1, 2, 3, 0]]})", 2, "has 5 slots, which 2 ranks cannot hold in equal numbers"},
           {R"({"physical_to_logical_map": [[0, 1, -1, 3]]})", 2, "slot 2 holds no expert id"},
           {R"({"physical_to_logical_map": [[0, 1, 2, 2]]})", 2, "puts expert 3 of layer 0 on no rank"}}) {
    EXPECT_TRUE(forecast(map, ranks).layers.empty()) << map;
    EXPECT_EQ(problems.empty() ? "" : problems[0].what, says) << map;
    EXPECT_FALSE(problems.empty() || problems[0].remedy.empty());
  }
  EXPECT_TRUE(forecast("[0, 1, 1, 0", 2).layers.empty());
  EXPECT_EQ(problems.at(0).what.substr(0, 10), "JSON error");
  EXPECT_TRUE(forecast("", 3).layers.empty());
  EXPECT_EQ(only_problem(), "the 4 experts of layer 0 do not divide into 3 runs of one size");
  // A map of three layers for a model of which layers 1 and 7 were measured.
  tree.write("c.json", R"({"num_experts": 2, "top_k": 1, "layers": {"1": [300, 300], "7": [200, 200]}})");
  EXPECT_TRUE(forecast("[[0, 1], [0, 1], [0, 1]]", 2).layers.empty());
  EXPECT_EQ(only_problem(), "has 3 layers; 2 were measured, among them layer 7");
}

TEST_F(HealthTrace, TokensOfRecordedRanks) {
  write_head(tree);
  Made m = make(12);
  tree.write("s0m0.safetensors", tensors(m).text());
  tree.write("records.jsonl", record(0, 0, R"(, "rank": 0)") + record(0, 0, R"(, "rank": 1)"));
  std::vector<InputProblem> problems;
  HealthOptions o;
  o.placement.map = read_expert_map(tree.write("map.json", "[0, 0, 0, 1, 1]"), 0, &problems);
  const HealthReport r = health_of(tree.path(), o);
  ASSERT_EQ(r.placement.layers.size(), 1u);
  EXPECT_TRUE(r.placement.recorded_sources);
  double here = 0, all = 0;  // of rank 0's tokens the choices of 0 to 2 stay, of rank 1's the others: together one of each
  for (int t = 0; t < kTokens; ++t) {
    for (int j = 0; j < kTopK && m.mask[static_cast<std::size_t>(t)]; ++j) all += 2, ++here;
  }
  EXPECT_DOUBLE_EQ(r.placement.layers[0].leaving, 1 - here / all);
  EXPECT_DOUBLE_EQ(r.placement.layers[0].bytes, all * (1 - here / all) * 64 * 2 * 2);
  // Only rank 0 has tokens: those that stay are the choices of 0 to 2.
  tree.write("records.jsonl", record(0, 0, R"(, "rank": 0)") + record(0, 1, R"(, "rank": 1, "training": false)"));
  tree.write("s0m1.safetensors", tensors(m).text());
  const LayerHealth l = health_of(tree.path(), o).layers.at(0);
  const double stay = static_cast<double>(l.load[0] + l.load[1] + l.load[2]) / static_cast<double>(l.choices);
  EXPECT_DOUBLE_EQ(health_of(tree.path(), o).placement.layers[0].leaving, 1 - stay);
}

/// Whether rules on loads may speak: zaya's router has a row for a choice that runs no expert, which is no idle expert.
TEST(ExpertHealth, ChoicesThatRunNoExpertAreNotJudged) {
  const auto judged = [](const std::string& model, int counted) {
    TempTree tree;
    tree.write("trace.json", R"({"format": "moe-audit-trace", "version": 1, "model": {)" + model + R"("top_k": 1}, "layers": [{"layer": 0, "num_experts": )" +
                                 std::to_string(counted) + "}]}");
    tree.write("records.jsonl", record(0, 0));
    std::vector<std::int64_t> counts(static_cast<std::size_t>(counted), 12);
    tree.write("s0m0.safetensors", SafetensorsText().add("layer.0.tokens_per_expert", "I64", {counted}, counts).text());
    std::vector<InputProblem> problems;
    const auto trace = open_trace(tree.path(), {}, &problems);
    EXPECT_TRUE(trace);
    FactSheet facts;
    const TensorStore none;
    std::vector<MeasureRecord> records;
    MeasureContext context{facts, none, none, none, none, 1, true, {}, records};
    context.trace = trace.get();
    measure_trace_loads.run(context);
    return facts.trace_loads.known();
  };
  EXPECT_TRUE(judged(R"("model_type": "mixtral", )", 9));
  EXPECT_TRUE(judged(R"("model_type": "zaya", "config": {"num_experts": 8}, )", 8));
  EXPECT_FALSE(judged(R"("model_type": "zaya", "config": {"num_experts": 8}, )", 9));
  EXPECT_FALSE(judged(R"("model_type": "zaya", )", 9));
  EXPECT_FALSE(judged(R"("model_type": "inkling_mm_model", "config": {"text_config": {"n_routed_experts": 8}}, )", 10));
  EXPECT_TRUE(judged(R"("model_type": "inkling_mm_model", "config": {"text_config": {"n_routed_experts": 8}}, )", 8));
}

}  // namespace
}  // namespace moeaudit
