// DeepSpeed, Accelerate and FSDP: what their own libraries wrote, read; and what follows for the run.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "audit/inputs/inputs.h"
#include "audit/inputs/readers.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using Json = nlohmann::json;
using test::fixture;

LoadedRun load_configs(const std::vector<std::string>& configs,
                       const std::vector<std::pair<std::string, std::string>>& assume = {}) {
  RunOptions options;
  options.configs = configs;
  options.models = {fixture("models/mixtral-tf4")};
  options.assume = assume;
  return std::move(load_runs(options).at(0));
}

std::string fatal(const LoadedRun& run) {
  for (const InputProblem& p : run.problems) {
    if (p.fatal) return p.file + ": " + p.what;
  }
  return {};
}

std::string train_yaml(const std::string& more) {
  return "model_name_or_path: x\noutput_dir: out\nper_device_train_batch_size: 2\n" + more;
}

// ---- DeepSpeed -----------------------------------------------------------------------------------------------------

TEST(DeepSpeed, ConflictsAreThoseThatTransformersLists) {
  std::ifstream in(fixture("engines/deepspeed/conflicts.json"));
  const Json rows = Json::parse(in);
  int refused = 0;
  for (const Json& row : rows) {
    test::TempTree tree;
    Json training = row["training"];
    training["deepspeed"] = "ds.json";
    training["output_dir"] = "out";
    training["learning_rate"] = 1e-5;
    tree.write("ds.json", row["deepspeed"].dump(1));
    const LoadedRun run = load_configs({tree.write("train.json", training.dump(1))});
    ASSERT_EQ(fatal(run), "");
    ASSERT_TRUE(run.facts.setting_conflicts.known()) << row["name"];
    std::set<std::string> found;
    for (const SettingConflict& c : run.facts.setting_conflicts.value()) found.insert(c.setting);
    EXPECT_EQ(found, row["mismatches"].get<std::set<std::string>>()) << row["name"] << " " << row["transformers"];
    EXPECT_EQ(!found.empty(), row["refuses"].get<bool>()) << row["name"];
    refused += row["refuses"].get<bool>();
  }
  EXPECT_GE(refused, 10);
}

TEST(DeepSpeed, NoAutocastUnderIt) {
  test::TempTree tree;
  tree.write("ds.json", R"({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}})");
  const LoadedRun run = load_configs({tree.write("train.yaml", train_yaml("bf16: true\ndeepspeed: ds.json\n"))});
  EXPECT_TRUE(run.facts.deepspeed.value());
  EXPECT_EQ(run.facts.zero_stage.value(), 3);
  EXPECT_EQ(run.facts.precision.value(), Precision::kPureBf16);
  EXPECT_EQ(run.facts.zero_stage.source().line, 1);
  EXPECT_EQ(run.facts.zero_stage.source().file, tree.path("ds.json"));
  const LoadedRun plain = load_configs({tree.write("plain.yaml", train_yaml("bf16: true\n"))});
  EXPECT_EQ(plain.facts.precision.value(), Precision::kAutocastBf16);
  EXPECT_FALSE(plain.facts.deepspeed.value());
  const LoadedRun autocast = load_configs({tree.write("amp.yaml", train_yaml(
      "deepspeed: {torch_autocast: {enabled: true, dtype: bfloat16}, zero_optimization: {stage: 1}}\n"))});
  EXPECT_EQ(autocast.facts.precision.value(), Precision::kAutocastBf16);
  EXPECT_EQ(autocast.facts.zero_stage.source().key, "deepspeed.zero_optimization.stage");
}

TEST(DeepSpeed, NamedFileThatIsNotHere) {
  test::TempTree tree;
  const LoadedRun run = load_configs({tree.write("train.yaml", train_yaml("deepspeed: examples/ds_z3.json\n"))});
  EXPECT_EQ(fatal(run), "");
  EXPECT_TRUE(run.facts.deepspeed.value());
  EXPECT_FALSE(run.facts.zero_stage.known());
  EXPECT_NE(run.facts.zero_stage.why_unknown().find("examples/ds_z3.json"), std::string::npos);
  EXPECT_FALSE(run.facts.setting_conflicts.known());
}

