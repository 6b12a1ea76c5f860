// Routers, missing and unexpected tensors of the fixtures (counted by fixtures/make/measures_golden.py) and of files that a
// test spoilt on purpose.
#include "tests/unit/measures/fixture_model.h"

#include <algorithm>
#include <set>
#include <tuple>

namespace moeaudit {
extern const Measure measure_header_scan;
namespace {

using namespace test;

const nlohmann::json& golden() {
  static const nlohmann::json json = read_json(fixture("measures/golden.json"));
  return json;
}

/// Facts of a fixture; nested-text-config stands for a model whose family nobody described.
nlohmann::json facts_of(const std::string& name) {
  nlohmann::json facts = model_facts(fixture(name));
  if (name == "models/nested-text-config") facts.erase("model.family");
  return facts;
}

Bench scan(const nlohmann::json& facts, TensorStore store) {
  Bench bench;
  bench.facts = testing::facts_from_json(facts);
  bench.model = std::move(store);
  bench.run(measure_header_scan);
  return bench;
}

TEST(HeaderScan, RoutersOfEveryFixture) {
  std::size_t models = 0, by_shape = 0;
  for (const auto& [name, expected] : golden()["models"].items()) {
    SCOPED_TRACE(name);
    const Bench bench = scan(facts_of(name), open_weights(fixture(name)));
    const auto& rows = expected["routers"];
    if (rows.empty()) {
      EXPECT_FALSE(bench.facts.routers.known());
      EXPECT_EQ(bench.facts.routers.why_unknown(), "no experts in the weight files");
      continue;
    }
    ASSERT_TRUE(bench.facts.routers.known()) << bench.facts.routers.why_unknown();
    const RouterTable& t = bench.facts.routers.value();
    ASSERT_EQ(t.layer.size(), rows.size());
    const bool known = bench.facts.family.known();
    EXPECT_EQ(bench.facts.routers.origin(), known ? Origin::kMeasured : Origin::kDerived);
    by_shape += !known;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(t.layer[i], rows[i]["layer"]);
      EXPECT_EQ(t.tensor[i], rows[i]["tensor"]);
      EXPECT_EQ(t.dtype[i], DType::kBF16);
      EXPECT_EQ(t.experts[i], rows[i]["experts"]);
      EXPECT_EQ(t.hidden[i], rows[i]["hidden"]);
      EXPECT_EQ(t.expert_count[i], rows[i]["expert_count"]);
      EXPECT_EQ(t.expert_hidden[i], 64);  // hidden_size of every fixture
      EXPECT_EQ(t.fused[i] != 0, rows[i]["fused"]);
      EXPECT_EQ(t.bias[i], rows[i]["bias"]);
    }
    ++models;
  }
  EXPECT_EQ(models, 16u);
  EXPECT_EQ(by_shape, 1u);  // nested-text-config
}

TEST(HeaderScan, HealthyFixturesMissNothingAndHaveNothingUnknown) {
  std::size_t compared = 0;
  for (const auto& [name, expected] : golden()["models"].items()) {
    const Bench bench = scan(facts_of(name), open_weights(fixture(name)));
    if (!bench.facts.family.known()) continue;
    ASSERT_TRUE(bench.facts.tensor_diff.known()) << name << ": " << bench.facts.tensor_diff.why_unknown();
    EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{}) << name;
    EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, std::vector<std::string>{}) << name;
    ++compared;
  }
  EXPECT_EQ(compared, 15u);
}

/// The fixture's weights with some changes, in one file.
TensorStore spoilt(const TempTree& tree, const std::string& name, const std::vector<std::string>& without,
                   const std::function<void(WeightFile&)>& more = {}) {
  const TensorStore whole = open_weights(fixture(name));
  WeightFile file;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const std::string tensor(whole[i].name);
    if (std::find(without.begin(), without.end(), tensor) == without.end()) file.copy(whole[i], tensor);
  }
  if (more) more(file);
  return open_weights(tree.write("model.safetensors", file.text()));
}

