// What paths are taken for, on trees built for the purpose and on the fixtures.
#include "audit/inputs/discover.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <set>

#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using test::fixture;
using test::TempTree;

RunPlan plan_of(const std::vector<std::string>& paths, RunOptions options = {}) {
  options.paths = paths;
  std::vector<RunPlan> plans = discover(options);
  EXPECT_EQ(plans.size(), 1u);
  return std::move(plans.at(0));
}
std::string fatal(const RunPlan& plan) {
  for (const InputProblem& p : plan.problems) {
    if (p.fatal) return p.file + ": " + p.what + " | " + p.remedy;
  }
  return "";
}
std::string note_on(const RunPlan& plan, const std::string& path) {
  for (const InputFile& f : plan.inputs) {
    if (f.path == path) return f.kind + ": " + f.note;
  }
  return "";
}
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

const std::string kConfig = R"({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})";
const std::string kAdapter = R"({"peft_type": "LORA", "base_model_name_or_path": "org/name"})";
const std::string kState = R"({"log_history": [], "global_step": 5})";
const std::string kAxolotl = "base_model: org/name\nmicro_batch_size: 1\n";

/// A safetensors file with one tensor of four bytes.
std::string tensor_file(const std::string& name) {
  std::string json = "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
  while (json.size() % 8) json += ' ';
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[i] = static_cast<char>((json.size() >> (8 * i)) & 0xff);
  return out + json + std::string(4, '\0');
}

// ---- the fixtures
// ----------------------------------------------------------------------------------------------------

TEST(Discover, RunFolderTakesTheLatestCheckpoint) {
  const std::string run = fixture("runs/mixtral-sft-trl");
  const RunPlan plan = plan_of({run + "/"});
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.name, run + "/checkpoint-30");
  EXPECT_EQ(plan.adapter_config.path, run + "/checkpoint-30/adapter_config.json");
  EXPECT_EQ(plan.adapter_weights.path, run + "/checkpoint-30/adapter_model.safetensors");
  EXPECT_EQ(plan.trainer_state.path, run + "/checkpoint-30/trainer_state.json");
  EXPECT_EQ(plan.training_args.path, run + "/checkpoint-30/training_args.bin");
  EXPECT_EQ(plan.version_files, std::vector<std::string>{run + "/requirements.txt"});
  EXPECT_EQ(plan.model_cards, (std::vector<std::string>{run + "/checkpoint-30/README.md", run + "/README.md"}));
  EXPECT_EQ(plan.training_configs, std::vector<std::string>{run + "/run.json"});
  EXPECT_TRUE(plan.base_config.empty() && plan.run_config.empty());
  EXPECT_EQ(note_on(plan, run + "/checkpoint-30"), "checkpoint: latest of 3 checkpoints");
}

TEST(Discover, AllCheckpoints) {
  RunOptions options;
  options.all_checkpoints = true;
  options.paths = {fixture("runs/mixtral-sft-trl")};
  const std::vector<RunPlan> plans = discover(options);
  ASSERT_EQ(plans.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    const std::string folder = fixture("runs/mixtral-sft-trl/checkpoint-") + std::to_string(10 * (i + 1));
    EXPECT_EQ(plans[i].name, folder);
    EXPECT_EQ(plans[i].adapter_weights.path, folder + "/adapter_model.safetensors");
    EXPECT_EQ(plans[i].training_configs.size(), 1u);
    EXPECT_EQ(plans[i].version_files.size(), 1u);
  }
}

TEST(Discover, CheckpointByItsPathKnowsItsRunFolder) {
  const std::string run = fixture("runs/mixtral-qlora-broken");
  const RunPlan plan = plan_of({run + "/checkpoint-5"});
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.name, run + "/checkpoint-5");
  EXPECT_EQ(plan.adapter_config.path, run + "/checkpoint-5/adapter_config.json");
  EXPECT_EQ(plan.training_configs, std::vector<std::string>{run + "/axolotl.yml"});
  EXPECT_EQ(plan.version_files, std::vector<std::string>{run + "/requirements.txt"});
}

