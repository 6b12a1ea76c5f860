// Shapes of LoRA matrices: the stacks of experts as four releases of PEFT make them (fixtures/peft/layout.json, written by
// fixtures/make/adapter_layout.py), adapters that one release wrote and another loaded, and files spoilt here.
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_adapter_layout;
namespace {

using namespace test;
using Faults = std::vector<AdapterFault>;
using Shape = std::vector<std::int64_t>;

const std::string kExperts = "base_model.model.model.layers.0.mlp.experts.";

Bench judge(const nlohmann::json& facts, TensorStore adapter, TensorStore model = {}) {
  Bench bench;
  bench.facts = testing::facts_from_json(facts);
  bench.adapter = std::move(adapter);
  bench.model = std::move(model);
  bench.run(measure_adapter_layout);
  return bench;
}

TensorStore pair_of(const TempTree& tree, const std::string& module, const Shape& a, const Shape& b) {
  WeightFile w;
  w.add_zeros(module + "lora_A.weight", a);
  w.add_zeros(module + "lora_B.weight", b);
  return open_weights(tree.write("adapter_model.safetensors", w.text()), "adapter_model");
}

nlohmann::json small_model(const std::string& family, std::int64_t experts, std::int64_t width, std::int64_t rank) {
  return {{"model.family", family}, {"model.num_layers", 1}, {"model.moe_layers", {0}}, {"router.num_experts", experts},
          {"model.hidden_size", 64}, {"model.expert_width", width}, {"adapter.rank", rank}};
}

TEST(AdapterLayout, StacksAsEachReleaseMakesThem) {
  std::size_t stacks = 0, exchanged = 0;
  for (const auto& row : read_json(fixture("peft/layout.json"))) {
    if (!row.contains("stacks")) continue;
    const std::string family = row["family"], transformers = row["transformers"], peft = row["peft"];
    nlohmann::json facts = small_model(family, 2, family == "qwen2_moe" ? 16 : 32, 3);
    facts["versions.transformers"] = "==" + transformers;
    facts["versions.peft"] = "==" + peft;
    for (const auto& [name, shapes] : row["stacks"].items()) {
      SCOPED_TRACE(family + " " + name + " transformers " + transformers + " peft " + peft);
      const Shape a = shapes["A"], b = shapes["B"];
      const TempTree tree, other;
      const Bench right = judge(facts, pair_of(tree, kExperts, a, b));
      EXPECT_EQ(right.facts.adapter_layout.value().fault, Faults{});
      EXPECT_EQ(right.facts.adapter_layout.value().judged, 1);
      ++stacks;
      if (a[1] == b[0]) continue;
      const Bench wrong = judge(facts, pair_of(other, kExperts, {a[0], b[0]}, {a[1], b[1]}));
      EXPECT_EQ(wrong.facts.adapter_layout.value().fault, Faults{AdapterFault::kStackOrder});
      ++exchanged;
    }
  }
  EXPECT_EQ(stacks, 28u);     // four releases x three families, and gpt_oss on transformers 4 with two; two stacks each
  EXPECT_EQ(exchanged, 18u);  // Mixtral's and gpt_oss's gate_up_proj are square here
}

/// What the real library did with a file is what the measure says: an error, or a load that is silently wrong.
TEST(AdapterLayout, LoadsOfTheRealLibrary) {
  std::size_t loads = 0;
  for (const auto& row : read_json(fixture("peft/layout.json"))) {
    if (!row.contains("adapter")) continue;
    const std::string name = row["adapter"], peft = row["peft"];
    SCOPED_TRACE(name + " in " + peft);
    const nlohmann::json config = read_json(fixture("adapters/" + name + "/adapter_config.json"));
    const std::string base = config["base_model_name_or_path"];
    nlohmann::json facts = model_facts(fixture("adapters/" + name) + "/" + base);
    facts["versions.transformers"] = "==" + std::string(row["transformers"]);
    const nlohmann::json writer = {{"value", "==" + std::string(config["peft_version"])}, {"role", "adapter_config"}};
    facts["versions.peft"] = {{"value", "==" + peft}, {"role", "command_line"}, {"shadowed", nlohmann::json::array({writer})}};
    facts["adapter.rank"] = config["r"];
    const Bench bench = judge(facts, open_weights(fixture("adapters/" + name), "adapter_model"));
    const AdapterLayout& t = bench.facts.adapter_layout.value();
    const bool written_by_it = config["peft_version"] == row["peft"];
    EXPECT_EQ(t.module.empty(), written_by_it);
    EXPECT_EQ(t.loads_silently, !written_by_it && row["error"].is_null());
    ++loads;
  }
  EXPECT_EQ(loads, 6u);
}

TEST(AdapterLayout, HalfPairsAndOtherRanks) {
  const TempTree tree;
  WeightFile w;
  const std::string at = "base_model.model.model.layers.0.self_attn.";
  w.add_zeros(at + "q_proj.lora_A.weight", {4, 64});
  w.add_zeros(at + "k_proj.lora_A.weight", {4, 64});
  w.add_zeros(at + "k_proj.lora_B.weight", {32, 8});
  w.add_zeros(at + "v_proj.lora_A.weight", {6, 64});
  w.add_zeros(at + "v_proj.lora_B.weight", {32, 6});
  w.add_zeros(at + "o_proj.lora_A.weight", {4, 64});
  w.add_zeros(at + "o_proj.lora_B.weight", {64, 4});
  nlohmann::json facts = small_model("mixtral", 8, 32, 4);
  const Bench bench = judge(facts, open_weights(tree.write("adapter_model.safetensors", w.text()), "adapter_model"));
  const AdapterLayout& t = bench.facts.adapter_layout.value();
  EXPECT_EQ(t.fault, (Faults{AdapterFault::kMisfit, AdapterFault::kNoPair, AdapterFault::kRank}));
  EXPECT_EQ(t.module, (std::vector<std::string>{"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}));
  EXPECT_EQ(t.found[1], "A [4, 64], B missing");
  EXPECT_EQ(t.expected[2], "A [4, 64], B [32, 4]");
  EXPECT_EQ(t.found_total, 4);
  facts["adapter.rank_pattern"] = nlohmann::json::array({"v_proj=6"});
  const Bench listed = judge(facts, open_weights(tree.path("adapter_model.safetensors"), "adapter_model"));
  EXPECT_EQ(listed.facts.adapter_layout.value().fault, (Faults{AdapterFault::kMisfit, AdapterFault::kNoPair}));
}

TEST(AdapterLayout, AnotherBaseModel) {
  const TempTree tree, weights, stack;
  const std::string name = "model.layers.0.block_sparse_moe.experts.3.w2";
  // w2 is [H, I] = [64, 32] by the family; this adapter is of a model of width 48
  const Bench family = judge(small_model("mixtral", 8, 32, 4), pair_of(tree, "base_model.model." + name + ".", {4, 48}, {64, 4}));
  EXPECT_EQ(family.facts.adapter_layout.value().fault, Faults{AdapterFault::kBaseShape});
  EXPECT_EQ(family.facts.adapter_layout.value().expected.front(), "A [4, 32], B [64, 4]");
  // attention has no sizes in the family: the weights at hand have
  WeightFile w;
  w.add_zeros("model.layers.0.self_attn.q_proj.weight", {64, 96});
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.";
  const Bench measured = judge(small_model("mixtral", 8, 32, 4), pair_of(tree, q, {4, 64}, {64, 4}),
                               open_weights(weights.write("model.safetensors", w.text())));
  EXPECT_EQ(measured.facts.adapter_layout.value().expected, std::vector<std::string>{"A [4, 96], B [64, 4]"});
  // a stack whose A has r rows for all experts together, not E x r
  const Bench shared = judge(small_model("qwen2_moe", 8, 16, 4), pair_of(stack, kExperts, {4, 64}, {32, 4}));
  EXPECT_EQ(shared.facts.adapter_layout.value().fault, Faults{AdapterFault::kBaseShape});
  EXPECT_NE(shared.facts.adapter_layout.value().expected.front().find("gate_up_proj A [32, 64], B [32, 32]"), std::string::npos)
      << shared.facts.adapter_layout.value().expected.front();
}

TEST(AdapterLayout, ReleasesThatDoNotAgreeJudgeNothing) {
  const TempTree tree;
  nlohmann::json facts = small_model("qwen2_moe", 8, 16, 2);
  facts["versions.transformers"] = "==5.23.0";
  for (const char* peft : {">=0.18,<0.20", ">=0.17"}) {
    facts["versions.peft"] = peft;
    const Bench bench = judge(facts, pair_of(tree, kExperts, {16, 32}, {64, 16}));
    EXPECT_EQ(bench.facts.adapter_layout.value().fault, Faults{}) << peft;
  }
  facts["versions.peft"] = ">=0.19.1";
  const Bench bench = judge(facts, pair_of(tree, kExperts, {16, 32}, {64, 16}));
  EXPECT_EQ(bench.facts.adapter_layout.value().fault, Faults{AdapterFault::kStackOrder});
}

}  // namespace
}  // namespace moeaudit
