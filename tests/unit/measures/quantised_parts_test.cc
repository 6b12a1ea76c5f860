// What is quantised, against what transformers' own functions replaced (fixtures/quantisation/modules.json), and against the
// tensors of a checkpoint.
#include <map>

#include "audit/inputs/inputs.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_quantised_parts;
namespace {

using namespace test;
using nlohmann::json;

/// The folder's config.json with a quantization_config, and weights if the tree has any.
Bench quantised(const std::string& folder, const std::string& transformers, const std::string& config_yaml = "") {
  RunOptions options;
  options.models = {folder};
  if (!config_yaml.empty()) options.configs = {config_yaml};
  options.assume = {{"transformers", transformers}};
  LoadedRun run = std::move(load_runs(options).at(0));
  for (const InputProblem& p : run.problems) EXPECT_FALSE(p.fatal) << p.file << ": " << p.what;
  Bench bench;
  bench.facts = std::move(run.facts);
  bench.model = std::move(run.model);
  bench.run(measure_quantised_parts);
  return bench;
}

std::string answer(const Fact<bool>& fact) { return !fact.known() ? "?" : fact.value() ? "yes" : "no"; }

json with_quantisation(const std::string& model, json quantisation) {
  json config = read_json(fixture("models/" + model + "/config.json"));
  config["quantization_config"] = std::move(quantisation);
  return config;
}

TEST(QuantisedParts, AsTransformersReplacesThem) {
  const json rows = read_json(fixture("quantisation/modules.json"));
  std::map<std::string, int> everything;  // experts replaced without a skip list
  for (const json& row : rows) {
    if (row["skip"].is_null()) everything[row["transformers"].dump() + row["model"].dump() + row["method"].dump()] = row["replaced"]["experts"];
  }
  int compared = 0, routers = 0;
  for (const json& row : rows) {
    TempTree tree;
    const bool bnb = row["method"] == "bitsandbytes";
    json quantisation = {{"quant_method", row["method"]}};
    if (bnb) quantisation["load_in_4bit"] = true;
    quantisation[bnb ? "llm_int8_skip_modules" : "modules_to_not_convert"] = row["skip"];
    tree.write("config.json", with_quantisation(row["model"], quantisation).dump(1));
    const Bench bench = quantised(tree.path(), row["transformers"]);
    const std::string where = row["transformers"].get<std::string>() + " " + row["model"].get<std::string>() + " " +
                              row["method"].get<std::string>() + " " + row["skip"].dump();
    const int router = row["replaced"]["router"], experts = row["replaced"]["experts"];
    EXPECT_EQ(answer(bench.facts.router_quantised), router > 0 ? "yes" : "no") << where;
    const int all = everything[row["transformers"].dump() + row["model"].dump() + row["method"].dump()];
    EXPECT_EQ(answer(bench.facts.experts_quantised), experts == 0 ? "no" : experts == all ? "yes" : "?") << where;
    routers += router > 0;
    ++compared;
  }
  EXPECT_GE(compared, 250);
  EXPECT_GE(routers, 30);
}

TEST(QuantisedParts, ConfigsThatTheRealClassesWrote) {
  struct Case {
    const char *name, *method;
    int bits;  // -1 unknown
    const char *router, *experts, *claimed;
  };
  const Case cases[] = {{"bnb-nf4", "bitsandbytes nf4", 4, "no", "yes", "yes"},
                        {"bnb-int8", "bitsandbytes int8", 8, "yes", "yes", "no"},
                        {"awq", "awq", 4, "no", "yes", "yes"},
                        {"fp8", "fp8", 8, "no", "yes", "yes"},
                        {"gptq", "gptq", 4, "?", "?", "no"},  // only the tensors tell
                        {"mxfp4", "mxfp4", 4, "no", "yes", "yes"},
                        {"compressed-int4", "compressed-tensors", 4, "no", "yes", "yes"}};
  for (const Case& c : cases) {
    TempTree tree;
    tree.copy(fixture("quantisation/configs/" + std::string(c.name) + ".json"), "config.json");
    const Bench bench = quantised(tree.path(), "4.57.6");
    EXPECT_EQ(bench.facts.quant_method.value(), c.method) << c.name;
    EXPECT_EQ(bench.facts.quant_bits.known() ? bench.facts.quant_bits.value() : -1, c.bits) << c.name;
    EXPECT_EQ(answer(bench.facts.router_quantised), c.router) << c.name;
    EXPECT_EQ(answer(bench.facts.experts_quantised), c.experts) << c.name;
    EXPECT_EQ(answer(bench.facts.router_quant_claimed_skipped), c.claimed) << c.name;
  }
}

TEST(QuantisedParts, TensorsOutrankTheConfig) {
  // GPTQ: the gate kept its weight, the experts have packed ones.
  TempTree tree;
  json config = with_quantisation("mixtral-tf4", {{"quant_method", "gptq"}, {"bits", 4}});
  config["num_hidden_layers"] = 1;
  tree.write("config.json", config.dump(1));
  WeightFile file;
  const std::string moe = "model.layers.0.block_sparse_moe.";
  file.add_zeros(moe + "gate.weight", {8, 64}, "BF16");
  for (int e = 0; e < 8; ++e) {
    for (const char* w : {"w1", "w2", "w3"}) file.add_zeros(moe + "experts." + std::to_string(e) + "." + w + ".qweight", {4, 4});
  }
  tree.write("model.safetensors", file.text());
  const Bench kept = quantised(tree.path(), "4.57.6");
  EXPECT_EQ(answer(kept.facts.router_quantised), "no");
  EXPECT_EQ(answer(kept.facts.experts_quantised), "yes");
  EXPECT_EQ(kept.facts.router_quantised.origin(), Origin::kMeasured);
  WeightFile packed;
  packed.add_zeros(moe + "gate.qweight", {4, 4});
  tree.write("model.safetensors", packed.text());
  EXPECT_EQ(answer(quantised(tree.path(), "4.57.6").facts.router_quantised), "yes");
}

TEST(QuantisedParts, LoadedInFourBitsByTheTrainer) {
  TempTree tree;
  const std::string axolotl = "base_model: x\nadapter: qlora\nload_in_4bit: true\nmicro_batch_size: 1\n";
  auto router = [&](const std::string& model, const std::string& transformers, const std::string& more) {
    return answer(quantised(fixture("models/" + model), transformers, tree.write("a.yml", axolotl + more)).facts.router_quantised);
  };
  EXPECT_EQ(router("mixtral-tf4", "4.57.6", ""), "yes");
  EXPECT_EQ(router("mixtral-tf4", "4.57.6", "bnb_config_kwargs: {llm_int8_skip_modules: [gate, lm_head]}\n"), "no");
  EXPECT_EQ(router("qwen3_moe-tf4", "4.57.6", "bnb_config_kwargs: {llm_int8_skip_modules: [mlp.gate, lm_head]}\n"), "yes");
  EXPECT_EQ(router("mixtral-tf4", "5.0.0", ""), "no");
  const std::string stacks = "quantize_moe_experts: true\n";
  const Bench bench = quantised(fixture("models/qwen3_moe-tf5"), "5.23.0", tree.write("a.yml", axolotl + stacks));
  EXPECT_EQ(answer(bench.facts.experts_quantised), "yes");
  EXPECT_EQ(answer(quantised(fixture("models/qwen3_moe-tf5"), "5.23.0", tree.write("a.yml", axolotl)).facts.experts_quantised), "no");
}

TEST(QuantisedParts, FullPrecisionByTheTrainer) {
  TempTree tree;
  json config = read_json(fixture("quantisation/configs/mxfp4.json"));
  tree.write("config.json", config.dump(1));
  auto bits = [&](const std::string& yaml, const std::vector<std::pair<std::string, std::string>>& assume) {
    RunOptions options;
    options.models = {tree.path()};
    options.configs = {tree.write("c.yaml", yaml)};
    options.assume = assume;
    const LoadedRun run = std::move(load_runs(options).at(0));
    return run.facts.quant_bits.known() ? run.facts.quant_bits.value() : -1;
  };
  const std::string factory = "model_name_or_path: x\nstage: sft\nfinetuning_type: lora\n";
  EXPECT_EQ(bits(factory, {{"llamafactory", "0.9.4"}}), 0);
  EXPECT_EQ(bits(factory, {{"llamafactory", "0.9.3"}}), 4);
  EXPECT_EQ(bits(factory, {}), -1);
  const std::string axolotl = "base_model: x\nadapter: lora\nmicro_batch_size: 1\nmodel_quantization_config: Mxfp4Config\n";
  EXPECT_EQ(bits(axolotl, {}), 4);
  EXPECT_EQ(bits(axolotl + "model_quantization_config_kwargs: {dequantize: true}\n", {}), 0);
}

TEST(QuantisedParts, HostileSkipLists) {
  TempTree tree;
  for (const char* list : {R"(["(((("])", R"(["(a+)+$", "gate"])", R"([1, null, {"a": 2}])", R"({"a": 1})", R"("gate")", "[]"}) {
    for (const char* version : {"4.57.6", "5.23.0"}) {
      tree.write("config.json", with_quantisation("qwen3_moe-tf4", json{{"quant_method", "fp8"},
                                                                        {"modules_to_not_convert", json::parse(list)}}).dump(1));
      const Bench bench = quantised(tree.path(), version);
      EXPECT_EQ(bench.facts.quant_bits.value(), 8) << list;
    }
  }
}

}  // namespace
}  // namespace moeaudit
