// A trace in its own format: what is read, what is refused, and what one bad piece does to the rest.
#include "audit/traces/trace.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/unit/inputs/temp_tree.h"
#include "tests/unit/traces/trace_files.h"

namespace moeaudit {
namespace {

using test::SafetensorsText;
using test::TempTree;

constexpr const char* kHead = R"({"format": "moe-audit-trace", "version": 1,
 "recorder": {"name": "moe_audit_recorder.py", "version": "1"},
 "packages": {"torch": "2.13.0", "transformers": "4.57.6", "trl": null},
 "model": {"model_type": "mixtral", "class": "MixtralForCausalLM", "hidden_size": 2, "num_experts": 3, "top_k": 2, "config": {"num_hidden_layers": 2}},
 "training": {"framework": "transformers", "gradient_accumulation_steps": 2, "world_size": 1, "mixed_precision": "bf16", "gradient_checkpointing": false},
 "coefficients": {"router_aux_loss_coef": 0.001, "router_z_loss_coef": null},
 "output_router_logits": true, "unknown_key": [1, 2],
 "layers": [{"layer": 1, "module": "model.layers.1.mlp.gate", "num_experts": 3, "top_k": 2, "logits_dtype": "float32", "trainable": true},
            {"layer": 0, "weight_dtype": "bfloat16"}]})";

constexpr const char* kRecords =
    R"({"kind": "micro_batch", "step": 1, "micro_batch": 0, "rank": 0, "file": "b.safetensors", "tokens": 4, "batch": [2, 2], "loss": NaN}
{"kind": "micro_batch", "step": 0, "micro_batch": 1, "rank": 0, "file": "c.safetensors", "tokens": 8, "sampled_tokens": 2}

{"kind": "micro_batch", "step": 0, "micro_batch": 0, "rank": 0, "file": "a.safetensors", "tokens": 4, "batch": [2, 2], "ce": 2.5, "aux_loss": null}
{"kind": "step", "step": 0, "rank": 0, "file": "s.safetensors", "grad_norm": 1.5, "reported": {"loss": 2.5, "note": "x"}}
)";

