// ms-swift: args.json as its SftArguments.save_args() writes it (every argument, resolved), and YAML with the same names.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "audit/inputs/inputs.h"
#include "audit/inputs/readers.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using Json = nlohmann::json;
using test::fixture;
using test::TempTree;

/// The arguments that matter here, with the defaults of ms-swift 4.4.3 and the order of its classes.
Json args_json() {
  return Json::parse(R"({
    "output_dir": "out/v0-20260101-000000", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
    "learning_rate": 0.0001, "bf16": true, "fp16": false, "max_grad_norm": 1.0, "warmup_ratio": 0.05, "max_steps": -1,
    "gradient_checkpointing": true, "gradient_checkpointing_kwargs": null, "deepspeed": null, "fsdp": [], "fsdp_config": null,
    "average_tokens_across_devices": true, "label_smoothing_factor": 0.0, "router_aux_loss_coef": 0.0,
    "tuner_type": "lora", "train_type": null, "target_modules": ["all-linear"], "target_regex": null, "target_parameters": null,
    "modules_to_save": [], "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "use_rslora": false,
    "freeze_parameters": [], "trainable_parameters": [], "freeze_parameters_ratio": 0.0,
    "model": "Qwen/Qwen3-30B-A3B", "model_type": "qwen3_moe", "model_revision": null, "torch_dtype": "bfloat16", "max_length": 2048,
    "quant_method": null, "quant_bits": null, "bnb_4bit_quant_type": "nf4", "swift_version": "4.4.3"})");
}

LoadedRun load_swift(const std::string& path, const std::string& model = "qwen3_moe-tf4",
                     std::vector<std::pair<std::string, std::string>> assume = {{"transformers", "4.57.6"}}) {
  RunOptions options;
  options.configs = {path};
  options.models = {fixture("models/" + model)};
  options.assume = std::move(assume);
  LoadedRun run = std::move(load_runs(options).at(0));
  for (const InputProblem& p : run.problems) EXPECT_FALSE(p.fatal) << p.what;
  return run;
}

TEST(MsSwift, ArgsJson) {
  TempTree tree;
  const LoadedRun run = load_swift(tree.write("args.json", args_json().dump(2)));
  const FactSheet& f = run.facts;
  EXPECT_EQ(f.framework.value(), "ms-swift");
  EXPECT_EQ(f.trainer.value(), "Seq2SeqTrainer");
  EXPECT_EQ(to_text(f.ms_swift.value()), "4.4.3");
  EXPECT_EQ(f.accumulation.value(), 16);
  EXPECT_EQ(f.sequence_length.value(), 2048);
  EXPECT_EQ(f.precision.value(), Precision::kAutocastBf16);
  EXPECT_EQ(f.load_dtype.value(), DType::kBF16);
  EXPECT_EQ(f.adapter_rank.value(), 8);
  EXPECT_EQ(f.adapter_alpha.value(), 32);
  EXPECT_EQ(f.target_modules.value(), std::vector<std::string>{"all-linear"});
  EXPECT_FALSE(f.deepspeed.value());
  EXPECT_FALSE(f.fsdp.value());
  EXPECT_TRUE(f.gradient_checkpointing.value());
  // It wrote 0 over the checkpoint's coefficient, and asks for no logits.
  EXPECT_FALSE(f.aux_flag.value());
  EXPECT_EQ(f.aux_coefficient.value(), 0.0);
  EXPECT_FALSE(f.aux_added.value());
}

TEST(MsSwift, BalanceLossByRelease) {
  TempTree tree;
  Json args = args_json();
  args["router_aux_loss_coef"] = 0.001;
  const LoadedRun on = load_swift(tree.write("args.json", args.dump(2)));
  EXPECT_TRUE(on.facts.aux_flag.value());
  EXPECT_EQ(on.facts.aux_coefficient.value(), 0.001);
  EXPECT_TRUE(on.facts.aux_added.value());
  args["label_smoothing_factor"] = 0.1;  // it adds the balance loss to the smoothed one itself
  EXPECT_TRUE(load_swift(tree.write("args.json", args.dump(2))).facts.aux_added.value());
  const std::string yaml = "model: x\ntuner_type: full\n";
  EXPECT_EQ(load_swift(tree.write("a.yaml", yaml), "qwen3_moe-tf4", {{"ms-swift", "3.9.0"}}).facts.aux_coefficient.value(), 0.0);
  EXPECT_EQ(load_swift(tree.write("a.yaml", yaml), "qwen3_moe-tf4", {{"ms-swift", "3.6.0"}}).facts.aux_coefficient.value(), 0.001);
  args = args_json();
  args["rlhf_type"] = "dpo";
  EXPECT_EQ(load_swift(tree.write("args.json", args.dump(2))).facts.trainer.value(), "DPOTrainer");
  args["tensor_model_parallel_size"] = 2;
  EXPECT_EQ(load_swift(tree.write("args.json", args.dump(2))).facts.trainer.value(), "Megatron");
}