TEST(HeaderScan, MissingTensorsAreNamed) {
  const TempTree tree;
  const std::vector<std::string> gone = {"model.layers.1.block_sparse_moe.gate.weight", "model.layers.2.block_sparse_moe.experts.5.w2.weight"};
  const Bench bench = scan(model_facts(fixture("models/mixtral-tf4")), spoilt(tree, "models/mixtral-tf4", gone));
  EXPECT_EQ(bench.facts.tensor_diff.value().missing, gone);
  EXPECT_EQ(bench.facts.tensor_diff.value().missing_shard, (std::vector<std::string>{"", ""}));
  EXPECT_EQ(bench.facts.routers.value().layer, (std::vector<int>{0, 2, 3}));
  EXPECT_EQ(bench.facts.routers.value().expert_count, (std::vector<std::int64_t>{8, 8, 8}));  // w1 and w3 of expert 5 are there
}

TEST(HeaderScan, ShapesOfHealthyFixtures) {
  for (const auto& [name, expected] : golden()["models"].items()) {
    const Bench bench = scan(facts_of(name), open_weights(fixture(name)));
    if (!bench.facts.family.known()) continue;
    const ShapeTable& t = bench.facts.weight_shapes.value();
    EXPECT_EQ(t.tensor, std::vector<std::string>{}) << name;
    EXPECT_GT(t.judged, 30) << name;
    EXPECT_EQ(bench.facts.expert_storage.value().dtype, std::vector<DType>{DType::kBF16}) << name;
  }
}

TEST(HeaderScan, StacksOfEitherOrderOfSides) {
  for (const char* name : {"models/qwen3_vl_moe-tf4", "models/qwen3_vl_moe-tf5"}) {  // [E, H, 2 I] and [E, 2 I, H] under one name
    SCOPED_TRACE(name);
    nlohmann::json facts = model_facts(fixture(name));
    facts["model.moe_layers"] = {1};  // mlp_only_layers
    const Bench bench = scan(facts, open_weights(fixture(name)));
    EXPECT_EQ(bench.facts.weight_shapes.value().tensor, std::vector<std::string>{});
    EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{});
    EXPECT_EQ(bench.facts.routers.value().expert_hidden, std::vector<std::int64_t>{64});
    EXPECT_EQ(bench.facts.routers.value().expert_count, std::vector<std::int64_t>{8});
  }
}

TEST(HeaderScan, RowsOfTheRouterBeyondOneAnExpert) {
  for (const auto& [name, extra, columns] : {std::tuple{"inkling_text-tf5", 2, 64}, {"zaya-tf5", 1, -1}}) {  // zaya: the last matrix of an MLP
    SCOPED_TRACE(name);
    nlohmann::json facts = model_facts(fixture(std::string("models/") + name));
    if (name == std::string("inkling_text-tf5")) facts["model.moe_layers"] = {1};  // mlp_layer_types
    for (const int told : {extra, extra + 1}) {
      facts["router.extra_rows"] = told;
      const Bench bench = scan(facts, open_weights(fixture(std::string("models/") + name)));
      EXPECT_EQ(bench.facts.routers.value().experts.back(), 8 + extra);
      EXPECT_EQ(bench.facts.routers.value().expert_count.back(), 8);
      EXPECT_EQ(bench.facts.routers.value().hidden.back(), columns);
      EXPECT_EQ(bench.facts.weight_shapes.value().tensor.empty(), told == extra);
      EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{});
    }
  }
}

TEST(HeaderScan, MatricesBehindTheExperts) {  // LongCat of transformers 5 has a gate and an up matrix more a choice that runs no expert
  for (const char* name : {"longcat_flash-tf4", "longcat_flash-tf5"}) {
    SCOPED_TRACE(name);
    nlohmann::json facts = model_facts(fixture(std::string("models/") + name));
    facts["router.extra_rows"] = 4;
    const Bench bench = scan(facts, open_weights(fixture(std::string("models/") + name)));
    EXPECT_EQ(bench.facts.routers.value().experts, (std::vector<std::int64_t>{12, 12}));
    EXPECT_EQ(bench.facts.routers.value().expert_count, (std::vector<std::int64_t>{8, 8}));
    EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{});
    EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, std::vector<std::string>{});
    EXPECT_EQ(bench.facts.weight_shapes.value().tensor, std::vector<std::string>{});
  }
  nlohmann::json facts = model_facts(fixture("models/longcat_flash-tf5"));
  facts["router.extra_rows"] = 3;
  const auto fewer = scan(facts, open_weights(fixture("models/longcat_flash-tf5"))).facts.tensor_diff.value();
  EXPECT_EQ(fewer.unexpected, (std::vector<std::string>{"model.layers.0.mlp.experts.11.gate_proj.weight", "model.layers.0.mlp.experts.11.up_proj.weight",
                                                        "model.layers.1.mlp.experts.11.gate_proj.weight", "model.layers.1.mlp.experts.11.up_proj.weight"}));
}

