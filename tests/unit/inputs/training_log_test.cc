// Logs of training by step: JSON lines, CSV and Megatron-LM's text, whatever names they use.
#include <gtest/gtest.h>

#include <cmath>

#include "audit/inputs/inputs.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using test::TempTree;

LoadedRun load(const std::string& path, bool as_option = false) {
  RunOptions options;
  (as_option ? options.logs : options.paths).push_back(path);
  std::vector<LoadedRun> runs = load_runs(options);
  EXPECT_EQ(runs.size(), 1u);
  return std::move(runs[0]);
}

TEST(TrainingLog, JsonLines) {
  const TempTree tree;
  const std::string path = tree.write("metrics.jsonl", R"({"step": 1, "train/loss": 2.5, "moe/load_balancing_loss": 1.01, "train/grad_norm": NaN, "lr": 0.1, "epoch": 0.5}
{"config": {"seed": 1}}

{"step": 2, "loss": 2.25, "router_z_loss": 0.5, "ce_loss": 2.0}
{"step": 2, "eval/loss": 3.5}
{"step": 3, "lo)");
  for (const bool as_option : {false, true}) {
    const LoadedRun run = load(path, as_option);
    EXPECT_TRUE(run.problems.empty()) << "a last line that is cut short is no fault";
    ASSERT_TRUE(run.facts.log.known());
    const LogTable& log = run.facts.log.value();
    EXPECT_EQ(log.step, (std::vector<std::int64_t>{1, 2, 2}));
    EXPECT_EQ(log.line, (std::vector<int>{1, 4, 5}));
    EXPECT_EQ(log.loss[0], 2.5);
    EXPECT_EQ(log.aux_loss[0], 1.01);
    EXPECT_TRUE(log.has_grad_norm[0] && std::isnan(log.grad_norm[0])) << "written";
    EXPECT_FALSE(log.has_grad_norm[1]) << "absent";
    EXPECT_EQ(log.z_loss[1], 0.5);
    EXPECT_EQ(log.ce[1], 2.0);
    EXPECT_EQ(log.eval_loss[2], 3.5);
    EXPECT_FALSE(log.has_loss[2]);
    EXPECT_EQ(log.learning_rate[0], 0.1);
  }
}

TEST(TrainingLog, Megatron) {
  const TempTree tree;
  const std::string path = tree.write("train.log",
                                      "> building train dataset\n"
                                      " [2026-01-01 00:00:00.000000] iteration       10/     100 | consumed samples:         2560 | elapsed time per iteration (ms): 1234.5 | learning rate: "
                                      "1.500000E-04 | global batch size:   256 | lm loss: 9.876000E+00 | load_balancing_loss: 1.012300E+00 | z_loss: 1.200000E-02 | loss scale: 1.0 | grad norm: "
                                      "1.234 | number of skipped iterations:   0 |\n"
                                      "validation loss at iteration 10 | lm loss value: 9.5E+00 |\n"
                                      "0: [2026-01-01 00:00:10] iteration       20/     100 | lm loss: nan | grad norm: inf |\n");
  const LoadedRun run = load(path);
  ASSERT_TRUE(run.facts.log.known());
  const LogTable& log = run.facts.log.value();
  EXPECT_EQ(log.step, (std::vector<std::int64_t>{10, 20}));
  EXPECT_EQ(log.ce[0], 9.876);
  EXPECT_FALSE(log.has_loss[0]) << "lm loss is the cross-entropy, not the total";
  EXPECT_EQ(log.aux_loss[0], 1.0123);
  EXPECT_EQ(log.z_loss[0], 0.012);
  EXPECT_EQ(log.grad_norm[0], 1.234);
  EXPECT_EQ(log.learning_rate[0], 1.5e-4);
  EXPECT_TRUE(log.has_ce[1] && std::isnan(log.ce[1]));
  EXPECT_TRUE(std::isinf(log.grad_norm[1]));
  EXPECT_EQ(log.line, (std::vector<int>{2, 4}));
}

TEST(TrainingLog, MegatronArguments) {
  const LoadedRun run = load(test::fixture("logs/megatron/z-of-logits.log"));
  EXPECT_EQ(run.facts.micro_batch.value(), 2);
  EXPECT_EQ(run.facts.world_size.value(), 4);
  EXPECT_EQ(run.facts.accumulation.value(), 8) << "64 / (2 x 4)";
  EXPECT_EQ(run.facts.num_experts.value(), 64);
  EXPECT_EQ(run.facts.top_k.value(), 8);
  EXPECT_EQ(run.facts.expert_parallel.value(), 4);
  EXPECT_EQ(run.facts.aux_coefficient.value(), 0.01);
  EXPECT_EQ(run.facts.aux_coefficient.source().line, 7);
  EXPECT_EQ(run.facts.aux_uniform_value.value(), 1);
  EXPECT_EQ(run.facts.z_coefficient.value(), 0.001);
  EXPECT_FALSE(run.facts.gradient_checkpointing.value());
  EXPECT_EQ(run.facts.log.value().aux_digits, 7);
}

TEST(TrainingLog, MegatronPrintsAZeroBesideTheSequenceLoss) {
  const LoadedRun run = load(test::fixture("logs/megatron/sequence-loss.log"));
  for (const double aux : run.facts.log.value().aux_loss) EXPECT_GT(aux, 1.0);
}

TEST(TrainingLog, StepsOfOtherFrameworks) {
  const TempTree tree;
  const std::string swift = tree.write("logging.jsonl", "{\"loss\": 2.5, \"aux_loss\": 1.50, \"global_step/max_steps\": \"7/369\"}\n");
  const std::string llama = tree.write("trainer_log.jsonl", "{\"current_steps\": 5, \"total_steps\": 30, \"loss\": 4.9}\n");
  const LoadedRun a = load(swift), b = load(llama);
  EXPECT_EQ(a.facts.log.value().step, std::vector<std::int64_t>{7});
  EXPECT_EQ(a.facts.log.value().aux_digits, 3);
  EXPECT_EQ(b.facts.log.value().step, std::vector<std::int64_t>{5});
}

TEST(TrainingLog, Csv) {
  const TempTree tree;
  const std::string path = tree.write("wandb.csv", "\"_step\",\"run, 1 - train/loss\",val/loss,note\r\n1,2.5,,\"a, \"\"b\"\"\"\r\n2,nan,3e0,x\r\n3,,,\r\n");
  const LoadedRun run = load(path);
  ASSERT_TRUE(run.facts.log.known());
  const LogTable& log = run.facts.log.value();
  EXPECT_EQ(log.step, (std::vector<std::int64_t>{1, 2})) << "step 3 says nothing";
  EXPECT_EQ(log.loss[0], 2.5);
  EXPECT_TRUE(log.has_loss[1] && std::isnan(log.loss[1]));
  EXPECT_EQ(log.eval_loss[1], 3);
  EXPECT_FALSE(log.has_eval_loss[0]);
}

TEST(TrainingLog, CsvWithAByteOrderMark) {
  const TempTree tree;
  const LoadedRun run = load(tree.write("excel.csv", "\xEF\xBB\xBFstep,loss\r\n1,2.5\r\n"));
  ASSERT_TRUE(run.facts.log.known());
  EXPECT_EQ(run.facts.log.value().step, std::vector<std::int64_t>{1});
  EXPECT_TRUE(run.problems.empty());
}

TEST(TrainingLog, LinesThatAreNotRightAreTold) {
  const TempTree tree;
  const std::vector<std::pair<std::string, std::string>> files = {
      {"a.csv", "step,loss,note\n1,2.5,x\n2,None,x\n3,high,x\n4,2.4,x\n"},
      {"b.csv", "step,loss\n1,2.5\n2,2.4\n3,2.3,9\n"},
      {"c.jsonl", "{\"step\": 1, \"loss\": 2.5}\n{\"step\": 2, \"loss\": 2.4}\n\n{\"step\": 3,\n"}};
  for (const auto& [name, text] : files) {
    const LoadedRun run = load(tree.write(name, text));
    EXPECT_TRUE(run.facts.log.known()) << name;
    ASSERT_EQ(run.problems.size(), 1u) << name;
    EXPECT_FALSE(run.problems[0].fatal);
    EXPECT_EQ(run.problems[0].line, 4) << name;
    EXPECT_TRUE(run.problems[0].what.starts_with("1 line ")) << run.problems[0].what;
  }
  // A last line without its end was being written.
  EXPECT_TRUE(load(tree.write("d.csv", "step,loss\n1,2.5\n2")).problems.empty());
}

TEST(TrainingLog, ALogInAFolderIsToldWhereItIsNotRead) {
  const TempTree tree;
  const std::string log = tree.write("run/metrics.jsonl", "{\"step\": 1, \"loss\": 2.5}\n");
  tree.write("run/config.json", R"({"model_type": "mixtral"})");
  RunOptions options;
  options.paths.push_back(log.substr(0, log.rfind('/')));
  const auto told = [&] {
    int n = 0;
    const std::vector<LoadedRun> runs = load_runs(options);
    for (const InputProblem& p : runs[0].problems) n += p.file == log && !p.fatal && p.remedy.ends_with("--log " + log);
    return n;
  };
  EXPECT_EQ(told(), 1);
  options.logs.push_back(log);
  EXPECT_EQ(told(), 0);
}

TEST(TrainingLog, WhatIsNoLog) {
  const TempTree tree;
  for (const auto& [name, text] : std::vector<std::pair<std::string, std::string>>{
           {"data.jsonl", R"({"prompt": "step", "loss": "high"})"}, {"a.csv", "a,b\n1,2\n"}, {"a.log", "iteration 10 of 100\n"}, {"empty.log", ""}}) {
    const LoadedRun run = load(tree.write(name, text), true);
    ASSERT_FALSE(run.problems.empty()) << name;
    EXPECT_TRUE(run.problems[0].fatal);
    EXPECT_FALSE(run.facts.log.known());
  }
}

TEST(TraceFacts, StatementsOfATrace) {
  const TempTree tree;
  tree.write("t/trace.json", R"({"format": "moe-audit-trace", "version": 1, "packages": {"transformers": "4.57.6", "torch": "2.13.0+cpu"},
 "model": {"model_type": "mixtral", "config": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}},
 "training": {"framework": "transformers", "gradient_accumulation_steps": 8, "world_size": 2, "micro_batch_size": 3, "mixed_precision": "bf16"},
 "layers": [{"layer": 0, "num_experts": 4, "top_k": 2}]})");
  tree.write("t/records.jsonl", "{\"kind\": \"step\", \"step\": 0}\n");
  const LoadedRun run = load(tree.path("t"));
  EXPECT_TRUE(run.trace);
  EXPECT_EQ(run.facts.trace_format.value(), "moe-audit-trace");
  EXPECT_EQ(run.facts.accumulation.value(), 8);
  EXPECT_EQ(run.facts.accumulation.source().role, Role::kTrace);
  EXPECT_EQ(run.facts.world_size.value(), 2);
  EXPECT_EQ(run.facts.micro_batch.value(), 3);
  EXPECT_EQ(run.facts.model_type.value(), "mixtral");
  EXPECT_EQ(run.facts.num_experts.value(), 4);
  EXPECT_TRUE(run.facts.transformers.known());
  EXPECT_FALSE(run.facts.framework.known()) << "a trace does not say that there is no adapter, no engine: it states no framework";
  EXPECT_FALSE(run.facts.has_adapter.known());
}

TEST(TraceFacts, NoTraceAndABrokenOne) {
  EXPECT_EQ(load(test::fixture("models/mixtral-tf4")).facts.trace_format.value(), "none");
  const TempTree tree;
  tree.write("t/trace.json", "{");
  const LoadedRun run = load(tree.path("t"));
  EXPECT_FALSE(run.trace);
  EXPECT_FALSE(run.facts.trace_format.known());
  ASSERT_FALSE(run.problems.empty());
  EXPECT_TRUE(run.problems[0].fatal);
  RunOptions options;
  options.trace = test::fixture("models/mixtral-tf4");
  const std::vector<LoadedRun> runs = load_runs(options);
  ASSERT_FALSE(runs[0].problems.empty()) << "a model is no trace";
}

}  // namespace
}  // namespace moeaudit
