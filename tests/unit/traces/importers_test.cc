// Traces that others write: Megatron-LM's router trace and tokens per expert, routed-experts arrays, expert counts.
#include <gtest/gtest.h>

#include "audit/traces/npy.h"
#include "audit/traces/trace.h"
#include "tests/unit/inputs/temp_tree.h"
#include "tests/unit/traces/trace_files.h"

namespace moeaudit {
namespace {

using test::TempTree;

struct Opened {
  std::unique_ptr<Trace> trace;
  std::vector<InputProblem> problems;
};

Opened open(const std::string& path, const TraceOptions& options = {}) {
  Opened o;
  o.trace = open_trace(path, options, &o.problems);
  return o;
}

std::vector<std::int32_t> ids_of(const TensorView& v) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(v.elements()));
  EXPECT_TRUE(read_ids(v, 0, v.elements(), ids.data()));
  return ids;
}

std::vector<std::int64_t> counts_of(const Trace& trace, std::size_t record, int layer) {
  std::vector<WeightProblem> problems;
  const MicroBatch mb = trace.open(trace.micro_batches()[record], &problems);
  EXPECT_TRUE(problems.empty());
  if (!mb.layer(layer) || !mb.layer(layer)->tokens_per_expert) return {};
  std::vector<std::int64_t> counts(static_cast<std::size_t>(mb.layer(layer)->tokens_per_expert->elements()));
  EXPECT_TRUE(read_counts(*mb.layer(layer)->tokens_per_expert, 0, mb.layer(layer)->tokens_per_expert->elements(), counts.data()));
  return counts;
}

// ---- Megatron-LM router trace; lines as router_trace.py writes them ---------------------------------------------------

constexpr const char* kCalls =
    R"({"step": 7, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 0, "num_tokens": 2, "topk": 2, "logit_offset": 0, "logit_bytes": 16, "logit_shape": [2, 4], "top_indices": [[0, 3], [1, 2]]}
{"step": 7, "stage": "pre_dispatch", "block": "decoder", "layer": 2, "rank": 0, "num_tokens": 2, "topk": 2, "top_indices": [[2, 3], [0, 2]]}
{"step": 7, "stage": "pre_dispatch", "block": "mtp", "layer": 0, "rank": 0, "num_tokens": 2, "topk": 2, "mtp_idx": 0, "top_indices": [[0, 1], [0, 1]]}
{"step": 7, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 0, "num_tokens": 2, "topk": 2, "logit_offset": 16, "logit_bytes": 16, "logit_shape": [2, 4], "top_indices": [[3, 0], [3, 1]]}
)";

/// The files do not say what model it is.
TEST(MegatronRouterTrace, TakesTheModelFromAConfigBesideIt) {
  const TempTree tree;
  tree.write("router_trace_rank0.jsonl", kCalls);
  tree.write("config.json", R"({"model_type": "mixtral", "num_local_experts": 4})");
  const Opened o = open(tree.path());
  ASSERT_TRUE(o.trace);
  EXPECT_TRUE(o.problems.empty());
  EXPECT_EQ(o.trace->facts().model_type, "mixtral");
  for (const auto& [text, why] : {std::pair{R"({"model_type": "mixtral", "num_local_experts": 8})", "says 8 experts, the trace has 4"},
                                  std::pair{R"({"num_local_experts": 4})", "has no model_type"}, std::pair{"{", "JSON error"}}) {
    tree.write("config.json", text);
    const Opened other = open(tree.path());
    ASSERT_TRUE(other.trace);
    EXPECT_EQ(other.trace->facts().model_type, "");
    ASSERT_EQ(other.problems.size(), 1u) << text;
    EXPECT_NE(other.problems[0].what.find(why), std::string::npos) << other.problems[0].what;
    EXPECT_FALSE(other.problems[0].fatal);
  }
}