TEST(Discover, FullFineTuneIsWrittenByTheRun) {
  const std::string run = fixture("runs/olmoe-full-healthy");
  const RunPlan plan = plan_of({run});
  EXPECT_EQ(plan.run_config.path, run + "/checkpoint-10/config.json");
  EXPECT_EQ(plan.run_weights.path, run + "/checkpoint-10");
  EXPECT_TRUE(plan.run_config_states_version);
  EXPECT_TRUE(plan.base_config.empty() && plan.base_weights.empty() && plan.adapter_config.empty());
}

TEST(Discover, ModelFolderIsTheBase) {
  const std::string model = fixture("models/mixtral-tf4");
  const RunPlan plan = plan_of({model});
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.name, model);
  EXPECT_EQ(plan.base_config.path, model + "/config.json");
  EXPECT_EQ(plan.base_weights.path, model);
  EXPECT_TRUE(plan.run_config.empty() && plan.training_configs.empty());
}

TEST(Discover, SeveralPathsAreOneRun) {
  const std::string model = fixture("models/mixtral-tf4"),
                    config = fixture("configs/axolotl/mistral__mixtral__mixtral-qlora-fsdp.yml");
  const std::string requirements = fixture("runs/mixtral-qlora-broken/requirements.txt");
  const RunPlan plan = plan_of({model, config, requirements});
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.base_config.path, model + "/config.json");
  EXPECT_EQ(plan.training_configs, std::vector<std::string>{config});
  EXPECT_EQ(plan.given_version_files, std::vector<std::string>{requirements});
}

TEST(Discover, ShardStandsForItsModel) {
  const std::string model = fixture("models/mixtral-tf4-sharded");
  const RunPlan plan = plan_of({model + "/model-00002-of-00004.safetensors"});
  EXPECT_EQ(plan.base_weights.path, model + "/model.safetensors.index.json");
  EXPECT_EQ(plan.base_config.path, model + "/config.json");
  EXPECT_TRUE(has(note_on(plan, model + "/model-00002-of-00004.safetensors"), "all shards"));
  EXPECT_EQ(plan_of({model}).base_weights.path, model);
}

TEST(Discover, FolderOfManyConfigsAsksWhich) {
  const RunPlan plan = plan_of({fixture("configs/axolotl")});
  EXPECT_TRUE(plan.training_configs.empty());
  ASSERT_EQ(plan.problems.size(), 1u);
  EXPECT_TRUE(has(plan.problems[0].what, "29 training configs")) << plan.problems[0].what;
  EXPECT_TRUE(has(plan.problems[0].remedy, "--config " + fixture("configs/axolotl/"))) << plan.problems[0].remedy;
}

// ---- single files
// ----------------------------------------------------------------------------------------------------

TEST(Discover, FilesByTheirContent) {
  TempTree tree;
  const std::string state = tree.write("log.json", kState), adapter = tree.write("mine.json", kAdapter);
  const std::string args = tree.write("training_args.bin", "x"),
                    lora = tree.write("lora.safetensors", tensor_file("a.lora_A.weight"));
  const std::string freeze = tree.write("env.txt", "transformers==4.46.3\npeft==0.13.2\n"),
                    model = tree.write("moe.json", kConfig);
  const RunPlan plan = plan_of({state, adapter, args, lora, freeze, model});
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.trainer_state.path, state);
  EXPECT_EQ(plan.adapter_config.path, adapter);
  EXPECT_EQ(plan.training_args.path, args);
  EXPECT_EQ(plan.adapter_weights.path, lora);
  EXPECT_EQ(plan.given_version_files, std::vector<std::string>{freeze});
  EXPECT_EQ(plan.base_config.path, model);
  EXPECT_TRUE(plan.base_weights.empty());
}