/// ERNIE-4.5-VL: routers stored [hidden, experts], two in a layer, and as many experts for images behind those for text.
TEST(HeaderScan, ASecondSetOfExperts) {
  const nlohmann::json facts = model_facts(fixture("models/ernie4_5_vl_moe-tf5"));
  const TensorStore hub = open_weights(fixture("models/ernie4_5_vl_moe-tf5"));
  const Bench bench = scan(facts, open_weights(fixture("models/ernie4_5_vl_moe-tf5")));
  const RouterTable& t = bench.facts.routers.value();
  ASSERT_EQ(t.layer, std::vector<int>{1});
  EXPECT_EQ(t.tensor[0], "model.layers.1.mlp.gate.weight");
  EXPECT_TRUE(t.is_input_major(0));
  EXPECT_EQ(t.experts[0], 8);
  EXPECT_EQ(t.hidden[0], 64);
  EXPECT_EQ(t.expert_count[0], 8);
  EXPECT_EQ(t.bias[0], "model.layers.1.mlp.moe_statics.e_score_correction_bias");
  EXPECT_EQ(bench.facts.expert_storage.value().tensors, std::vector<std::int64_t>{24});
  EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{});
  EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, std::vector<std::string>{});
  EXPECT_EQ(bench.facts.weight_shapes.value().tensor, std::vector<std::string>{});

  // One of the second set is missing, and one is too many.
  const TempTree tree;
  const std::string last = "model.layers.1.mlp.experts.15.up_proj.weight", beyond = "model.layers.1.mlp.experts.16.up_proj.weight";
  const Bench spoiled = scan(facts, spoilt(tree, "models/ernie4_5_vl_moe-tf5", {last}, [&](WeightFile& f) { f.add_zeros(beyond, {8, 64}); }));
  EXPECT_EQ(spoiled.facts.tensor_diff.value().missing, std::vector<std::string>{last});
  EXPECT_EQ(spoiled.facts.tensor_diff.value().unexpected, std::vector<std::string>{beyond});

  // As the modules hold them.
  const TempTree memory;
  WeightFile file;
  for (const ExpandedTensor& e : expand(*find_family("ernie4_5_vl_moe"), {2, 8, 64, 16, 32, 128, {1}}, FamilyTensor::Where::kMemory)) {
    std::vector<std::int64_t> shape = e.shape;
    std::replace(shape.begin(), shape.end(), std::int64_t{-1}, std::int64_t{8});
    if (!e.name.ends_with("proj.bias")) file.add_zeros(e.name, shape);
  }
  memory.write("model.safetensors", file.text());
  const Bench held = scan(facts, open_weights(memory.path()));
  ASSERT_EQ(held.facts.routers.value().tensor, std::vector<std::string>{"model.language_model.layers.1.mlp.text_moe.gate.weight"});
  EXPECT_FALSE(held.facts.routers.value().is_input_major(0));
  EXPECT_EQ(held.facts.routers.value().hidden, std::vector<std::int64_t>{64});
  EXPECT_EQ(held.facts.routers.value().expert_count, std::vector<std::int64_t>{8});
  EXPECT_EQ(held.facts.tensor_diff.value().missing, std::vector<std::string>{});
  EXPECT_EQ(held.facts.tensor_diff.value().unexpected, std::vector<std::string>{});
}