std::string good_micro_batch() {
  return SafetensorsText()
      .add<std::uint8_t>("token_mask", "U8", {4}, {1, 1, 1, 0})
      .add<float>("layer.0.router_logits", "F32", {4, 3}, {1, 2, 3, 3, 2, 1, 1, 3, 2, 0, 0, 0})
      .add<std::int16_t>("layer.0.selected_experts", "I16", {4, 2}, {2, 1, 0, 1, 1, 2, 0, 1})
      .add<std::int64_t>("layer.0.tokens_per_expert", "I64", {3}, {1, 3, 2})
      .add<float>("layer.1.router_logits", "F32", {4, 3}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
      .text();
}

struct Opened {
  std::unique_ptr<Trace> trace;
  std::vector<InputProblem> problems;
};

Opened open(const std::string& path) {
  Opened o;
  o.trace = open_trace(path, {}, &o.problems);
  return o;
}

class TraceTest : public testing::Test {
 protected:
  TraceTest() {
    tree.write("trace.json", kHead);
    tree.write("records.jsonl", kRecords);
    tree.write("a.safetensors", good_micro_batch());
    tree.write("s.safetensors", SafetensorsText()
                                    .add<float>("layer.0.router_weight", "F32", {3, 2}, {1, 2, 3, 4, 5, 6})
                                    .add<float>("layer.0.correction_bias_after", "F32", {3}, {0, 1, 2})
                                    .text());
  }
  TempTree tree;
};

TEST_F(TraceTest, StaticFacts) {
  const Opened o = open(tree.path());
  ASSERT_TRUE(o.trace);
  EXPECT_TRUE(o.problems.empty()) << o.problems.front().what;
  const TraceFacts& f = o.trace->facts();
  EXPECT_EQ(f.model_type, "mixtral");
  EXPECT_EQ(f.packages.size(), 2u);
  EXPECT_EQ(f.experts, 3);
  EXPECT_EQ(f.accumulation, 2);
  EXPECT_EQ(f.aux_coefficient, 0.001);
  EXPECT_FALSE(f.z_coefficient);
  EXPECT_EQ(f.gradient_checkpointing, false);
  EXPECT_TRUE(f.config.find("num_hidden_layers"));
  ASSERT_EQ(f.layers.size(), 2u);
  EXPECT_EQ(f.layers[0].layer, 0);
  EXPECT_EQ(f.layers[0].experts, 3) << "from the model";
  EXPECT_EQ(f.layers[0].weight_dtype, DType::kBF16);
  EXPECT_EQ(f.layer(1)->module, "model.layers.1.mlp.gate");
  EXPECT_EQ(f.layer(2), nullptr);
}

TEST_F(TraceTest, RecordsInOrder) {
  const Opened o = open(tree.path("trace.json"));
  ASSERT_TRUE(o.trace);
  ASSERT_EQ(o.trace->steps().size(), 2u);
  const TraceStep& first = o.trace->steps()[0];
  ASSERT_EQ(o.trace->micro_batches_of(first).size(), 2u);
  const MicroBatchRecord& mb = o.trace->micro_batches_of(first)[0];
  EXPECT_EQ(mb.file, "a.safetensors");
  EXPECT_EQ(mb.line, 4);
  EXPECT_EQ(mb.ce, 2.5);
  EXPECT_FALSE(mb.aux_loss);
  EXPECT_EQ(o.trace->micro_batches_of(first)[1].rows(), 2);
  ASSERT_EQ(o.trace->ranks_of(first).size(), 1u);
  EXPECT_EQ(o.trace->ranks_of(first)[0].find("loss"), 2.5);
  EXPECT_FALSE(o.trace->ranks_of(first)[0].find("note"));
  const TraceStep& second = o.trace->steps()[1];
  ASSERT_EQ(o.trace->micro_batches_of(second).size(), 1u);
  EXPECT_TRUE(std::isnan(*o.trace->micro_batches_of(second)[0].loss)) << "NaN was recorded, which is not absent";
}

TEST_F(TraceTest, TensorsOfAMicroBatch) {
  const Opened o = open(tree.path());
  ASSERT_TRUE(o.trace);
  std::vector<WeightProblem> problems;
  const MicroBatch mb = o.trace->open(o.trace->micro_batches()[0], &problems);
  EXPECT_TRUE(problems.empty()) << problems.front().what;
  ASSERT_EQ(mb.layers.size(), 2u);
  const LayerTensors* layer = mb.layer(0);
  ASSERT_TRUE(layer && layer->router_logits && layer->selected_experts);
  EXPECT_FALSE(layer->routing_weights);
  EXPECT_EQ(layer->top_k, 2);
  std::vector<double> row(3);
  ASSERT_TRUE(read_values(*layer->router_logits, 3, 3, row.data()));
  EXPECT_EQ(row, (std::vector<double>{3, 2, 1}));
  std::vector<std::int32_t> ids(2);
  ASSERT_TRUE(read_ids(*layer->selected_experts, 6, 2, ids.data()));
  EXPECT_EQ(ids, (std::vector<std::int32_t>{0, 1}));
  std::vector<std::uint8_t> mask(4);
  ASSERT_TRUE(read_flags(*mb.token_mask, 0, 4, mask.data()));
  EXPECT_EQ(mask[3], 0);
  EXPECT_FALSE(read_ids(*layer->selected_experts, 7, 2, ids.data())) << "beyond the end";
  drop_pages(*layer->router_logits, 12);
  ASSERT_TRUE(read_values(*layer->router_logits, 0, 3, row.data()));
  EXPECT_EQ(row[2], 3) << "dropped pages are read again";
  const StepTensors step = o.trace->open(o.trace->steps_on_ranks()[0], &problems);
  ASSERT_TRUE(step.layer(0) && step.layer(0)->router_weight && step.layer(0)->correction_bias_after);
  EXPECT_FALSE(step.layer(0)->correction_bias_before);
}

TEST_F(TraceTest, ABadTensorIsLeftOutAndNamed) {
  tree.write("a.safetensors", SafetensorsText()
                                  .add<std::int32_t>("token_mask", "I32", {4}, {1, 1, 1, 1})
                                  .add<float>("layer.0.router_logits", "F32", {4, 2}, {1, 2, 3, 4, 5, 6, 7, 8})
                                  .add<std::int64_t>("layer.0.selected_experts", "I64", {4, 2}, {0, 1, 0, 1, 0, 1, 0, 1})
                                  .add<float>("layer.0.routing_weights", "F32", {8}, {1, 2, 3, 4, 5, 6, 7, 8})
                                  .add<std::uint16_t>("layer.1.router_logits", "BF16", {4, 3}, std::vector<std::uint16_t>(12))
                                  .add<float>("layer.7.router_logits", "F32", {1}, {1})
                                  .add<float>("layer.x.router_logits", "F32", {1}, {1})
                                  .add<float>("something.else", "F32", {1}, {1})
                                  .text());
  const Opened o = open(tree.path());
  std::vector<WeightProblem> problems;
  const MicroBatch mb = o.trace->open(o.trace->micro_batches()[0], &problems);
  ASSERT_EQ(problems.size(), 6u);
  std::string all;
  for (const WeightProblem& p : problems) all += p.tensor + ": " + p.what + "\n";
  EXPECT_NE(all.find("token_mask: holds I32"), std::string::npos) << all;
  EXPECT_NE(all.find("layer.0.router_logits: has shape [4, 2], not [4, 3] ([tokens, num_experts])"), std::string::npos) << all;
  EXPECT_NE(all.find("layer.0.routing_weights: has shape [8], not [4, 2]"), std::string::npos) << all;
  EXPECT_NE(all.find("layer.1.router_logits: holds BF16, trace.json says F32"), std::string::npos) << all;
  EXPECT_NE(all.find("lists no layer 7"), std::string::npos) << all;
  EXPECT_NE(all.find("layer.x.router_logits: names no layer"), std::string::npos) << all;
  EXPECT_FALSE(mb.token_mask);
  ASSERT_TRUE(mb.layer(0));
  EXPECT_TRUE(mb.layer(0)->selected_experts) << "the sound tensor stays";
  EXPECT_FALSE(mb.layer(0)->router_logits);
}

TEST_F(TraceTest, Sampled) {
  const auto with = [&](std::vector<std::int32_t> at) {
    tree.write("c.safetensors", SafetensorsText()
                                    .add<std::int32_t>("sampled", "I32", {2}, at)
                                    .add<std::uint8_t>("token_mask", "U8", {2}, {1, 1})
                                    .add<std::int16_t>("layer.0.selected_experts", "I16", {2, 2}, {0, 1, 1, 2})
                                    .text());
    const Opened o = open(tree.path());
    std::vector<WeightProblem> problems;
    const MicroBatch mb = o.trace->open(o.trace->micro_batches()[1], &problems);
    EXPECT_TRUE(mb.token_mask && mb.layer(0)->selected_experts);
    EXPECT_EQ(mb.sampled.has_value(), problems.empty());
    return problems.empty();
  };
  EXPECT_TRUE(with({3, 7}));
  EXPECT_FALSE(with({7, 3})) << "not ascending";
  EXPECT_FALSE(with({3, 8})) << "beyond the 8 tokens";
  EXPECT_FALSE(with({-1, 3}));
}

TEST_F(TraceTest, ALayerThatSawSomeOfTheTokens) {
  const auto with = [&](std::vector<std::int32_t> at, std::vector<WeightProblem>* problems) {
    const auto n = static_cast<std::int64_t>(at.size());
    SafetensorsText file;
    file.add<std::uint8_t>("token_mask", "U8", {4}, {1, 1, 1, 0}).add<std::int32_t>("layer.0.seen", "I32", {n}, at);
    if (n > 0) file.add<std::int16_t>("layer.0.selected_experts", "I16", {2, 2}, {0, 1, 1, 2});
    tree.write("a.safetensors", file.add<float>("layer.1.router_logits", "F32", {4, 3}, std::vector<float>(12)).text());
    const Opened o = open(tree.path());
    const MicroBatchRecord record = o.trace->micro_batches()[0];
    MicroBatch mb = o.trace->open(o.trace->micro_batches()[0], problems);
    EXPECT_EQ(mb.layer(1)->rows(record), 4);
    EXPECT_FALSE(mb.layer(1)->saw_nothing());
    if (mb.layer(0)) EXPECT_EQ(mb.layer(0)->rows(record), n);
    return mb;
  };
  std::vector<WeightProblem> problems;
  MicroBatch mb = with({1, 3}, &problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_TRUE(mb.layer(0)->selected_experts);
  mb = with({}, &problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_TRUE(mb.layer(0)->saw_nothing());
  mb = with({3, 1}, &problems);
  ASSERT_EQ(problems.size(), 1u) << "not ascending";
  EXPECT_FALSE(mb.layer(0)) << "nobody knows whose rows its tensors hold";
  problems.clear();
  mb = with({1, 2, 3}, &problems);
  ASSERT_EQ(problems.size(), 1u) << "[2, 2] are not the choices of three tokens";
  EXPECT_NE(problems[0].what.find("seen tokens"), std::string::npos);
}

TEST_F(TraceTest, FilesThatAreMissingOrCut) {
  const Opened o = open(tree.path());
  std::vector<WeightProblem> problems;
  o.trace->open(o.trace->micro_batches()[2], &problems);
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_NE(problems[0].file.find("b.safetensors"), std::string::npos);
  tree.write("a.safetensors", good_micro_batch().substr(0, good_micro_batch().size() - 1));
  problems.clear();
  o.trace->open(o.trace->micro_batches()[0], &problems);
  EXPECT_FALSE(problems.empty());
}

TEST_F(TraceTest, AFileThatShrinksUnderTheReader) {
  SafetensorsText big;
  big.add<float>("token_loss", "F32", {4}, {1, 2, 3, 4});
  big.add<float>("padding", "F32", {100'000}, std::vector<float>(100'000, 1.f));
  big.add<float>("layer.0.hidden_states", "F32", {4, 2}, std::vector<float>(8));
  tree.write("a.safetensors", big.text());
  const Opened o = open(tree.path());
  std::vector<WeightProblem> problems;
  const MicroBatch mb = o.trace->open(o.trace->micro_batches()[0], &problems);
  ASSERT_TRUE(mb.layer(0) && mb.layer(0)->hidden_states);
  std::filesystem::resize_file(tree.path("a.safetensors"), 4096);
  std::vector<float> values(8);
  EXPECT_FALSE(read_values(*mb.layer(0)->hidden_states, 0, 8, values.data()));
}

/// The one problem that a records.jsonl with this as its first line gives.
InputProblem problem_of(const TempTree& tree, const std::string& line) {
  tree.write("records.jsonl", line + "\n" + kRecords);
  const Opened o = open(tree.path());
  EXPECT_TRUE(o.trace) << "the other records are there";
  if (o.trace) {
    EXPECT_EQ(o.trace->micro_batches().size(), 3u);
  }
  EXPECT_EQ(o.problems.size(), 1u) << line;
  return o.problems.empty() ? InputProblem{} : o.problems.front();
}

TEST_F(TraceTest, RecordsThatAreRefused) {
  const std::string start = R"({"kind": "micro_batch", "step": 5, "micro_batch": 0, )";
  for (const auto& [line, says] : std::vector<std::pair<std::string, std::string>>{
           {"[1]", "no JSON object"},
           {"{\"kind\": \"micro_batch\", \"step\": 5}", "no \"micro_batch\""},
           {"{\"kind\": \"epoch\", \"step\": 5}", "\"epoch\""},
           {start + R"("file": "../x.safetensors"})", "not"},
           {start + R"("file": "/etc/passwd"})", "not"},
           {start + R"("tokens": "many"})", "\"many\""},
           {start + R"("tokens": -4})", "-4"},
           {start + R"("tokens": 4, "batch": [3, 2]})", "6 tokens"},
           {start + R"("tokens": 4, "sampled_tokens": 5})", "5 of 4"},
           {start + R"("loss": "2.5"})", "2.5"},
           {start + "oops", "JSON error"}}) {
    const InputProblem p = problem_of(tree, line);
    EXPECT_TRUE(p.fatal) << line;
    EXPECT_EQ(p.line, 1) << line;
    EXPECT_NE(p.what.find(says), std::string::npos) << line << " -> " << p.what;
  }
}

TEST_F(TraceTest, ARunThatDiedLeavesAUsableTrace) {
  tree.write("records.jsonl", std::string(kRecords) + R"({"kind": "micro_batch", "st)");
  const Opened o = open(tree.path());
  ASSERT_TRUE(o.trace);
  EXPECT_EQ(o.trace->micro_batches().size(), 3u);
  ASSERT_EQ(o.problems.size(), 1u);
  EXPECT_FALSE(o.problems[0].fatal);
  EXPECT_NE(o.problems[0].what.find("cut short"), std::string::npos);
}

TEST_F(TraceTest, EachRankHasItsRecords) {
  tree.write("records_rank10.jsonl", R"({"kind": "micro_batch", "step": 0, "micro_batch": 0, "rank": 10})" "\n");
  tree.write("records_rank2.jsonl", R"({"kind": "micro_batch", "step": 0, "micro_batch": 0, "rank": 2})" "\noops\n");
  const Opened o = open(tree.path());
  ASSERT_TRUE(o.trace);
  std::vector<std::int64_t> ranks;
  for (const MicroBatchRecord& r : o.trace->micro_batches()) {
    if (r.step == 0 && r.micro_batch == 0) ranks.push_back(r.rank);
  }
  EXPECT_EQ(ranks, (std::vector<std::int64_t>{0, 2, 10}));
  ASSERT_EQ(o.problems.size(), 1u);
  EXPECT_NE(o.problems[0].file.find("records_rank2.jsonl"), std::string::npos) << "an error names the rank's file";
}

TEST_F(TraceTest, ARepeatedRecordCountsOnce) {
  tree.write("records.jsonl", std::string(kRecords) + R"({"kind": "micro_batch", "step": 0, "micro_batch": 0, "tokens": 16})" + "\n");
  const Opened o = open(tree.path());
  ASSERT_EQ(o.trace->micro_batches().size(), 3u);
  EXPECT_EQ(o.trace->micro_batches()[0].tokens, 16) << "the later one";
  ASSERT_EQ(o.problems.size(), 1u);
  EXPECT_FALSE(o.problems[0].fatal);
}

TEST_F(TraceTest, HeadsThatAreRefused) {
  const auto refused = [&](const std::string& from, const std::string& to) {
    std::string head = kHead;
    const std::size_t at = head.find(from);
    EXPECT_NE(at, std::string::npos);
    tree.write("trace.json", head.replace(at, from.size(), to));
    const Opened o = open(tree.path());
    return !o.trace && !o.problems.empty() && o.problems.front().fatal && !o.problems.front().remedy.empty();
  };
  EXPECT_TRUE(refused("\"version\": 1,", "\"version\": 2,"));
  EXPECT_TRUE(refused("moe-audit-trace", "another"));
  EXPECT_TRUE(refused("\"gradient_accumulation_steps\": 2", "\"gradient_accumulation_steps\": \"two\""));
  EXPECT_TRUE(refused("\"layer\": 1, ", ""));
  EXPECT_TRUE(refused("{\"layer\": 0,", "{\"layer\": 1,")) << "twice";
  EXPECT_TRUE(refused("\"num_experts\": 3, \"top_k\": 2, \"logits", "\"num_experts\": 3, \"top_k\": 4, \"logits"));
  EXPECT_TRUE(refused("\"logits_dtype\": \"float32\"", "\"logits_dtype\": \"fp32\""));
  EXPECT_TRUE(refused("\"layers\": [", "\"layers\": [5, "));
  EXPECT_TRUE(refused("{\"format\"", "{\"format"));
  tree.write("trace.json", kHead);
  tree.write("records.jsonl", "\n");
  EXPECT_FALSE(open(tree.path()).trace) << "no record";
  EXPECT_FALSE(open(tree.path("records.jsonl")).trace) << "no trace";
}

}  // namespace
}  // namespace moeaudit