TEST(DeepSpeed, TrainingArgsHoldWhatRan) {
  const LoadedRun run = load_configs({fixture("engines/deepspeed/training_args.bin")}, {{"deepspeed", "0.18.9"}});
  EXPECT_EQ(fatal(run), "");
  EXPECT_TRUE(run.facts.deepspeed.value());
  EXPECT_EQ(run.facts.zero_stage.value(), 3);
  EXPECT_EQ(run.facts.zero_stage.source().role, Role::kTrainingArguments);
  EXPECT_EQ(run.facts.precision.value(), Precision::kPureBf16);
  EXPECT_EQ(run.facts.zero3_leaf_modules.value(), std::vector<std::string>{"MixtralSparseMoeBlock"});
  EXPECT_TRUE(run.facts.moe_block_is_leaf.value());
  EXPECT_TRUE(run.facts.setting_conflicts.value().empty());
}

TEST(DeepSpeed, LeafModulesByWhoNamesThem) {
  test::TempTree tree;
  const std::string zero3 = R"("zero_optimization": {"stage": 3)";
  auto leaf = [&](const std::string& json, const std::string& training,
                  std::vector<std::pair<std::string, std::string>> assume) {
    tree.write("ds.json", json);
    const std::string path = tree.write("train.yaml", training + "deepspeed: ds.json\n");
    const LoadedRun run = load_configs({path}, assume);
    if (!run.facts.moe_block_is_leaf.known()) return std::string("?");
    return std::string(run.facts.moe_block_is_leaf.value() ? "yes" : "no");
  };
  const std::string plain = train_yaml("");
  EXPECT_EQ(leaf("{" + zero3 + "}}", plain, {{"deepspeed", "0.17.6"}}), "no");
  EXPECT_EQ(leaf("{" + zero3 + "}}", plain, {{"deepspeed", "0.18.0"}}), "yes");
  EXPECT_EQ(leaf("{" + zero3 + "}}", plain, {}), "?");
  const std::string other = "{" + zero3 + R"(, "leaf_module": {"classes": ["OlmoeSparseMoeBlock"]}}})";
  EXPECT_EQ(leaf(other, plain, {{"deepspeed", "0.18.0"}}), "no");  // a list replaces DeepSpeed's own
  const std::string own = "{" + zero3 + R"(, "leaf_module": {"classes": ["a.b.MixtralSparseMoeBlock"]}}})";
  EXPECT_EQ(leaf(own, plain, {{"deepspeed", "0.18.0"}}), "yes");
  EXPECT_EQ(leaf(own, plain, {{"deepspeed", "0.17.6"}}), "no");  // it does not know the key
  EXPECT_EQ(leaf("{" + zero3 + R"(, "leaf_module": {"names": ["model.layers.0"]}}})", plain, {{"deepspeed", "0.19.0"}}), "yes");
  EXPECT_EQ(leaf("{" + zero3 + "}}", plain + "finetuning_type: full\nstage: sft\n", {{"llamafactory", "0.9.4"}}), "yes");
  EXPECT_EQ(leaf(R"({"zero_optimization": {"stage": 2}})", plain, {{"deepspeed", "0.18.0"}}), "?");
}

TEST(DeepSpeed, WrongTypesAreUnread) {
  test::TempTree tree;
  for (const char* json : {R"({"zero_optimization": true, "bf16": "yes", "fp16": []})", R"({"zero_optimization": {"stage": "three"}})",
                           R"({"zero_optimization": {"stage": 9, "leaf_module": 4}})",
                           R"({"zero_optimization": {"leaf_module": {"classes": {"a": 1}}}, "gradient_accumulation_steps": {}})",
                           R"({"steps_per_print": 10})"}) {
    tree.write("ds.json", json);
    const LoadedRun run = load_configs({tree.write("train.yaml", train_yaml("bf16: true\ndeepspeed: ds.json\n"))});
    EXPECT_EQ(fatal(run), "") << json;
    EXPECT_TRUE(!run.facts.zero_stage.known() || run.facts.zero_stage.value() == 0) << json;
    EXPECT_TRUE(run.facts.setting_conflicts.value().empty()) << json;
  }
  tree.write("list.json", "[1, 2]");
  const LoadedRun list = load_configs({tree.write("train.yaml", train_yaml("deepspeed: list.json\n"))});
  EXPECT_EQ(fatal(list), "");
  ASSERT_FALSE(list.problems.empty());
  EXPECT_NE(list.problems.back().what.find("no DeepSpeed config"), std::string::npos);
}