/// DeepSeek-V4 as released and as the first releases of transformers 5 saved it. The renamings are of conversion_mapping.py, by hand.
TEST(HeaderScan, NamesOfReleasedFilesAndOfOlderReleases) {
  using Renamings = std::vector<std::pair<std::string, std::string>>;
  const Renamings released = {{"attn.norm.", "attn.kv_norm."}, {"model.layers.", "layers."}, {"model.embed_tokens.", "embed."},
                              {"model.norm.", "norm."}, {"model.hc_head.hc_", "hc_head_"}};
  const Renamings older = {{".attn.indexer.compressor.", ".self_attn.compressor.indexer."}, {".attn.indexer.", ".self_attn.compressor.indexer."},
                           {".attn.", ".self_attn."}, {".ffn.", ".mlp."}, {".attn_norm.", ".input_layernorm."}, {".ffn_norm.", ".post_attention_layernorm."},
                           {".hc_attn_", ".attn_hc."}, {".hc_ffn_", ".ffn_hc."}, {".attn_sink", ".sinks"}, {".q_norm.", ".q_a_norm."},
                           {"attn.norm.", "attn.kv_norm."}, {"compressor.norm.", "compressor.kv_norm."}, {"indexer.norm.", "indexer.kv_norm."},
                           {".ape", ".position_bias"}, {".wq_a.", ".q_a_proj."}, {".wq_b.", ".q_b_proj."}, {".wkv.", ".kv_proj."},
                           {".wgate.", ".gate_proj."}, {".wo_a.", ".o_a_proj."}, {".wo_b.", ".o_b_proj."}, {".gate.bias", ".gate.e_score_correction_bias"},
                           {".shared_experts.w1.", ".shared_experts.gate_proj."}, {".shared_experts.w2.", ".shared_experts.down_proj."},
                           {".shared_experts.w3.", ".shared_experts.up_proj."}};
  const TensorStore hub = open_weights(fixture("models/deepseek_v4-tf5"));
  for (const Renamings& renamings : {Renamings(), released, older}) {
    SCOPED_TRACE(renamings.size());
    WeightFile file;
    std::string left_out;
    for (std::size_t i = 0; i < hub.size(); ++i) {
      std::string name(hub[i].name);
      for (const auto& [from, to] : renamings) {
        if (const std::size_t at = name.find(from); at != std::string::npos) name.replace(at, from.size(), to);
      }
      if (hub[i].name.ends_with("1.ffn.gate.weight")) left_out = name;
      else file.copy(hub[i], name);
    }
    const TempTree tree;
    tree.write("model.safetensors", file.text());
    const Bench bench = scan(model_facts(fixture("models/deepseek_v4-tf5")), open_weights(tree.path()));
    EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{left_out});
    EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, std::vector<std::string>{});
    const RouterTable& t = bench.facts.routers.value();
    EXPECT_EQ(t.layer, (std::vector<int>{0, 2}));
    EXPECT_EQ(t.bias[0], "");  // a table of token ids gives the experts
    EXPECT_NE(t.bias[1], "");
  }
}

/// save_pretrained turns renamings round where the released files were never renamed.
TEST(HeaderScan, NamesThatSavingInvents) {
  using Renamings = std::vector<std::pair<std::string, std::string>>;
  const Renamings kimi = {{"0.block_sparse_moe.", "0.mlp."}};
  const Renamings hunyuan = {{".hc_pre.hc_attn_layer.", ".hc_attn_layer.hc_pre."}, {".hc_pre.hc_mlp_layer.", ".hc_mlp_layer.hc_pre."},
                             {".hc_pre.hc_head.", ".hc_head."}, {"mlp.linear_gate.", "mlp.gate_proj."}, {"experts.linear_gate.", "experts.gate_proj."}};
  const Renamings ling = {{"0.attention.dense.", "0.attention.o_proj."}};
  for (const auto& [model, renamings, left_out] : {std::tuple{"models/kimi_linear-tf5", kimi, "model.layers.0.mlp.up_proj.weight"},
                                                   {"models/hy_v4-tf5", hunyuan, "model.layers.1.hc_mlp_layer.hc_pre.hc_fn"},
                                                   {"models/bailing_hybrid-tf5", ling, "model.layers.0.attention.f_proj.weight"}}) {
    SCOPED_TRACE(model);
    const TensorStore hub = open_weights(fixture(model));
    WeightFile file;
    for (std::size_t i = 0; i < hub.size(); ++i) {
      std::string name(hub[i].name);
      for (const auto& [from, to] : renamings) {
        if (const std::size_t at = name.find(from); at != std::string::npos) name.replace(at, from.size(), to);
      }
      if (name != left_out) file.copy(hub[i], name);
    }
    const TempTree tree;
    tree.write("model.safetensors", file.text());
    nlohmann::json facts = model_facts(fixture(model));
    facts["model.moe_layers"] = {1};  // mlp_layer_types
    const Bench bench = scan(facts, open_weights(tree.path()));
    EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{left_out});
    EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, std::vector<std::string>{});
  }
}

