// load_runs() end to end on the fixtures: who is read, where the base model is found, whose word wins.
#include <gtest/gtest.h>

#include <cmath>

#include "audit/inputs/inputs.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using test::fixture;
using test::TempTree;

LoadedRun load(const std::vector<std::string>& paths, RunOptions options = {}) {
  options.paths = paths;
  std::vector<LoadedRun> runs = load_runs(options);
  EXPECT_EQ(runs.size(), 1u);
  return std::move(runs.at(0));
}
std::string fatal(const LoadedRun& run) {
  for (const InputProblem& p : run.problems) {
    if (p.fatal) return p.file + ":" + std::to_string(p.line) + ": " + p.what;
  }
  return "";
}
bool read_as(const LoadedRun& run, const std::string& path, const std::string& kind) {
  for (const InputFile& f : run.inputs) {
    if (f.path == path && f.kind == kind) return true;
  }
  return false;
}

TEST(Load, AdapterRunFindsItsBaseInTheRunFolder) {
  const std::string dir = fixture("runs/mixtral-qlora-broken");
  const LoadedRun run = load({dir});
  EXPECT_EQ(fatal(run), "");
  EXPECT_TRUE(run.problems.empty()) << run.problems[0].what;
  EXPECT_EQ(run.name, dir + "/checkpoint-10");
  EXPECT_TRUE(read_as(run, dir + "/base/config.json", "base model"));
  EXPECT_TRUE(read_as(run, dir + "/axolotl.yml", "Axolotl config"));
  EXPECT_TRUE(read_as(run, dir + "/checkpoint-10/training_args.bin", "training_args.bin"));
  EXPECT_FALSE(run.model.empty());
  EXPECT_FALSE(run.adapter.empty());
  const FactSheet& f = run.facts;
  ASSERT_TRUE(f.model_type.known() && f.transformers.known() && f.peft.known() && f.accumulation.known());
  EXPECT_EQ(f.model_type.value(), "mixtral");
  // Axolotl saves the model's config with its overrides into the run folder; the base's own is shadowed by it.
  EXPECT_EQ(f.model_type.source().file, dir + "/config.json");
  EXPECT_EQ(f.model_type.source().role, Role::kCheckpointConfig);
  ASSERT_FALSE(f.model_type.shadowed().empty());
  EXPECT_EQ(f.model_type.shadowed()[0].source.role, Role::kBaseModelConfig);
  EXPECT_TRUE(f.transformers.value().exact && *f.transformers.value().exact == *Version::parse("4.48.0"));
  EXPECT_EQ(f.framework.value(), "axolotl");
  EXPECT_EQ(f.accumulation.value(), 8);
  EXPECT_EQ(f.accumulation.source().role, Role::kTrainingArguments);  // what ran; the YAML's 8 is shadowed and agrees
  ASSERT_FALSE(f.accumulation.shadowed().empty());
  EXPECT_EQ(f.accumulation.shadowed()[0].source.role, Role::kTrainingConfig);
  EXPECT_EQ(f.accumulation.shadowed()[0].source.line, 34);
  EXPECT_EQ(f.adapter_rank.value(), 16);
  EXPECT_EQ(f.aux_coefficient.value(), 0.02);
  EXPECT_EQ(f.aux_coefficient.source().key, "model_config.router_aux_loss_coef");
  EXPECT_EQ(f.optimizer_steps.value(), 10);
  EXPECT_EQ(f.world_size.value(), 1);
}

TEST(Load, BaseModelsConfigNeverTellsTheRunsVersion) {
  const LoadedRun run = load({fixture("models/mixtral-tf4")});
  EXPECT_EQ(fatal(run), "");
  EXPECT_EQ(run.facts.model_type.value(), "mixtral");
  EXPECT_FALSE(run.facts.transformers.known());
}

TEST(Load, ConfigThatTheRunWroteTellsIt) {
  TempTree tree;
  tree.copy(fixture("runs/olmoe-full-healthy/checkpoint-10"), "checkpoint-10");
  const LoadedRun run = load({tree.path("checkpoint-10")});
  ASSERT_TRUE(run.facts.transformers.known());
  EXPECT_TRUE(*run.facts.transformers.value().exact == *Version::parse("4.57.6"));
  EXPECT_EQ(run.facts.transformers.source().role, Role::kCheckpointConfig);
  EXPECT_EQ(run.facts.model_type.source().role, Role::kCheckpointConfig);
}