TEST(Discover, WeightFileBringsTheConfigBesideIt) {
  TempTree tree;
  const std::string config = tree.write("config.json", kConfig),
                    weights = tree.write("moe.safetensors", tensor_file("gate.weight"));
  const RunPlan plan = plan_of({weights});
  EXPECT_EQ(plan.base_weights.path, weights);
  EXPECT_EQ(plan.base_config.path, config);
}

TEST(Discover, WhatCannotBeTaken) {
  TempTree tree;
  tree.write("a/notes.txt", "hello\nworld\n");
  ASSERT_EQ(::symlink("loop", tree.path("loop").c_str()), 0);
  ASSERT_EQ(::symlink("nowhere", tree.path("dangling").c_str()), 0);
  ASSERT_EQ(::mkfifo(tree.path("pipe").c_str(), 0600), 0);
  const std::pair<std::string, std::string> cases[] = {
      {tree.path("missing"), "no such file or folder"},
      {tree.path("loop"), "loop of symbolic links"},
      {tree.path("dangling"), "symbolic link to something that does not exist"},
      {tree.path("pipe"), "neither a file nor a folder"},
      {"/dev/zero", "neither a file nor a folder"},
      {tree.write("empty.yml", ""), "0 bytes"},
      {tree.write("data.jsonl", "{}\n"), "of no kind"},
      {tree.write("pytorch_model.bin", "PK"), "neither reads nor executes"},
      {tree.write("some.json", "{\"a\": 1}"), "JSON file of no kind"},
      {tree.write("some.yml", "a: 1\n"), "YAML file of no kind"},
      {tree.write("list.yml", "- 1\n"), "YAML file of no kind"},
      {tree.write("bad.yml", "a: [1\nb: 2\n"), "YAML error"},
      {tree.path("a"), "nothing in this folder"},
      {tree.folder("nothing"), "nothing in this folder"},
      {"org/unheard-of", "no such file or folder"},
  };
  for (const auto& [path, what] : cases) {
    const RunPlan plan = plan_of({path});
    EXPECT_TRUE(has(fatal(plan), what)) << path << ": " << fatal(plan);
    EXPECT_TRUE(has(fatal(plan), path)) << fatal(plan);
    EXPECT_FALSE(plan.problems[0].remedy.empty()) << path;
  }
  EXPECT_TRUE(has(fatal(plan_of({tree.path("missing")})), "a training config (.yml, .yaml, .json)"));
}

TEST(Discover, DirectoriesInPlaceOfFiles) {
  TempTree tree;
  tree.folder("m/config.json");
  tree.write("m/model.safetensors", tensor_file("x"));
  const RunPlan plan = plan_of({tree.path("m")});
  EXPECT_TRUE(has(fatal(plan), "m/config.json: is a folder, not a file")) << fatal(plan);
  EXPECT_EQ(plan.base_weights.path, tree.path("m"));  // the rest is still there
}

TEST(Discover, FolderAboveNamesWhatIsBelow) {
  TempTree tree;
  tree.write("runs/a/config.json", kConfig);
  tree.write("runs/b/adapter_config.json", kAdapter);
  const std::string what = fatal(plan_of({tree.path("runs")}));
  EXPECT_TRUE(has(what, "did you mean " + tree.path("runs/a") + ", " + tree.path("runs/b") + "?")) << what;
}

// ---- folders that a trainer left
// -------------------------------------------------------------------------------------

TEST(Discover, TrainerFilesMakeTheConfigTheRunsOwn) {
  TempTree tree;
  tree.write("out/config.json", kConfig);
  tree.write("out/model.safetensors", tensor_file("x"));
  EXPECT_FALSE(plan_of({tree.path("out")}).base_config.empty());
  tree.write("out/training_args.bin", "x");
  tree.write("out/README.md", "### Framework versions\n- TRL: 1.0.0\n");
  const RunPlan plan = plan_of({tree.path("out")});
  EXPECT_TRUE(plan.base_config.empty());
  EXPECT_EQ(plan.run_config.path, tree.path("out/config.json"));
  EXPECT_TRUE(plan.run_config_states_version);
  EXPECT_EQ(plan.model_cards.size(), 1u);
}