/// Loaded by AutoModelForCausalLM from files of the model with the vision tower, a language model is saved by the names in those.
TEST(HeaderScan, NamesOfTheModelAroundALanguageModel) {
  for (const std::string model : {"models/qwen3_5_moe_text-tf5", "models/qwen4_exp_text-tf5"}) {
    SCOPED_TRACE(model);
    const TensorStore own = open_weights(fixture(model));
    const std::string left_out = "model.language_model.layers.1.mlp.experts.3.up_proj.weight";
    WeightFile file;
    for (std::size_t i = 0; i < own.size(); ++i) {
      std::string name(own[i].name);
      if (name.starts_with("model.")) name.insert(6, "language_model.");
      if (name != left_out) file.copy(own[i], name);
    }
    const TempTree tree;
    tree.write("model.safetensors", file.text());
    const Bench bench = scan(model_facts(fixture(model)), open_weights(tree.path()));
    EXPECT_EQ(bench.facts.tensor_diff.value().missing, std::vector<std::string>{left_out});
    EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, std::vector<std::string>{});
    EXPECT_EQ(bench.facts.routers.value().tensor[0], "model.language_model.layers.0.mlp.gate.weight");
  }
}

/// backbone.embedding, as transformers before 5.16 saved Nemotron-H, is no embedding for those that do not read it.
TEST(HeaderScan, NamesThatLaterReleasesDoNotRead) {
  nlohmann::json facts = {{"model.type", "nemotron_h"}, {"model.family", "nemotron_h"}, {"model.num_layers", 4}, {"model.moe_layers", {1}},
                          {"model.hidden_size", 64}, {"model.expert_width", 16}, {"model.expert_input", 32}, {"router.num_experts", 8}};
  const std::string now = "backbone.embeddings.weight", before = "backbone.embedding.weight";
  const TensorStore saved = open_weights(fixture("models/nemotron_h-tf5"));
  WeightFile file;
  for (std::size_t i = 0; i < saved.size(); ++i) file.copy(saved[i], saved[i].name == now ? before : std::string(saved[i].name));
  const TempTree tree;
  tree.write("model.safetensors", file.text());
  using Names = std::vector<std::string>;
  for (const std::string version : {"", "5.5.4", "5.15.1", "5.16.0", "5.23.0"}) {
    SCOPED_TRACE(version);
    if (!version.empty()) facts["versions.transformers"] = version;
    const bool read = version.empty() || version == "5.5.4" || version == "5.15.1";
    const TensorDiff diff = scan(facts, open_weights(tree.path())).facts.tensor_diff.value();
    EXPECT_EQ(diff.missing, read ? Names{} : Names{now});
    EXPECT_EQ(diff.unexpected, read ? Names{} : Names{before});
    EXPECT_EQ(scan(facts, open_weights(fixture("models/nemotron_h-tf5"))).facts.tensor_diff.value().missing, Names{});
  }
}

TEST(HeaderScan, ShapesThatDiffer) {
  const TempTree tree;
  const std::string gate = "model.layers.1.block_sparse_moe.gate.weight", w2 = "model.layers.2.block_sparse_moe.experts.5.w2.weight",
                    norm = "model.layers.0.input_layernorm.weight", packed = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
  const Bench bench = scan(model_facts(fixture("models/mixtral-tf4")),
                           spoilt(tree, "models/mixtral-tf4", {gate, w2, norm, packed, "lm_head.weight"}, [&](WeightFile& f) {
                             f.add_zeros(gate, {8, 48});
                             f.add_zeros(w2, {32, 64});
                             f.add_zeros(norm, {64, 1});
                             f.add_zeros(packed, {1024, 1}, "U8");           // bitsandbytes: bytes, not a matrix
                             f.add_zeros("lm_head.weight", {160, 64}, "BF16");  // padded vocabulary
                           }));
  const ShapeTable& t = bench.facts.weight_shapes.value();
  EXPECT_EQ(t.tensor, (std::vector<std::string>{norm, gate, w2}));
  EXPECT_EQ(t.expected, (std::vector<std::string>{"[64]", "[8, 64]", "[64, 32]"}));
  EXPECT_EQ(t.found, (std::vector<std::string>{"[64, 1]", "[8, 48]", "[32, 64]"}));
  EXPECT_EQ(t.fault, (std::vector<ShapeFault>{ShapeFault::kOther, ShapeFault::kOther, ShapeFault::kTransposed}));
  EXPECT_EQ(t.pattern[2], "model.layers.{L}.block_sparse_moe.experts.{e}.w2.weight");
  const ExpertStorage& s = bench.facts.expert_storage.value();
  ASSERT_EQ(s.dtype.size(), 3u);  // w2 of add_zeros is F32
  EXPECT_EQ(s.tensors[0] + s.tensors[1] + s.tensors[2], 4 * 8 * 3);
}