TEST(Load, VersionsByAuthority) {
  TempTree tree;
  tree.copy(fixture("runs/mixtral-sft-trl/checkpoint-30"), "run/checkpoint-30");
  tree.copy(fixture("runs/mixtral-sft-trl/README.md"), "run/README.md");
  tree.write("run/requirements.txt", "transformers==4.0.0\npeft>=0.1\naccelerate==1.2.3\n");
  auto version = [&](const RunOptions& o, const Fact<VersionSet> FactSheet::*fact) {
    const LoadedRun run = load({tree.path("run")}, o);
    return (run.facts.*fact).known() ? to_text((run.facts.*fact).value()) : "unknown";
  };
  RunOptions o;
  EXPECT_EQ(version(o, &FactSheet::transformers), "5.23.0");  // the model card, not the file that lies there
  EXPECT_EQ(version(o, &FactSheet::peft), "0.21.2");          // a release, not a range
  EXPECT_EQ(version(o, &FactSheet::accelerate), "1.2.3");     // nobody else says
  o.envs = {tree.write("freeze.txt", "transformers==4.50.0\npeft>=0.20\n")};
  EXPECT_EQ(version(o, &FactSheet::transformers), "4.50.0");
  EXPECT_EQ(version(o, &FactSheet::peft), "0.21.2");
  o.assume = {{"transformers", "4.51.0"}, {"peft", ">=0.17"}};
  EXPECT_EQ(version(o, &FactSheet::transformers), "4.51.0");
  EXPECT_EQ(version(o, &FactSheet::peft), ">=0.17");  // the command line is taken at its word
}

TEST(Load, BaseModelInEveryPlace) {
  TempTree tree;
  const std::string yaml = "micro_batch_size: 1\nbase_model: ";
  tree.copy(fixture("models/olmoe-tf4"), "models/olmoe");
  auto family = [&](const std::string& config) {
    const LoadedRun run = load({config});
    return run.facts.model_type.known() ? run.facts.model_type.value() : "unknown";
  };
  EXPECT_EQ(family(tree.write("a/c.yml", yaml + "../models/olmoe\n")), "olmoe");
  EXPECT_EQ(family(tree.write("b.yml", yaml + "models/olmoe\n")), "olmoe");
  EXPECT_EQ(family(tree.write("c.yml", yaml + tree.path("models/olmoe") + "/\n")), "olmoe");
  EXPECT_EQ(family(tree.write("d.yml", yaml + "./nowhere\n")), "unknown");
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(tree.path("models"));
  EXPECT_EQ(family(tree.write("deep/er/e.yml", yaml + "olmoe\n")), "olmoe");
  std::filesystem::current_path(before);
}

TEST(Load, BaseModelThatIsNotHereIsSaid) {
  TempTree tree;
  const LoadedRun run = load({tree.write("d.yml", "base_model: ./nowhere\nmicro_batch_size: 1\n")});
  ASSERT_EQ(run.problems.size(), 1u);
  EXPECT_FALSE(run.problems[0].fatal);
  EXPECT_EQ(run.problems[0].line, 1);
  EXPECT_NE(run.problems[0].remedy.find("--base"), std::string::npos);
}

TEST(Load, BaseModelInTheHubCache) {
  TempTree tree;
  tree.write("models--org--moe/refs/main", "abc");
  tree.copy(fixture("models/qwen3_moe-tf5"), "models--org--moe/snapshots/abc");
  const char* old = ::getenv("HF_HUB_CACHE");
  const std::string saved = old ? old : "";
  ::setenv("HF_HUB_CACHE", tree.path().c_str(), 1);
  const LoadedRun by_config = load({tree.write("c.yml", "base_model: org/moe\nmicro_batch_size: 1\n")});
  RunOptions options;
  options.bases = {"org/moe"};
  const LoadedRun by_option = load({}, options);
  const LoadedRun by_path = load({"org/moe"});
  old ? ::setenv("HF_HUB_CACHE", saved.c_str(), 1) : ::unsetenv("HF_HUB_CACHE");
  for (const LoadedRun* run : {&by_config, &by_option, &by_path}) {
    EXPECT_EQ(fatal(*run), "");
    ASSERT_TRUE(run->facts.model_type.known());
    EXPECT_EQ(run->facts.model_type.value(), "qwen3_moe");
    EXPECT_FALSE(run->model.empty());
  }
}