TEST(MsSwift, ItsSkipListForBitsAndBytes) {
  TempTree tree;
  Json args = args_json();
  args["quant_method"] = "bnb";
  args["quant_bits"] = 4;
  const LoadedRun run = load_swift(tree.write("args.json", args.dump(2)));
  EXPECT_EQ(run.facts.quant_method.value(), "bitsandbytes nf4");
  EXPECT_EQ(run.facts.quant_skip.value(), (std::vector<std::string>{"mlp.gate", "mlp.shared_expert_gate", "lm_head"}));
  EXPECT_TRUE(run.facts.router_quant_claimed_skipped.value());
  args["swift_version"] = "3.6.4";
  EXPECT_FALSE(load_swift(tree.write("args.json", args.dump(2))).facts.quant_skip.known());
}

TEST(MsSwift, DeepSpeedDictAndPresets) {
  TempTree tree;
  Json args = args_json();
  args["deepspeed"] = {{"zero_optimization", {{"stage", 3}}}, {"bf16", {{"enabled", "auto"}}}, {"gradient_accumulation_steps", "auto"}};
  const LoadedRun run = load_swift(tree.write("args.json", args.dump(2)));
  EXPECT_EQ(run.facts.zero_stage.value(), 3);
  EXPECT_EQ(run.facts.precision.value(), Precision::kPureBf16);
  EXPECT_TRUE(run.facts.moe_block_is_leaf.value());  // its own list has qwen3_moe since 3.9.0
  const LoadedRun preset = load_swift(tree.write("a.yaml", "model: x\ntrain_type: full\nbf16: true\ndeepspeed: zero2_offload\n"));
  EXPECT_TRUE(preset.facts.deepspeed.value());
  EXPECT_EQ(preset.facts.zero_stage.value(), 2);
}

TEST(MsSwift, Targets) {
  TempTree tree;
  auto targets = [&](const std::string& yaml) {
    const LoadedRun run = load_swift(tree.write("a.yaml", "model: x\ntuner_type: lora\n" + yaml));
    return run.facts.target_modules.known() ? run.facts.target_modules.value() : std::vector<std::string>{"?"};
  };
  using List = std::vector<std::string>;
  EXPECT_EQ(targets(""), List{"all-linear"});
  EXPECT_EQ(targets("target_modules: [q_proj, v_proj]\n"), (List{"q_proj", "v_proj"}));
  EXPECT_EQ(targets("target_regex: '.*q_proj'\n"), List{".*q_proj"});
  EXPECT_EQ(targets("target_modules: [all-linear, all-embedding]\n"), List{"?"});
  const LoadedRun full = load_swift(tree.write("a.yaml", "model: x\ntuner_type: full\nlora_rank: 4\n"));
  EXPECT_FALSE(full.facts.has_adapter.value());
  EXPECT_EQ(full.facts.method.value(), Method::kFull);
}

TEST(MsSwift, WrongTypes) {
  TempTree tree;
  for (const char* text : {R"({"swift_version": 4, "model": [], "tuner_type": {"a": 1}, "deepspeed": [1], "quant_method": 3})",
                           R"({"swift_version": "four", "target_modules": 7, "lora_rank": "eight", "router_aux_loss_coef": []})",
                           R"({"swift_version": "4.4.3", "quant_method": "bnb", "quant_bits": {"x": 1}, "rlhf_type": []})"}) {
    const LoadedRun run = load_swift(tree.write("args.json", text));
    EXPECT_EQ(run.facts.framework.value(), "ms-swift") << text;
  }
}

}  // namespace
}  // namespace moeaudit