TEST(HeaderScan, OneRankOfTwo) {
  const Bench bench = scan(model_facts(fixture("faults/mixtral-one-rank-of-two")), open_weights(fixture("faults/mixtral-one-rank-of-two")));
  const ShapeTable& t = bench.facts.weight_shapes.value();
  EXPECT_EQ(t.divisor, 2);
  EXPECT_EQ(t.fault, std::vector<ShapeFault>(24, ShapeFault::kSharded));
}

TEST(HeaderScan, ExpertsThatTheConfigDoesNotHave) {
  nlohmann::json facts = model_facts(fixture("models/mixtral-tf4"));
  facts["router.num_experts"] = 4;
  const Bench bench = scan(facts, open_weights(fixture("models/mixtral-tf4")));
  EXPECT_EQ(bench.facts.routers.value().expert_count, (std::vector<std::int64_t>{8, 8, 8, 8}));
  EXPECT_EQ(bench.facts.tensor_diff.value().unexpected.size(), 4u * 4u * 3u);  // layers x experts 4 to 7 x w1 w2 w3
  EXPECT_TRUE(bench.facts.tensor_diff.value().missing.empty());
}

TEST(HeaderScan, ExtrasThatCanBeExplainedAreNotUnexpected) {
  const TempTree tree;
  const Bench bench = scan(model_facts(fixture("models/deepseek_v3-tf4")), spoilt(tree, "models/deepseek_v3-tf4", {"lm_head.weight"}, [](WeightFile& f) {
    // one multi-token-prediction layer behind the four of the model, with a router and an expert of its own
    f.add_zeros("model.layers.4.eh_proj.weight", {64, 128});
    f.add_zeros("model.layers.4.mlp.gate.weight", {16, 64});
    f.add_zeros("model.layers.4.mlp.experts.0.up_proj.weight", {16, 64});
    // scales of float8, bitsandbytes statistics, old buffers
    f.add_zeros("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv", {1, 1});
    f.add_zeros("model.layers.1.self_attn.o_proj.weight.absmax", {4}, "U8");
    f.add_zeros("model.layers.1.self_attn.o_proj.weight.quant_state.bitsandbytes__nf4", {80}, "U8");
    f.add_zeros("model.layers.1.self_attn.rotary_emb.inv_freq", {8});
    // and what nothing explains
    f.add_zeros("model.layers.1.mlp.gate.weight_old", {16, 64});
    f.add_zeros("score.weight", {2, 64});
  }));
  EXPECT_EQ(bench.facts.tensor_diff.value().unexpected, (std::vector<std::string>{"model.layers.1.mlp.gate.weight_old", "score.weight"}));
  EXPECT_TRUE(bench.facts.tensor_diff.value().missing.empty());  // lm_head may be tied
  EXPECT_EQ(bench.facts.routers.value().layer, (std::vector<int>{1, 2, 3}));
}

TEST(HeaderScan, PackedWeightsStandInForTheirMatrices) {
  const TempTree tree;
  const std::string expert = "model.layers.0.mlp.experts.0.up_proj.";
  const Bench bench = scan(model_facts(fixture("models/olmoe-tf4")), spoilt(tree, "models/olmoe-tf4", {expert + "weight", "model.layers.2.mlp.gate.weight"}, [&](WeightFile& f) {
    f.add_zeros(expert + "qweight", {8, 4}, "U8");
    f.add_zeros(expert + "qzeros", {1}, "U8");
    f.add_zeros(expert + "scales", {1});
    f.add_zeros("model.layers.2.mlp.gate.weight", {256, 1}, "U8");  // bitsandbytes keeps the name and packs two values a byte
  }));
  EXPECT_TRUE(bench.facts.tensor_diff.value().missing.empty());
  EXPECT_TRUE(bench.facts.tensor_diff.value().unexpected.empty());
  EXPECT_EQ(bench.facts.routers.value().experts, (std::vector<std::int64_t>{8, 8, -1, 8}));
  EXPECT_EQ(bench.facts.routers.value().hidden, (std::vector<std::int64_t>{64, 64, -1, 64}));
}