// ---- Accelerate and FSDP -------------------------------------------------------------------------------------------

std::string accelerate(const std::string& name) { return fixture("engines/accelerate/" + name + ".yaml"); }

TEST(Accelerate, ProcessesAndPrecision) {
  test::TempTree tree;
  const std::string train = tree.write("train.yaml", train_yaml("gradient_accumulation_steps: 4\n"));
  const LoadedRun run = load_configs({train, accelerate("multi_gpu")});
  EXPECT_EQ(fatal(run), "");
  EXPECT_EQ(run.facts.world_size.value(), 16);
  EXPECT_EQ(run.facts.world_size.origin(), Origin::kStated);
  EXPECT_EQ(run.facts.world_size.source().key, "num_processes");
  EXPECT_EQ(run.facts.precision.value(), Precision::kAutocastBf16);  // the launcher's, since the trainer says nothing
  EXPECT_EQ(run.facts.precision.source().file, accelerate("multi_gpu"));
  EXPECT_FALSE(run.facts.deepspeed.value());
  EXPECT_FALSE(run.facts.fsdp.value());
  const std::string half = tree.write("half.yaml", train_yaml("fp16: true\n"));
  EXPECT_EQ(load_configs({half, accelerate("multi_gpu")}).facts.precision.value(), Precision::kAutocastFp16);
}

TEST(Accelerate, Fsdp) {
  test::TempTree tree;
  const std::string train = tree.write("train.yaml", train_yaml("bf16: true\n"));
  const LoadedRun one = load_configs({train, accelerate("fsdp1")});
  EXPECT_TRUE(one.facts.fsdp.value());
  EXPECT_EQ(one.facts.fsdp_version.value(), 1);
  EXPECT_EQ(one.facts.precision.value(), Precision::kAutocastBf16);
  const LoadedRun two = load_configs({train, accelerate("fsdp2_tp")});
  EXPECT_EQ(two.facts.fsdp_version.value(), 2);
  EXPECT_EQ(two.facts.world_size.value(), 4);  // 16 processes, four of which share each batch
}

TEST(Accelerate, DeepSpeedInside) {
  test::TempTree tree;
  const std::string train = tree.write("train.yaml", train_yaml("bf16: true\ngradient_accumulation_steps: 4\n"));
  const LoadedRun run = load_configs({train, accelerate("zero3")});
  EXPECT_TRUE(run.facts.deepspeed.value());
  EXPECT_EQ(run.facts.zero_stage.value(), 3);
  EXPECT_TRUE(run.facts.moe_block_is_leaf.value());  // deepspeed_moe_layer_cls_names
  ASSERT_EQ(run.facts.setting_conflicts.value().size(), 1u);
  EXPECT_EQ(run.facts.setting_conflicts.value()[0].setting, "gradient_accumulation_steps");
  EXPECT_EQ(run.facts.setting_conflicts.value()[0].value, "8");
  EXPECT_EQ(load_configs({train, accelerate("zero_default")}).facts.zero_stage.value(), 2);
  const LoadedRun file = load_configs({train, accelerate("file")});
  EXPECT_EQ(file.facts.zero_stage.value(), 3);
  EXPECT_EQ(file.facts.zero_stage.source().file, fixture("engines/deepspeed/zero3.json"));
}