TEST(Discover, ModelCardOfABaseModelSaysNothingOfThisRun) {
  TempTree tree;
  tree.write("m/config.json", kConfig);
  tree.write("m/README.md", "### Framework versions\n- Transformers 4.30.0\n");
  tree.write("m/requirements.txt", "transformers==4.30.0\n");
  const RunPlan plan = plan_of({tree.path("m")});
  EXPECT_TRUE(plan.model_cards.empty() && plan.version_files.empty() && plan.given_version_files.empty());
}

TEST(Discover, ConfigBesideAnAdapter) {
  TempTree tree;
  tree.write("a/adapter_config.json", kAdapter);
  tree.write("a/config.json", kConfig);
  RunPlan plan = plan_of({tree.path("a")});
  EXPECT_EQ(plan.run_config.path, tree.path("a/config.json"));
  EXPECT_FALSE(plan.run_config_states_version);  // a copy: who knows which release wrote it
  tree.write("a/trainer_state.json", kState);
  EXPECT_TRUE(plan_of({tree.path("a")}).run_config_states_version);
}

TEST(Discover, InterruptedCheckpointIsPassedOver) {
  TempTree tree;
  tree.write("run/checkpoint-9/trainer_state.json", kState);
  tree.folder("run/checkpoint-10");
  tree.folder("run/checkpoint-x");
  tree.write("run/checkpoint-11", "a file");
  const RunPlan plan = plan_of({tree.path("run")});
  EXPECT_EQ(plan.name, tree.path("run/checkpoint-9"));
  ASSERT_EQ(plan.problems.size(), 1u);
  EXPECT_EQ(plan.problems[0].file, tree.path("run/checkpoint-10"));
  EXPECT_FALSE(plan.problems[0].fatal);
  tree.folder("empty/checkpoint-1");
  EXPECT_TRUE(has(fatal(plan_of({tree.path("empty")})), "none of its checkpoints"));
}

TEST(Discover, NumbersNotNames) {
  TempTree tree;
  for (const char* n : {"9", "100", "20"})
    tree.write(std::string("run/checkpoint-") + n + "/trainer_state.json", kState);
  EXPECT_EQ(plan_of({tree.path("run")}).name, tree.path("run/checkpoint-100"));
}

TEST(Discover, FinalWeightsInTheRunFolder) {
  TempTree tree;
  tree.write("run/checkpoint-5/trainer_state.json", kState);
  tree.write("run/adapter_model.safetensors", tensor_file("a.lora_A.weight"));
  tree.write("run/adapter_config.json", kAdapter);
  EXPECT_EQ(plan_of({tree.path("run")}).adapter_weights.path, tree.path("run/adapter_model.safetensors"));
  tree.write("run/checkpoint-5/adapter_model.safetensors", tensor_file("a.lora_A.weight"));
  const RunPlan plan = plan_of({tree.path("run")});
  EXPECT_EQ(plan.adapter_weights.path, tree.path("run/checkpoint-5/adapter_model.safetensors"));
  EXPECT_TRUE(has(note_on(plan, tree.path("run")), "not read"));
  EXPECT_EQ(plan.adapter_config.path, tree.path("run/adapter_config.json"));
}

TEST(Discover, WeightsInOtherFormats) {
  TempTree tree;
  tree.write("m/config.json", kConfig);
  tree.write("m/pytorch_model-00001-of-00002.bin", "x");
  const RunPlan plan = plan_of({tree.path("m")});
  ASSERT_EQ(plan.problems.size(), 1u);
  EXPECT_FALSE(plan.problems[0].fatal);
  EXPECT_TRUE(has(plan.problems[0].what, "executes no pickle"));
  tree.write("shards/a-1.safetensors", tensor_file("x"));
  tree.write("shards/a-2.safetensors", tensor_file("y"));
  tree.write("shards/config.json", kConfig);
  const RunPlan shards = plan_of({tree.path("shards")});
  EXPECT_TRUE(shards.base_weights.empty());
  ASSERT_EQ(shards.problems.size(), 1u);
  EXPECT_TRUE(has(shards.problems[0].what, "no model.safetensors.index.json"));
}

