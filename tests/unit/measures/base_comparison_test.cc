// Base against trained: fixtures against torch (fixtures/pairs/golden.json), the two layouts of experts, threads.
#include <cmath>
#include <map>
#include <set>

#include "audit/measures/weight_pairs.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_base_comparison;
extern const Measure measure_header_scan;
namespace {

using namespace test;

struct Pair {
  Bench bench;
  Pair(const std::string& base, const std::string& trained, int threads = 1, const std::string& hidden_states = {}) {
    nlohmann::json facts = model_facts(fixture(trained));
    const nlohmann::json config = read_json(fixture(trained) + "/config.json");
    facts["router.top_k"] = config.at("num_experts_per_tok");
    bench.facts = testing::facts_from_json(facts);
    const Family* family = find_family(bench.facts.family.value());
    bench.facts.routing.set(family->routing, Origin::kFamily, {});
    bench.base = open_weights(fixture(base));
    bench.model = open_weights(fixture(trained));
    if (!hidden_states.empty()) bench.hidden_states = open_weights(fixture(hidden_states), "hidden_states");
    bench.threads = threads;
    bench.run(measure_header_scan);
    bench.run(measure_base_comparison);
  }
};

/// Files say model.layers, modules model.language_model.layers; experts of the second set number behind the first in files, and are a
/// stack of their own in memory.
TEST(UnitNames, OtherNamesInFrontOfTheLayerAndASecondSetOfExperts) {
  const UnitNames names(find_family("ernie4_5_vl_moe"), 8);
  const std::string files = "model.layers.1.", memory = "model.language_model.layers.1.";
  std::set<std::string> keys;
  for (const char* tail : {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "mlp.shared_experts.up_proj.weight",
                           "mlp.shared_experts.gate_proj.weight", "post_attention_layernorm.weight"}) {
    EXPECT_EQ(names.key_of(files + tail), names.key_of(memory + tail));
    EXPECT_TRUE(keys.insert(names.key_of(files + tail)).second) << "the key of another: " << tail;
  }
  EXPECT_EQ(names.stack_keys(memory + "mlp.text_moe.experts.gate_up_proj", 3),
            (std::vector<std::string>{names.key_of(files + "mlp.experts.3.gate_proj.weight"), names.key_of(files + "mlp.experts.3.up_proj.weight")}));
  EXPECT_EQ(names.stack_keys(memory + "mlp.vision_moe.experts.gate_up_proj", 3),
            (std::vector<std::string>{names.key_of(files + "mlp.experts.11.gate_proj.weight"), names.key_of(files + "mlp.experts.11.up_proj.weight")}));
  EXPECT_EQ(names.part_of(files + "mlp.experts.7.up_proj.weight").part, Part::kRoutedExpert);
  EXPECT_EQ(names.part_of(files + "mlp.experts.8.up_proj.weight").part, Part::kOther);
}

/// Sums of n squares in another order than torch's: n u, twice (Higham, section 4.2), generously for n <= 1536.
constexpr double kSums = 4 * 1536 * 0x1p-53;

TEST(BaseComparison, AgreesWithTorchOnTheFixtures) {
  const nlohmann::json golden = read_json(fixture("pairs/golden.json"));
  for (const auto& [name, expected] : golden.items()) {
    const std::size_t space = name.find(' ');
    SCOPED_TRACE(name);
    Pair pair("pairs/" + name.substr(0, space), "pairs/" + name.substr(space + 1), 2, "pairs/hidden_states.safetensors");
    const BaseChanges& c = pair.bench.facts.base_changes.value();
    std::size_t experts = 0, routers = 0;
    for (std::size_t i = 0; i < c.part.size(); ++i) {
      const bool router = c.part[i] == Part::kRouter;
      if (!router && c.part[i] != Part::kRoutedExpert) continue;
      const std::string key = std::to_string(c.layer[i]) + (router ? "" : "." + std::to_string(c.expert[i]));
      const nlohmann::json& want = expected.at(router ? "routers" : "experts").at(key);
      EXPECT_EQ(c.changed[i], want[0].get<std::int64_t>()) << key;
      EXPECT_NEAR(c.base_norm[i], want[1].get<double>(), kSums * want[1].get<double>()) << key;
      EXPECT_NEAR(c.change_norm[i], want[2].get<double>(), kSums * want[2].get<double>()) << key;
      ++(router ? routers : experts);
    }
    EXPECT_EQ(experts, expected.at("experts").size());
    EXPECT_EQ(routers, expected.at("routers").size());
    const RoutingKept& r = pair.bench.facts.base_routing.value();
    ASSERT_EQ(r.layer.size(), routers);
    for (std::size_t i = 0; i < r.layer.size(); ++i) {
      const nlohmann::json& want = expected.at("kept").at(std::to_string(r.layer[i]));
      EXPECT_DOUBLE_EQ(r.kept[i], want[0].get<double>());
      EXPECT_DOUBLE_EQ(r.same[i], want[1].get<double>());
      EXPECT_EQ(r.tokens[i], 256);
      EXPECT_LE(r.low[i], r.kept[i]);
      EXPECT_GE(r.high[i], r.kept[i]);
      EXPECT_DOUBLE_EQ(r.chance[i], 2.0 / 8.0);
    }
  }
}

TEST(BaseComparison, LayoutsOfTheSameModelAreEqual) {
  for (const auto& [base, trained] : {std::pair{"models/mixtral-tf5", "models/mixtral-tf5-fused"}, {"models/mixtral-tf5-fused", "models/mixtral-tf5"},
                                      {"models/qwen3_moe-tf5", "models/qwen3_moe-tf5-fused"}}) {
    SCOPED_TRACE(base);
    Pair pair(base, trained);
    const TensorDiff& diff = pair.bench.facts.base_tensor_diff.value();
    EXPECT_TRUE(diff.missing.empty()) << diff.missing.front();
    EXPECT_TRUE(diff.unexpected.empty()) << diff.unexpected.front();
    std::int64_t elements = 0, stored = 0;
    for (std::size_t i = 0; i < pair.bench.model.size(); ++i) stored += pair.bench.model[i].elements();
    const BaseChanges& c = pair.bench.facts.base_changes.value();
    for (std::size_t i = 0; i < c.part.size(); ++i) {
      EXPECT_EQ(c.changed[i], 0) << c.tensor[i];
      EXPECT_EQ(c.change_norm[i], 0) << c.tensor[i];
      elements += c.elements[i];
    }
    EXPECT_EQ(elements, stored);
    for (double kept : pair.bench.facts.base_routing.value().kept) EXPECT_EQ(kept, 1);
  }
}

TEST(BaseComparison, AStackStoredTheOtherWayRoundIsTurned) {
  const std::string stack = "model.language_model.layers.0.mlp.experts.down_proj";
  WeightFile base, trained;
  base.add_f32(stack, {2, 2, 3}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  trained.add_f32(stack, {2, 3, 2}, {1, 4, 2, 5, 3, 6, 7, 10, 8, 11, 9, 13});  // the last was 12
  TempTree tree;
  tree.write("base/model.safetensors", base.text());
  tree.write("trained/model.safetensors", trained.text());
  for (const char* family : {"qwen3_vl_moe", "llama4_text"}) {  // of the second, one layout alone is known
    SCOPED_TRACE(family);
    Bench bench;
    bench.facts = testing::facts_from_json({{"model.family", family}, {"router.num_experts", 2}});
    bench.base = open_weights(tree.path("base"));
    bench.model = open_weights(tree.path("trained"));
    bench.run(measure_base_comparison);
    std::int64_t changed = 0, compared = 0;
    if (bench.facts.base_changes.known()) {
      for (std::int64_t n : bench.facts.base_changes.value().changed) changed += n;
      for (std::int64_t n : bench.facts.base_changes.value().elements) compared += n;
    }
    const bool turned = family == std::string("qwen3_vl_moe");
    EXPECT_EQ(compared, turned ? 12 : 0);
    EXPECT_EQ(changed, turned ? 1 : 0);
  }
}

TEST(BaseComparison, ThreadsDoNotShow) {
  Pair one("pairs/mixtral/base", "pairs/mixtral/full/checkpoint-3", 1), four("pairs/mixtral/base", "pairs/mixtral/full/checkpoint-3", 4);
  EXPECT_EQ(one.bench.facts.base_changes.value().change_norm, four.bench.facts.base_changes.value().change_norm);
  EXPECT_EQ(one.bench.facts.base_changes.value().along, four.bench.facts.base_changes.value().along);
  EXPECT_EQ(one.bench.facts.base_routing.value().kept, four.bench.facts.base_routing.value().kept);
}

TEST(BaseComparison, ASaveInFewerBitsIsNoChange) {
  WeightFile base, trained;
  base.add_f32("model.layers.0.mlp.gate.weight", {2, 2}, {1.0f, 1.0f + 0x1p-9f, -3.0f, 0.1f});
  const std::uint16_t bf16[4] = {0x3F80, 0x3F80, 0xC040, 0x3DCD};  // 1.0f + 2^-9 rounds to 1, 0.1f to 0x3DCD
  trained.add("model.layers.0.mlp.gate.weight", "BF16", {2, 2}, std::string(reinterpret_cast<const char*>(bf16), sizeof bf16));
  TempTree tree;
  tree.write("base/model.safetensors", base.text());
  tree.write("trained/model.safetensors", trained.text());
  Bench bench;
  bench.base = open_weights(tree.path("base"));
  bench.model = open_weights(tree.path("trained"));
  bench.run(measure_base_comparison);
  const BaseChanges& c = bench.facts.base_changes.value();
  ASSERT_EQ(c.part.size(), 1u);
  EXPECT_EQ(c.changed[0], 0);
  EXPECT_EQ(bench.facts.base_dtypes.value().base[0], DType::kF32);
  EXPECT_EQ(bench.facts.base_dtypes.value().trained[0], DType::kBF16);
}

TEST(BaseComparison, BiasesOfDeepseek) {
  const auto biases = [](const char* trained) { return Pair("pairs/deepseek_v3/base", trained).bench.facts.base_biases.value(); };
  BiasChanges b = biases("pairs/deepseek_v3/bias-rounded");
  ASSERT_EQ(b.layer, std::vector<int>{1});
  EXPECT_EQ(b.rounded_to[0], "BF16");
  EXPECT_EQ(b.non_zero[0], 8);
  b = biases("pairs/deepseek_v3/bias-zeroed");
  EXPECT_EQ(b.base_non_zero[0], 8);
  EXPECT_EQ(b.non_zero[0], 0);
  EXPECT_EQ(b.rounded_to[0], "");
  b = biases("pairs/deepseek_v3/full/checkpoint-3");
  EXPECT_EQ(b.changed[0], 0);
}

TEST(BaseComparison, TransposedMatricesAreReadAsTheyAre) {
  WeightFile file;
  file.add_f32("x", {2, 3}, {1, 2, 3, 4, 5, 6});
  TempTree tree;
  tree.write("model.safetensors", file.text());
  const TensorStore store = open_weights(tree.path("model.safetensors"));
  const Matrix m{&store[0], 0, 3, 2, 1, 3};  // its transpose
  std::vector<double> out(4);
  ASSERT_TRUE(read_rows(m, 1, 2, out.data()));
  EXPECT_EQ(out, (std::vector<double>{2, 5, 3, 6}));
}

}  // namespace
}  // namespace moeaudit