TEST(MegatronRouterTrace, CallsBecomeMicroBatches) {
  const TempTree tree;
  tree.write("router_trace_rank0.jsonl", kCalls);
  std::vector<std::uint16_t> logits(16);
  for (std::size_t i = 0; i < 16; ++i) logits[i] = static_cast<std::uint16_t>(0x3F80 + i);  // 1.0 and a bit
  tree.write("logits_rank0.bin", test::bytes_of(logits));
  tree.write("router_state_rank0.pt", "PK");
  const Opened o = open(tree.path());
  ASSERT_TRUE(o.trace);
  EXPECT_TRUE(o.problems.empty());
  const TraceFacts& f = o.trace->facts();
  EXPECT_EQ(f.format, "megatron-router-trace");
  EXPECT_EQ(f.experts, 4) << "from the shape of the logits";
  EXPECT_NE(f.note.find("pickle"), std::string::npos);
  ASSERT_EQ(f.layers.size(), 3u);
  EXPECT_EQ(f.layers[2].layer, 3) << "the prediction head comes behind the decoder";
  EXPECT_EQ(f.layers[2].module, "mtp.0.0");
  ASSERT_EQ(o.trace->micro_batches().size(), 2u);
  std::vector<WeightProblem> problems;
  const MicroBatch first = o.trace->open(o.trace->micro_batches()[0], &problems);
  const MicroBatch second = o.trace->open(o.trace->micro_batches()[1], &problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(first.layers.size(), 3u);
  ASSERT_EQ(second.layers.size(), 1u);
  EXPECT_EQ(ids_of(*first.layer(1)->selected_experts), (std::vector<std::int32_t>{0, 3, 1, 2}));
  EXPECT_EQ(ids_of(*second.layer(1)->selected_experts), (std::vector<std::int32_t>{3, 0, 3, 1}));
  EXPECT_FALSE(first.layer(2)->router_logits);
  double value = 0;
  ASSERT_TRUE(read_values(*second.layer(1)->router_logits, 0, 1, &value));
  EXPECT_EQ(value, 1 + 8 / 128.0) << "bfloat16 at byte 16";
}

TEST(MegatronRouterTrace, ExpertsFromIdsWithoutLogits) {
  const TempTree tree;
  tree.write("router_trace_rank3.jsonl", R"({"step": 0, "block": "decoder", "layer": 0, "rank": 3, "num_tokens": 1, "topk": 1, "top_indices": [[5]]})");
  EXPECT_EQ(open(tree.path()).trace->facts().experts, 6);
  EXPECT_NE(open(tree.path()).trace->facts().note.find("largest expert id is 5"), std::string::npos);
  const Opened told = open(tree.path(), {.experts = 8});
  EXPECT_EQ(told.trace->facts().experts, 8);
  EXPECT_EQ(told.trace->facts().note, "");
}

TEST(MegatronRouterTrace, FaultsAreNamed) {
  for (const auto& [line, says] : std::vector<std::pair<std::string, std::string>>{
           {R"({"step": 0, "layer": 0, "rank": 0, "num_tokens": 2, "topk": 1, "top_indices": [[5]]})", "num_tokens 2"},
           {R"({"step": 0, "layer": 0, "rank": 0, "num_tokens": 2, "topk": 1, "top_indices": [[5], [1, 2]]})", "differ"},
           {R"({"step": 0, "layer": 0, "rank": 1, "num_tokens": 1, "topk": 1, "top_indices": [[5]]})", "rank 1"},
           {R"({"step": 0, "layer": 0, "rank": 0, "num_tokens": 1, "topk": 1, "top_indices": [[70000]]})", "expert id"},
           {R"({"step": 0, "layer": 0, "rank": 0, "num_tokens": 1, "topk": 1, "top_indices": [["a"]]})", "expert id"},
           {R"({"step": 0, "layer": 0, "rank": 0})", "has not all"},
           {R"({"step": 0, "layer": 0 "rank": 0})", "JSON error"}}) {
    const TempTree tree;
    tree.write("router_trace_rank0.jsonl", line + "\n" + kCalls);
    const Opened o = open(tree.path());
    ASSERT_TRUE(o.trace) << line;
    ASSERT_EQ(o.problems.size(), 1u) << line;
    EXPECT_EQ(o.problems[0].line, 1);
    EXPECT_NE(o.problems[0].what.find(says), std::string::npos) << o.problems[0].what;
  }
}

TEST(MegatronRouterTrace, SidecarsThatDoNotFit) {
  const TempTree tree;
  tree.write("router_trace_rank0.jsonl", kCalls);
  const auto first_problem = [&] {
    const Opened o = open(tree.path());
    std::vector<WeightProblem> problems;
    const MicroBatch mb = o.trace->open(o.trace->micro_batches()[1], &problems);
    EXPECT_TRUE(mb.layer(1) && mb.layer(1)->selected_experts) << "the choices are there without the logits";
    EXPECT_FALSE(mb.layer(1)->router_logits);
    return problems.empty() ? "" : problems.front().what;
  };
  EXPECT_NE(first_problem(), "") << "no file";
  tree.write("logits_rank0.bin", std::string(31, 'x'));
  EXPECT_EQ(first_problem(), "ends at byte 32 of a file of 31");
}

// ---- Megatron-LM tokens per expert --------------------------------------------------------------------------------------

TEST(MegatronCounts, MicroBatchesAndRanks) {
  const TempTree tree;
  tree.write("tokens_per_expert/rank0.jsonl", "{\"iter\": 100, \"block\": \"decoder\", \"layer\": 3, \"tpe\": [[128, 64], [96, 80]]}\n"
                                              "{\"iter\": 100, \"block\": \"mtp\", \"mtp_idx\": 0, \"layer\": 1, \"tpe\": [[50, 50]]}\n");
  tree.write("tokens_per_expert/rank1.jsonl", "{\"iter\": 100, \"block\": \"decoder\", \"layer\": 3, \"tpe\": [[1, 2], [3, 4]]}\n"
                                              "{\"iter\": 100, \"block\": \"mtp\", \"mtp_idx\": 0, \"layer\": 1, \"tpe\": [[5, 6]]}\n");
  const Opened replicas = open(tree.path());
  ASSERT_TRUE(replicas.trace);
  EXPECT_EQ(replicas.trace->facts().experts, 2);
  ASSERT_EQ(replicas.trace->micro_batches().size(), 4u);
  EXPECT_EQ(counts_of(*replicas.trace, 0, 3), (std::vector<std::int64_t>{128, 64}));
  EXPECT_EQ(counts_of(*replicas.trace, 3, 3), (std::vector<std::int64_t>{3, 4})) << "micro-batch 1, rank 1";
  EXPECT_EQ(counts_of(*replicas.trace, 0, 4), (std::vector<std::int64_t>{50, 50})) << "the prediction head is layer 4";
  EXPECT_TRUE(counts_of(*replicas.trace, 2, 4).empty());

  const Opened parallel = open(tree.path("tokens_per_expert"), {.experts = 4});
  ASSERT_TRUE(parallel.trace);
  ASSERT_EQ(parallel.trace->micro_batches().size(), 2u);
  EXPECT_EQ(counts_of(*parallel.trace, 0, 3), (std::vector<std::int64_t>{128, 64, 1, 2})) << "two ranks hold the four experts";

  EXPECT_FALSE(open(tree.path(), {.experts = 3}).trace);
  std::filesystem::remove(tree.path("tokens_per_expert/rank1.jsonl"));
  const Opened half = open(tree.path(), {.experts = 4});
  EXPECT_FALSE(half.problems.empty()) << "half of the experts are not here, and do not look idle";
  EXPECT_TRUE(half.trace->micro_batches().empty());
}

// ---- routed experts -----------------------------------------------------------------------------------------------------

TEST(RoutedExperts, BothLayouts) {
  const TempTree tree;
  // two layers, three tokens, k = 2; layer 1 has the ids of layer 0 plus 4
  tree.write("a.npy", test::npy_text<std::int16_t>("<i2", "(3, 2, 2)", {0, 1, 4, 5, 1, 2, 5, 6, 2, 3, 6, 7}));
  tree.write("b.npy", test::npy_text<std::int16_t>("<i2", "(2, 3, 2)", {0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7}));
  // as one sequence of three tokens
  tree.write("c.npy", test::npy_text<std::int16_t>("<i2", "(1, 3, 2, 2)", {0, 1, 4, 5, 1, 2, 5, 6, 2, 3, 6, 7}));
  for (const char* file : {"a.npy", "b.npy", "c.npy"}) {
    const Opened o = open(tree.path(file), {.experts = 0, .layers_first = file[0] == 'b'});
    ASSERT_TRUE(o.trace);
    EXPECT_EQ(o.trace->facts().experts, 8);
    ASSERT_EQ(o.trace->micro_batches().size(), 1u);
    std::vector<WeightProblem> problems;
    const MicroBatch mb = o.trace->open(o.trace->micro_batches()[0], &problems);
    ASSERT_EQ(mb.layers.size(), 2u);
    EXPECT_EQ(ids_of(*mb.layer(0)->selected_experts), (std::vector<std::int32_t>{0, 1, 1, 2, 2, 3}));
    EXPECT_EQ(ids_of(*mb.layer(1)->selected_experts), (std::vector<std::int32_t>{4, 5, 5, 6, 6, 7}));
  }
}

TEST(RoutedExperts, BlocksOfTokens) {
  const TempTree tree;
  std::vector<std::uint8_t> ids(2500 * 2);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::uint8_t>(i % 7);
  tree.write("a.npy", test::npy_text("|u1", "(2500, 1, 2)", ids));
  const Opened o = open(tree.path("a.npy"));
  ASSERT_EQ(o.trace->micro_batches().size(), 3u);
  EXPECT_EQ(o.trace->micro_batches()[2].tokens, 452);
  std::vector<WeightProblem> problems;
  const MicroBatch last = o.trace->open(o.trace->micro_batches()[2], &problems);
  EXPECT_EQ(ids_of(*last.layer(0)->selected_experts)[903], (2 * 2499 + 1) % 7);
}

TEST(RoutedExperts, HeadersThatAreRefused) {
  const std::vector<std::int16_t> two = {0, 1};
  const std::string good = test::npy_text("<i2", "(1, 1, 2)", two);
  NpyHeader header;
  std::string why;
  ASSERT_TRUE(parse_npy_header(good, static_cast<std::int64_t>(good.size()), &header, &why)) << why;
  EXPECT_EQ(header.bytes, 4);
  for (const std::string& bad :
       {std::string("PK\x03\x04"), good.substr(0, 11), good.substr(0, 60), good.substr(0, good.size() - 1), test::npy_text("<f4", "(1, 1, 1)", two),
        test::npy_text(">i2", "(1, 1, 2)", two), test::npy_text("<i2", "(1, 1, 2)", two, "True"), test::npy_text("<i2", "(-1, 1, 2)", two),
        test::npy_text("<i2", "(999999999999999999, 999999999999999999, 2)", two), test::npy_text("<i2", "1", two)}) {
    EXPECT_FALSE(parse_npy_header(bad, static_cast<std::int64_t>(bad.size()), &header, &why));
    EXPECT_FALSE(why.empty());
  }
  const TempTree tree;
  tree.write("flat.npy", test::npy_text("<i2", "(2,)", two));
  EXPECT_NE(open(tree.path("flat.npy")).problems.at(0).what.find("1 dimensions"), std::string::npos);
}

/// What is not sound in an .npz or .safetensors is refused with a reason: cut short at every byte, one byte changed, and more.
TEST(RoutedExperts, DamagedArchives) {
  const TempTree tree;
  for (const std::string name : {"routed_experts.npz", "routed_experts.safetensors"}) {
    std::string good, error;
    ASSERT_TRUE(read_file(test::fixture("health/" + name), &good, &error)) << error;
    const auto try_it = [&](const std::string& text) {
      tree.write(name, text);
      const Opened o = open(tree.path(name));
      EXPECT_TRUE(o.trace || (!o.problems.empty() && !o.problems[0].what.empty() && !o.problems[0].remedy.empty()));
      if (!o.trace) return;
      std::vector<WeightProblem> problems;
      for (const MicroBatchRecord& r : o.trace->micro_batches()) o.trace->open(r, &problems);
    };
    for (std::size_t n = 0; n < good.size(); n += n < 600 || n > good.size() - 600 ? 1 : 37) try_it(good.substr(0, n));
    for (std::size_t i = 0; i < good.size(); i += i < 600 || i > good.size() - 600 ? 1 : 37) {
      std::string text = good;
      text[i] = static_cast<char>(text[i] ^ 0xff);
      try_it(text);
    }
  }
}

TEST(RoutedExperts, ArraysThatAreRefused) {
  EXPECT_NE(open(test::fixture("health/compressed.npz")).problems.at(0).what.find("compressed"), std::string::npos);
  const TempTree tree;
  const auto problem = [&](const std::string& text) {
    tree.write("a.safetensors", text);
    const Opened o = open(tree.path("a.safetensors"));
    EXPECT_FALSE(o.trace);
    return o.problems.empty() ? "" : o.problems[0].what;
  };
  const std::vector<float> values(8);
  const std::vector<std::int16_t> ids(8);
  const std::vector<std::uint8_t> mask(3, 1);
  EXPECT_EQ(problem(test::SafetensorsText().add("routed_experts", "F32", {2, 2, 2}, values).text()), "routed_experts is of F32, not of integers");
  EXPECT_EQ(problem(test::SafetensorsText().add("routed_experts", "I16", {4, 2}, ids).text()), "is an array of 2 dimensions, not 3 or 4");
  EXPECT_EQ(problem(test::SafetensorsText().add("routed_experts", "I16", {2, 2, 2}, ids).add("attention_mask", "U8", {3}, mask).text()),
            "has an attention_mask of another shape than the tokens of routed_experts");
  EXPECT_EQ(recognise_trace(tree.write("b.safetensors", test::SafetensorsText().add("x", "I16", {2, 2, 2}, ids).text())), TraceFormat::kNone)
      << "a model";
}

// ---- counts -------------------------------------------------------------------------------------------------------------

TEST(ExpertCounts, PublishedCounts) {
  const Opened o = open(test::fixture("expert_counts/mixtral-8x7b_c4.json"));
  ASSERT_TRUE(o.trace);
  EXPECT_EQ(o.trace->facts().experts, 8);
  EXPECT_EQ(o.trace->facts().top_k, 2);
  ASSERT_EQ(o.trace->facts().layers.size(), 3u);
  EXPECT_EQ(counts_of(*o.trace, 0, 15), (std::vector<std::int64_t>{47396, 58718, 55366, 32510, 55049, 57385, 57170, 54198}));
}

TEST(ExpertCounts, Refused) {
  const TempTree tree;
  for (const std::string text :
       {R"({"num_experts": 2, "top_k": 1, "layers": {"0": [1]}})", R"({"num_experts": 2, "top_k": 1, "layers": {"0": [1, -1]}})",
        R"({"num_experts": 2, "top_k": 3, "layers": {"0": [1, 1]}})", R"({"num_experts": 2, "top_k": 1, "layers": {"x": [1, 1]}})",
        R"({"num_experts": 2, "top_k": 1, "layers": [1, 1]})", R"({"num_experts": 2, "top_k": 1, "layers": {"0": [1, 1]})"}) {
    const Opened o = open(tree.write("c.json", text));
    EXPECT_FALSE(o.trace) << text;
    ASSERT_FALSE(o.problems.empty()) << text;
    EXPECT_TRUE(o.problems.front().fatal);
  }
}

}  // namespace
}  // namespace moeaudit