TEST(Load, CorruptConfigIsFatalWithItsPlace) {
  TempTree tree;
  tree.copy(fixture("runs/mixtral-qlora-healthy"), "run");
  std::filesystem::permissions(tree.path("run/base/config.json"), std::filesystem::perms::owner_all);
  tree.write("run/base/config.json", "{\n  \"model_type\": \"mixtral\",\n  \"num_local_experts\": 8\n  \"x\": 1\n}\n");
  const LoadedRun run = load({tree.path("run")});
  EXPECT_TRUE(fatal(run).starts_with(tree.path("run/base/config.json:4: "))) << fatal(run);
  EXPECT_FALSE(run.adapter.empty());  // the rest is read
}

TEST(Load, CorruptWeightsAreAFindingNotAProblem) {
  TempTree tree;
  tree.copy(fixture("models/mixtral-tf4"), "m");
  std::filesystem::resize_file(tree.path("m/model.safetensors"), 100);
  const LoadedRun run = load({tree.path("m")});
  EXPECT_EQ(fatal(run), "");
  ASSERT_TRUE(run.facts.weight_problems.known());
  EXPECT_FALSE(run.facts.weight_problems.value().empty());
  EXPECT_EQ(run.facts.model_type.value(), "mixtral");
}

TEST(Load, CorruptTrainingArgsAreListedAndTheRestIsJudged) {
  TempTree tree;
  tree.copy(fixture("runs/mixtral-qlora-broken"), "run");
  tree.write("run/checkpoint-10/training_args.bin", "garbage");
  const LoadedRun run = load({tree.path("run")});
  EXPECT_EQ(fatal(run), "");
  ASSERT_EQ(run.problems.size(), 1u);
  EXPECT_EQ(run.facts.accumulation.value(), 8);
  EXPECT_EQ(run.facts.accumulation.source().role, Role::kTrainingConfig);
}

TEST(Load, LogKeepsWrittenNaN) {
  const LoadedRun run = load({fixture("runs/mixtral-nan-loss")});
  ASSERT_TRUE(run.facts.log.known());
  const LogTable& log = run.facts.log.value();
  ASSERT_GE(log.step.size(), 10u);
  EXPECT_EQ(log.loss[0], 4.7857);
  EXPECT_TRUE(std::isnan(log.loss[1]) && log.has_loss[1]);
}

TEST(Load, AllShippedConfigs) {
  int n = 0;
  for (const char* folder : {"configs/axolotl", "configs/llama-factory"}) {
    for (const auto& entry : std::filesystem::directory_iterator(fixture(folder))) {
      RunOptions options;  // the release whose examples they are, so that its list of known keys counts
      options.assume = {{"axolotl", "0.19.0"}};
      const LoadedRun run = load({entry.path().string()}, options);
      EXPECT_EQ(fatal(run), "") << entry.path();
      if (run.facts.ignored_keys.known()) {
        for (const IgnoredKey& key : run.facts.ignored_keys.value())
          ADD_FAILURE() << entry.path() << ": " << key.key << " " << key.why;
      }
      ++n;
    }
  }
  EXPECT_EQ(n, 37);
}

/// A LLaMA-Factory run on a model folder.
LoadedRun factory(const std::string& yaml, const std::string& model,
                  const std::vector<std::pair<std::string, std::string>>& assume) {
  test::TempTree tree;
  RunOptions options;
  options.configs = {tree.write("train.yaml", "model_name_or_path: x\nstage: sft\n" + yaml)};
  options.models = {fixture(model)};
  options.assume = assume;
  return std::move(load_runs(options).at(0));
}