TEST(Discover, BrokenTrainingConfigInAFolderIsNotPassedOver) {
  TempTree tree;
  tree.write("p/train.yml", "base_model: x\nlora_r: [1\n");
  tree.write("p/compose.yml", "services: [1\n");
  tree.write("p/requirements.txt", "peft==0.18.0\n");
  const RunPlan plan = plan_of({tree.path("p")});
  EXPECT_EQ(plan.training_configs, std::vector<std::string>{tree.path("p/train.yml")});
  EXPECT_EQ(plan.version_files.size(), 1u);
}

TEST(Discover, LauncherConfigBesideATrainersIsNoRival) {
  TempTree tree;
  tree.write("p/accelerate.yaml", "compute_environment: LOCAL_MACHINE\nnum_processes: 8\n");
  tree.write("p/train.yml", kAxolotl);
  const RunPlan plan = plan_of({tree.path("p")});
  EXPECT_EQ(plan.training_configs, std::vector<std::string>{tree.path("p/train.yml")});
  EXPECT_TRUE(plan.problems.empty());
  ASSERT_EQ(plan.inputs.size(), 1u);  // whether the run was launched with it is for the user to say
  EXPECT_EQ(plan.inputs[0].path, tree.path("p/accelerate.yaml"));
  EXPECT_TRUE(has(plan.inputs[0].note, "--config"));
  const RunPlan given = plan_of({tree.path("p/train.yml"), tree.path("p/accelerate.yaml")});
  EXPECT_EQ(given.training_configs.size(), 2u);
}

// ---- who wins
// --------------------------------------------------------------------------------------------------------

TEST(Discover, OptionsOutrankWhatIsFound) {
  TempTree tree;
  const std::string run = fixture("runs/mixtral-qlora-broken");
  RunOptions options;
  options.adapters = {run + "/checkpoint-5"};
  options.bases = {fixture("models/mixtral-tf4")};
  options.configs = {tree.write("mine.yml", kAxolotl)};
  options.logs = {run + "/checkpoint-10"};
  options.envs = {run + "/requirements.txt"};
  const RunPlan plan = plan_of({run}, options);
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.adapter_config.path, run + "/checkpoint-5/adapter_config.json");
  EXPECT_EQ(plan.adapter_weights.path, run + "/checkpoint-5/adapter_model.safetensors");
  EXPECT_EQ(plan.base_config.path, fixture("models/mixtral-tf4/config.json"));
  EXPECT_EQ(plan.training_configs, options.configs);
  EXPECT_EQ(plan.trainer_state.path, run + "/checkpoint-10/trainer_state.json");
  EXPECT_TRUE(has(note_on(plan, run + "/axolotl.yml"), "not read"));
  EXPECT_TRUE(has(note_on(plan, run + "/checkpoint-10/adapter_config.json"), "not read"));
}

TEST(Discover, BaseAndTrainedModel) {
  RunOptions options;
  options.bases = {fixture("models/mixtral-tf4")};
  options.models = {fixture("models/mixtral-tf5")};
  RunPlan plan = plan_of({}, options);
  EXPECT_EQ(plan.base_config.path, fixture("models/mixtral-tf4/config.json"));
  EXPECT_EQ(plan.run_config.path, fixture("models/mixtral-tf5/config.json"));
  EXPECT_EQ(plan.run_weights.path, fixture("models/mixtral-tf5"));
  options.models.clear();
  plan = plan_of({fixture("models/mixtral-tf5")}, options);
  EXPECT_EQ(plan.run_config.path, fixture("models/mixtral-tf5/config.json"));
  // --model of a folder with trainer files: the run wrote it.
  RunOptions trained;
  trained.models = {fixture("runs/olmoe-full-healthy/checkpoint-10")};
  plan = plan_of({}, trained);
  EXPECT_EQ(plan.run_config.path, trained.models[0] + "/config.json");
  EXPECT_EQ(plan.trainer_state.path, trained.models[0] + "/trainer_state.json");
}