TEST(Accelerate, WrongTypes) {
  test::TempTree tree;
  const std::string train = tree.write("train.yaml", train_yaml("bf16: true\n"));
  for (const char* yaml : {"compute_environment: [1]\ndistributed_type: {a: b}\nnum_processes: many\n",
                           "distributed_type: DEEPSPEED\nnum_processes: -1\ndeepspeed_config: 7\n",
                           "distributed_type: FSDP\nnum_processes: 9999999999999999999999\nfsdp_config: [x]\nparallelism_config: y\n",
                           "distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_version: three}\nmixed_precision: 4\n"}) {
    const LoadedRun run = load_configs({train, tree.write("accelerate.yaml", yaml)});
    EXPECT_EQ(fatal(run), "") << yaml;
    EXPECT_EQ(run.facts.precision.value(), run.facts.deepspeed.value() ? Precision::kPureBf16 : Precision::kAutocastBf16) << yaml;
    EXPECT_FALSE(run.facts.fsdp_version.known()) << yaml;
  }
}

TEST(Fsdp, InTheTrainersOwnConfig) {
  test::TempTree tree;
  const LoadedRun hf = load_configs(
      {tree.write("train.yaml", train_yaml("bf16: true\nfsdp: full_shard auto_wrap\nfsdp_config: {version: 2}\n"))});
  EXPECT_TRUE(hf.facts.fsdp.value());
  EXPECT_EQ(hf.facts.fsdp_version.value(), 2);
  const std::string axolotl = "base_model: x\nmicro_batch_size: 1\nbf16: true\n";
  EXPECT_EQ(load_configs({tree.write("a.yml", axolotl + "fsdp_config: {fsdp_version: 2}\n")}).facts.fsdp_version.value(), 2);
  EXPECT_EQ(load_configs({tree.write("b.yml", axolotl + "fsdp_version: 1\nfsdp_config: {offload_params: true}\n")}).facts.fsdp_version.value(), 1);
  EXPECT_FALSE(load_configs({tree.write("c.yml", axolotl)}).facts.fsdp.value());
}

// ---- folders: which of several configs is the run's ----------------------------------------------------------------

TEST(Companions, LauncherConfigsInAFolderAreNoRivals) {
  test::TempTree tree;
  tree.write("train.yaml", "base_model: x\nmicro_batch_size: 1\nbf16: true\ndeepspeed: zero3.json\n");
  tree.write("zero3.json", R"({"zero_optimization": {"stage": 3}})");
  tree.write("zero2.json", R"({"zero_optimization": {"stage": 2}})");
  RunOptions options;
  options.paths = {tree.path()};
  options.models = {fixture("models/mixtral-tf4")};
  const LoadedRun run = std::move(load_runs(options).at(0));
  EXPECT_EQ(run.facts.framework.value(), "axolotl");
  EXPECT_EQ(run.facts.zero_stage.value(), 3);  // the one that the config names
}

// ---- damage: a problem with a remedy, or what is left; nothing else -------------------------------------------------

TEST(Engines, DamagedFiles) {
  const std::pair<std::string, std::string> files[] = {{"zero3.json", fixture("engines/deepspeed/zero3.json")},
                                                       {"zero3.yaml", accelerate("zero3")},
                                                       {"fsdp.yaml", accelerate("fsdp2_tp")},
                                                       {"args.bin", fixture("engines/deepspeed/training_args.bin")}};
  std::uint32_t state = 99;
  auto random = [&](std::size_t n) {
    state = state * 1664525u + 1013904223u;
    return static_cast<std::size_t>(state >> 8) % n;
  };
  test::TempTree tree;
  const std::string train = tree.write("train.yaml", train_yaml("bf16: true\n"));
  for (const auto& [name, path] : files) {
    std::ifstream in(path, std::ios::binary);
    const std::string whole((std::istreambuf_iterator<char>(in)), {});
    ASSERT_FALSE(whole.empty()) << path;
    for (int i = 0; i < 60; ++i) {
      std::string damaged = whole;
      if (i % 3 == 0) damaged.resize(random(whole.size()));
      if (i % 3 == 1) damaged[random(whole.size())] = static_cast<char>(random(256));
      if (i % 3 == 2) damaged.insert(random(whole.size()), "\"}]:\n\t{[,&*-|>#%@`'");
      const LoadedRun run = load_configs({train, tree.write(name, damaged)});
      for (const InputProblem& p : run.problems) EXPECT_FALSE(p.what.empty() || p.remedy.empty()) << name << " step " << i;
    }
  }
}

}  // namespace
}  // namespace moeaudit