TEST(LlamaFactory, BalanceLossAsItsLoaderLeavesIt) {
  const std::string kFull = "finetuning_type: full\nbf16: true\n", kModel = "models/mixtral-tf4";
  const LoadedRun on = factory(kFull + "moe_aux_loss_coef: 0.01\n", kModel, {{"llamafactory", "0.9.4"}});
  EXPECT_TRUE(on.facts.aux_flag.value());
  EXPECT_EQ(on.facts.aux_coefficient.value(), 0.01);
  const LoadedRun off = factory(kFull, kModel, {{"llamafactory", "0.9.4"}});
  EXPECT_FALSE(off.facts.aux_flag.value());
  const LoadedRun unasked = factory(kFull, kModel, {{"llamafactory", "0.9.2"}});
  EXPECT_TRUE(unasked.facts.aux_flag.value());
  EXPECT_EQ(unasked.facts.aux_flag.origin(), Origin::kFrameworkDefault);
  const LoadedRun dpo = factory("finetuning_type: full\nmoe_aux_loss_coef: 0.01\nstage: dpo\n", kModel,
                                {{"llamafactory", "0.9.4"}, {"transformers", "4.57.1"}});
  EXPECT_FALSE(dpo.facts.aux_added.value());  // its loss takes the logits alone
}

TEST(LlamaFactory, LoraDefaults) {
  const LoadedRun run = factory("finetuning_type: lora\nlora_rank: 16\nlora_target: all\n", "models/mixtral-tf4", {});
  EXPECT_EQ(run.facts.adapter_rank.value(), 16);
  EXPECT_EQ(run.facts.adapter_alpha.value(), 32.0);
  EXPECT_EQ(factory("finetuning_type: lora\n", "models/mixtral-tf4", {}).facts.adapter_rank.value(), 8);
  EXPECT_TRUE(run.facts.gradient_checkpointing.value());
  EXPECT_TRUE(run.facts.checkpointing_reentrant.value());
  EXPECT_FALSE(factory("use_reentrant_gc: false\n", "models/mixtral-tf4", {}).facts.checkpointing_reentrant.value());
}

TEST(LlamaFactory, FreezeTrainsByPattern) {
  // The model has 4 layers, of which those that are MoE are all.
  const LoadedRun last = factory("finetuning_type: freeze\nfreeze_trainable_layers: 2\n", "models/mixtral-tf4", {});
  const std::int64_t n = last.facts.num_layers.value();
  EXPECT_EQ(last.facts.unfrozen_patterns.value(),
            (std::vector<std::string>{"." + std::to_string(n - 2) + ".", "." + std::to_string(n - 1) + "."}));
  EXPECT_TRUE(last.facts.router_trains.value());
  const LoadedRun first = factory("finetuning_type: freeze\nfreeze_trainable_layers: -1\nfreeze_trainable_modules: self_attn\n"
                                  "freeze_extra_modules: embed_tokens,norm\n", "models/mixtral-tf4", {});
  EXPECT_EQ(first.facts.unfrozen_patterns.value(), (std::vector<std::string>{".0.self_attn", "embed_tokens", "norm"}));
  EXPECT_FALSE(first.facts.router_trains.known());
  // Layer 0 of DeepSeek-V3 is dense: no router trains there.
  const LoadedRun dense = factory("finetuning_type: freeze\nfreeze_trainable_layers: -1\n", "models/deepseek_v3-tf4", {});
  EXPECT_FALSE(dense.facts.router_trains.value());
  EXPECT_FALSE(dense.facts.experts_train.known());  // ".0." is in the name of expert 0 too
  for (const char* odd : {"freeze_trainable_layers: 0\n", "freeze_trainable_layers: many\n", "freeze_trainable_layers: 999999999999\n",
                          "freeze_trainable_layers: -9223372036854775808\n", "freeze_trainable_modules: []\n", "use_llama_pro: true\n"}) {
    const LoadedRun run = factory(std::string("finetuning_type: freeze\n") + odd, "models/mixtral-tf4", {});
    EXPECT_EQ(run.facts.method.value(), Method::kFull) << odd;
  }
}

TEST(Load, NothingGiven) {
  const LoadedRun run = load({});
  EXPECT_TRUE(run.inputs.empty());
}

TEST(Load, SourcesOfFrameworkDisagree) {
  const LoadedRun sft = load({fixture("runs/mixtral-sft-trl")});
  EXPECT_EQ(sft.facts.framework.value(), "trl");  // the class in training_args.bin, not the look of run.json
  EXPECT_EQ(sft.facts.trainer.value(), "SFTTrainer");
  EXPECT_EQ(sft.facts.trainer.source().role, Role::kTrainingArguments);
  const LoadedRun plain = load({fixture("runs/qwen3moe-fused-hit")});
  EXPECT_EQ(plain.facts.framework.value(), "transformers");
  EXPECT_EQ(plain.facts.trainer.value(), "Trainer");
}

}  // namespace
}  // namespace moeaudit