TEST(Discover, TwoOfAKindIsAContradiction) {
  TempTree tree;
  const std::string a = fixture("models/mixtral-tf4"), b = fixture("models/olmoe-tf4");
  EXPECT_TRUE(has(fatal(plan_of({a, b})), "--base BASE_MODEL --model TRAINED_MODEL"));
  EXPECT_EQ(fatal(plan_of({a, a})), fatal(plan_of({a, a + "/"})));
  RunOptions two;
  two.adapters = {fixture("runs/mixtral-qlora-broken/checkpoint-5"),
                  fixture("runs/mixtral-qlora-broken/checkpoint-10")};
  EXPECT_TRUE(has(fatal(plan_of({}, two)), "second adapter"));
  EXPECT_TRUE(has(fatal(plan_of({fixture("runs/mixtral-qlora-broken"), fixture("runs/mixtral-sft-trl")})),
                  "second run folder"));
  EXPECT_TRUE(has(fatal(plan_of({fixture("runs/mixtral-qlora-broken/checkpoint-5"),
                                 fixture("runs/mixtral-qlora-healthy/checkpoint-5")})),
                  "second adapter"));
}

TEST(Discover, OptionsThatNameNothing) {
  TempTree tree;
  const std::string empty = tree.folder("empty"), file = tree.write("f.yml", kAxolotl);
  auto with = [&](auto member, const std::string& value) {
    RunOptions options;
    (options.*member) = {value};
    return fatal(plan_of({}, options));
  };
  EXPECT_TRUE(has(with(&RunOptions::models, empty), "holds neither config.json"));
  EXPECT_TRUE(has(with(&RunOptions::adapters, empty), "holds neither adapter_config.json"));
  EXPECT_TRUE(has(with(&RunOptions::configs, empty), "is a folder"));
  EXPECT_TRUE(has(with(&RunOptions::envs, empty), "is a folder"));
  EXPECT_TRUE(has(with(&RunOptions::logs, empty), "no trainer_state.json"));
  EXPECT_TRUE(has(with(&RunOptions::configs, tree.path("no.yml")), "no such file"));
  EXPECT_TRUE(has(with(&RunOptions::bases, tree.path("no/where")), "no such file"));
  RunOptions hidden;
  hidden.hidden_states = empty;
  EXPECT_TRUE(has(fatal(plan_of({}, hidden)), "--hidden-states takes"));
}

TEST(Discover, HubIds) {
  RunOptions options;
  options.bases = {"org/some-model"};
  const RunPlan plan = plan_of({}, options);
  EXPECT_EQ(fatal(plan), "");
  EXPECT_EQ(plan.base_id.path, "org/some-model");
}

TEST(Discover, PathsStayAsTheUserWroteThem) {
  TempTree tree;
  tree.write("run/checkpoint-1/trainer_state.json", kState);
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(tree.path());
  EXPECT_EQ(plan_of({"run"}).trainer_state.path, "run/checkpoint-1/trainer_state.json");
  EXPECT_EQ(plan_of({"./run/"}).trainer_state.path, "run/checkpoint-1/trainer_state.json");
  std::filesystem::current_path(tree.path("run"));
  EXPECT_EQ(plan_of({"."}).trainer_state.path, "checkpoint-1/trainer_state.json");
  std::filesystem::current_path(tree.path("run/checkpoint-1"));
  tree.write("run/train.yml", kAxolotl);
  const RunPlan plan = plan_of({"."});  // the folder's own name tells that it is a checkpoint
  std::filesystem::current_path(before);
  EXPECT_EQ(plan.trainer_state.path, "trainer_state.json");
  EXPECT_EQ(plan.training_configs.size(), 1u);
}

}  // namespace
}  // namespace moeaudit