TEST(HeaderScan, Mxfp4BlocksCountAsExperts) {
  const TempTree tree;
  std::vector<std::string> stacks;
  for (int l = 0; l < 4; ++l) {
    for (const char* p : {"gate_up_proj", "down_proj"}) stacks.push_back("model.layers." + std::to_string(l) + ".mlp.experts." + p);
  }
  const Bench bench = scan(model_facts(fixture("models/gpt_oss-tf4")), spoilt(tree, "models/gpt_oss-tf4", stacks, [&](WeightFile& f) {
    for (const std::string& s : stacks) {
      const bool down = s.find("down") != std::string::npos;
      f.add_zeros(s + "_blocks", {8, 64, down ? 1 : 2, 16}, "U8");  // 32 values a block, two a byte
      f.add_zeros(s + "_scales", {8, 64, down ? 1 : 2}, "U8");
    }
  }));
  EXPECT_TRUE(bench.facts.tensor_diff.value().missing.empty());
  EXPECT_TRUE(bench.facts.tensor_diff.value().unexpected.empty());
  const RouterTable& t = bench.facts.routers.value();
  EXPECT_EQ(t.expert_count, (std::vector<std::int64_t>{8, 8, 8, 8}));
  EXPECT_EQ(t.expert_hidden, (std::vector<std::int64_t>{64, 64, 64, 64}));
  EXPECT_EQ(t.fused, (std::vector<char>{1, 1, 1, 1}));
}

TEST(HeaderScan, TensorsOfAMissingShardAreNamedWithIt) {
  const TempTree tree;
  const std::string name = "models/mixtral-tf4-sharded", shard = "model-00003-of-00004.safetensors";
  tree.copy(fixture(name), "model");
  std::filesystem::remove(tree.path("model/" + shard));
  std::vector<WeightProblem> problems;
  const Bench bench = scan(model_facts(fixture(name)), TensorStore::open(tree.path("model"), "model", &problems));
  EXPECT_FALSE(problems.empty());
  std::set<std::string> expected;
  const nlohmann::json index = read_json(fixture(name) + "/model.safetensors.index.json");
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (file == shard) expected.insert(tensor);
  }
  const TensorDiff& diff = bench.facts.tensor_diff.value();
  EXPECT_EQ(std::set<std::string>(diff.missing.begin(), diff.missing.end()), expected);
  EXPECT_EQ(diff.missing.size(), expected.size());
  EXPECT_TRUE(std::all_of(diff.missing_shard.begin(), diff.missing_shard.end(), [&](const std::string& s) { return s == shard; }));
  // Without a family the index still says what is missing.
  const Bench unknown = scan(nlohmann::json::object(), TensorStore::open(tree.path("model"), "model", &problems));
  EXPECT_EQ(std::set<std::string>(unknown.facts.tensor_diff.value().missing.begin(), unknown.facts.tensor_diff.value().missing.end()), expected);
}

TEST(HeaderScan, SaysWhyItCannotTell) {
  EXPECT_EQ(scan({}, TensorStore()).facts.routers.why_unknown(), "no weights of the model are among the inputs");
  nlohmann::json facts = model_facts(fixture("models/mixtral-tf4"));
  facts["router.num_experts"] = 1'000'000'000'000;
  const Bench absurd = scan(facts, open_weights(fixture("models/mixtral-tf4")));
  EXPECT_NE(absurd.facts.tensor_diff.why_unknown().find("1000000000000 experts in 4 layers"), std::string::npos);
  facts.erase("model.num_layers");
  facts.erase("router.num_experts");
  const Bench bare = scan(facts, open_weights(fixture("models/mixtral-tf4")));
  EXPECT_EQ(bare.facts.tensor_diff.why_unknown(), "model.num_layers is not known");
  EXPECT_EQ(bare.facts.routers.value().layer.size(), 4u);
}

}  // namespace
}  // namespace moeaudit
