// LoRA matrices of the fixtures' adapters, against safetensors and PEFT itself (fixtures/make/measures_golden.py).
#include <cmath>
#include <limits>
#include <map>

#include "audit/measures/adapter_file.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_adapter_tensors;
namespace {

using namespace test;

/// Where the base model of a run lies: its own folder, or the one run.json names.
std::string base_of(const std::string& run) {
  if (std::filesystem::exists(fixture(run + "/base"))) return fixture(run + "/base");
  return fixture(run) + "/" + std::string(read_json(fixture(run + "/run.json"))["model_name_or_path"]);
}

Bench measure(const std::string& checkpoint, int threads = 1) {
  Bench bench;
  bench.facts = testing::facts_from_json(model_facts(base_of(checkpoint.substr(0, checkpoint.rfind('/')))));
  bench.adapter = open_weights(fixture(checkpoint), "adapter_model");
  bench.threads = threads;
  bench.run(measure_adapter_tensors);
  return bench;
}

double number(const nlohmann::json& j) { return j.is_string() ? std::nan("") : j.get<double>(); }

TEST(AdapterTensors, EveryModuleAndSliceOfTheFixtures) {
  const nlohmann::json golden = read_json(fixture("measures/golden.json"));
  std::size_t slices = 0, stacks = 0;
  for (const auto& [name, expected] : golden["adapters"].items()) {
    SCOPED_TRACE(name);
    const Bench bench = measure(name);
    ASSERT_TRUE(bench.facts.adapter_tensors.known()) << bench.facts.adapter_tensors.why_unknown();
    const AdapterTensors& t = bench.facts.adapter_tensors.value();
    std::map<std::string, std::vector<std::size_t>> rows;
    for (std::size_t i = 0; i < t.module.size(); ++i) rows[t.module[i]].push_back(i);
    EXPECT_EQ(rows.size(), expected.size());
    for (const auto& e : expected) {
      SCOPED_TRACE(e["module"]);
      const std::vector<std::size_t>& of = rows[e["module"]];
      const std::size_t copies = e["copies"];
      ASSERT_EQ(of.size(), copies);
      std::int64_t non_finite = 0;
      std::vector<std::size_t> zero;
      for (std::size_t x = 0; x < copies; ++x) {
        const std::size_t i = of[x];
        EXPECT_EQ(t.rank[i], e["rank"]);
        if (copies > 1) {
          EXPECT_EQ(t.expert[i], static_cast<int>(x));
        }
        const double a = number(e["norm_a"][x]), b = number(e["norm_b"][x]);
        // The file's float32 values are exact in float64; the golden numbers have ten digits.
        if (std::isfinite(a)) {
          EXPECT_NEAR(t.norm_a[i], a, 1e-9 * a);
        }
        if (std::isfinite(b)) {
          EXPECT_NEAR(t.norm_b[i], b, 1e-9 * b);
        }
        EXPECT_EQ(std::isfinite(t.norm_b[i]), std::isfinite(b));
        if (t.b_zero[i]) zero.push_back(x);
        non_finite += t.non_finite[i];
        ++slices;
      }
      EXPECT_EQ(zero, e["b_zero"].get<std::vector<std::size_t>>());
      EXPECT_EQ(non_finite, e["non_finite"]);
      stacks += copies > 1;
    }
  }
  EXPECT_EQ(stacks, 16u);  // two runs x four layers x gate_up_proj and down_proj
  EXPECT_GT(slices, 1500u);
}

// runs/expert-untrained: fixtures/make/make_run.py sends no token to expert 3 of layer 1 and experts 0 and 5 of layer 2.
TEST(AdapterTensors, TheExpertsThatGotNoToken) {
  const AdapterTensors t = measure("runs/expert-untrained/checkpoint-10").facts.adapter_tensors.value();
  std::map<std::pair<int, int>, int> zeros;
  for (std::size_t i = 0; i < t.module.size(); ++i) {
    if (!t.b_zero[i]) continue;
    ++zeros[{t.layer[i], t.expert[i]}];
    EXPECT_EQ(t.part[i], Part::kRoutedExpert);
  }
  EXPECT_EQ(zeros, (std::map<std::pair<int, int>, int>{{{1, 3}, 3}, {{2, 0}, 3}, {{2, 5}, 3}}));  // w1, w2, w3 of each
}

// runs/layer-experts-untrained froze every expert adapter of layer 2.
TEST(AdapterTensors, TheLayerThatWasFrozen) {
  const AdapterTensors t = measure("runs/layer-experts-untrained/checkpoint-10").facts.adapter_tensors.value();
  std::size_t zeros = 0;
  for (std::size_t i = 0; i < t.module.size(); ++i) {
    EXPECT_EQ(t.b_zero[i] != 0, t.layer[i] == 2 && t.part[i] == Part::kRoutedExpert) << t.module[i];
    zeros += t.b_zero[i] != 0;
  }
  EXPECT_EQ(zeros, 8u * 3u);
}

/// B A formed entry by entry, where the measure multiplies Gram matrices.
double product_norm(const AdapterFileModule& m, std::int64_t expert) {
  std::vector<double> a(static_cast<std::size_t>(m.a->elements())), b(static_cast<std::size_t>(m.b->elements()));
  EXPECT_TRUE(decode(*m.a, 0, m.a->elements(), a.data()) && decode(*m.b, 0, m.b->elements(), b.data()));
  double squares = 0;
  for (std::int64_t o = 0; o < m.out; ++o) {
    for (std::int64_t i = 0; i < m.in; ++i) {
      double sum = 0;
      for (std::int64_t r = 0; r < m.rank; ++r) {
        sum += b[(o * m.rank + r) * m.copies + expert] * a[(expert * m.rank + r) * m.in + i];
      }
      squares += sum * sum;
    }
  }
  return std::sqrt(squares);
}

TEST(AdapterTensors, NormOfTheProduct) {
  std::size_t judged = 0;
  for (const char* run : {"runs/qwen3moe-fused-hit/checkpoint-10", "runs/deepseek_v3-lora/checkpoint-10"}) {
    const Bench bench = measure(run);
    const AdapterTensors& t = bench.facts.adapter_tensors.value();
    const AdapterFile file = read_adapter_file(bench.adapter, find_family(bench.facts.family.value()), bench.facts);
    std::map<std::string, const AdapterFileModule*> modules;
    for (const AdapterFileModule& m : file.modules) modules[m.path] = &m;
    for (std::size_t i = 0; i < t.module.size(); i += 7) {
      const AdapterFileModule& m = *modules.at(t.module[i]);
      const double expected = product_norm(m, m.copies > 1 ? t.expert[i] : 0);
      EXPECT_NEAR(t.norm_ba[i], expected, 1e-12 * expected + 1e-300) << t.module[i];
      EXPECT_LE(t.norm_ba[i], t.norm_a[i] * t.norm_b[i] * (1 + 1e-12));
      ++judged;
    }
  }
  EXPECT_GT(judged, 80u);
}

TEST(AdapterTensors, ScaleAsPeftHasIt) {
  const TempTree tree;
  WeightFile w;
  const std::string at = "base_model.model.model.layers.0.self_attn.";
  for (const char* name : {"q_proj", "o_proj"}) {
    w.add_f32(at + name + ".lora_A.weight", {4, 1}, {1, 1, 1, 1});
    w.add_f32(at + name + ".lora_B.weight", {1, 4}, {1, 1, 1, 1});
  }
  auto scales = [&](const nlohmann::json& facts) {
    Bench bench;
    bench.facts = testing::facts_from_json(facts);
    bench.adapter = open_weights(tree.write("adapter_model.safetensors", w.text()), "adapter_model");
    bench.run(measure_adapter_tensors);
    return bench.facts.adapter_tensors.value().scale;  // o_proj, q_proj
  };
  EXPECT_EQ(scales({{"adapter.alpha", 16}}), (std::vector<double>{4, 4}));
  EXPECT_EQ(scales({{"adapter.alpha", 16}, {"adapter.rslora", true}}), (std::vector<double>{8, 8}));
  EXPECT_EQ(scales({{"adapter.alpha", 16}, {"adapter.alpha_pattern", nlohmann::json::array({"q_.*=2.5"})}}), (std::vector<double>{4, 0.625}));
  // what adapter_config.json says goes with the file, not a training config that was read beside it
  const nlohmann::json own = {{"value", 16}, {"role", "adapter_config"}};
  const nlohmann::json both = {{"value", 64}, {"shadowed", nlohmann::json::array({own})}};
  EXPECT_EQ(scales({{"adapter.alpha", both}}), (std::vector<double>{4, 4}));
  EXPECT_TRUE(std::isnan(scales(nlohmann::json::object())[0]));
}

TEST(AdapterTensors, ThreadsChangeNothing) {
  const AdapterTensors one = measure("runs/qwen3moe-fused-hit/checkpoint-10", 1).facts.adapter_tensors.value();
  const AdapterTensors four = measure("runs/qwen3moe-fused-hit/checkpoint-10", 4).facts.adapter_tensors.value();
  EXPECT_EQ(one.module, four.module);
  EXPECT_EQ(one.norm_a, four.norm_a);  // to the last bit
  EXPECT_EQ(one.norm_b, four.norm_b);
  EXPECT_EQ(one.norm_ba, four.norm_ba);
  EXPECT_EQ(one.b_zero, four.b_zero);
}

// ---- files as other versions and wrappers write them ---------------------------------------------------------------

AdapterFile read(const std::function<void(WeightFile&)>& fill, const nlohmann::json& facts = nlohmann::json::object(),
                 const char* family = "mixtral") {
  static std::vector<std::unique_ptr<std::pair<TempTree, TensorStore>>> kept;  // views point into the stores
  kept.push_back(std::make_unique<std::pair<TempTree, TensorStore>>());
  WeightFile file;
  fill(file);
  kept.back()->second = open_weights(kept.back()->first.write("adapter_model.safetensors", file.text()), "adapter_model");
  return read_adapter_file(kept.back()->second, find_family(family), testing::facts_from_json(facts));
}

TEST(AdapterFile, NamesOfWrappersAndAdaptersAreTakenOff) {
  const AdapterFile f = read([](WeightFile& w) {
    w.add_zeros("base_model.model._orig_mod.model.layers.3._fsdp_wrapped_module.self_attn.q_proj.lora_A.default.weight", {4, 64});
    w.add_zeros("base_model.model._orig_mod.model.layers.3._fsdp_wrapped_module.self_attn.q_proj.lora_B.default.weight", {48, 4});
    w.add_zeros("base_model.model._orig_mod.model.layers.3._fsdp_wrapped_module.self_attn.q_proj.lora_magnitude_vector", {48});
    w.add_zeros("base_model.model.model.embed_tokens.lora_embedding_A", {4, 1000});
    w.add_zeros("base_model.model.model.embed_tokens.lora_embedding_B", {64, 4});
  });
  ASSERT_EQ(f.modules.size(), 2u);
  EXPECT_EQ(f.modules[0].path, "model.embed_tokens");
  EXPECT_EQ(f.modules[0].in, 1000);
  EXPECT_EQ(f.modules[0].out, 64);
  EXPECT_EQ(f.modules[1].path, "model.layers.3.self_attn.q_proj");
  EXPECT_EQ(f.modules[1].part.layer, 3);
  EXPECT_EQ(f.modules[1].parameters, 4 * 64 + 48 * 4 + 48);
}

TEST(AdapterFile, HalfPairsAreNamed) {
  const AdapterFile f = read([](WeightFile& w) {
    w.add_zeros("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", {4, 64});
    w.add_zeros("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", {4, 64});
    w.add_zeros("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight", {32, 8});  // another rank than A
  });
  EXPECT_TRUE(f.modules.empty());
  ASSERT_EQ(f.incomplete.size(), 2u);
  EXPECT_EQ(f.incomplete[0].path, "model.layers.0.self_attn.k_proj");
  EXPECT_TRUE(f.incomplete[0].a && f.incomplete[0].b);
  EXPECT_EQ(f.incomplete[1].path, "model.layers.0.self_attn.q_proj");
  EXPECT_FALSE(f.incomplete[1].b);
}

TEST(AdapterFile, SavedModulesAndCopiesOfEmbeddings) {
  const auto fill = [](WeightFile& w) {
    w.add_zeros("base_model.model.lm_head.weight", {1000, 64});
    w.add_zeros("base_model.model.model.layers.0.block_sparse_moe.gate.weight", {8, 64});
    w.add_zeros("base_model.model.model.layers.1.block_sparse_moe.gate.modules_to_save.default.weight", {8, 64});
  };
  const AdapterFile silent = read(fill);
  ASSERT_EQ(silent.modules.size(), 2u);  // the head may be a copy
  EXPECT_EQ(silent.modules[1].path, "model.layers.1.block_sparse_moe.gate");
  EXPECT_EQ(silent.modules[1].rank, 0);
  EXPECT_EQ(silent.modules[1].part.part, Part::kRouter);
  EXPECT_EQ(silent.modules[1].parameters, 8 * 64);
  const AdapterFile listed = read(fill, {{"adapter.modules_to_save", {"lm_head", "gate"}}});
  EXPECT_EQ(listed.modules.size(), 3u);
}

/// gate_up_proj is inside and down_proj outside, because PEFT wraps in the order of registration.
void add_stacks(WeightFile& w, std::int64_t experts, std::int64_t rank, std::int64_t hidden, std::int64_t width, bool swapped) {
  const std::string at = "base_model.model.model.layers.0.mlp.experts.";
  const std::int64_t wide = experts * rank;
  w.add_zeros(at + "base_layer.lora_A.weight", {wide, swapped ? 2 * width : hidden});
  w.add_zeros(at + "base_layer.lora_B.weight", {swapped ? hidden : 2 * width, wide});
  w.add_zeros(at + "lora_A.weight", {wide, swapped ? hidden : width});
  w.add_zeros(at + "lora_B.weight", {swapped ? width : hidden, wide});
}

TEST(AdapterFile, StacksAreRecognisedByShape) {
  const nlohmann::json shape = {{"model.num_layers", 1}, {"model.moe_layers", {0}}, {"router.num_experts", 8},
                                {"model.hidden_size", 64}, {"model.expert_width", 16}};
  for (const bool swapped : {false, true}) {  // PEFT before 0.19 exchanged in and out
    const AdapterFile f = read([&](WeightFile& w) { add_stacks(w, 8, 3, 64, 16, swapped); }, shape, "qwen3_moe");
    ASSERT_EQ(f.modules.size(), 2u);
    EXPECT_EQ(f.modules[0].path, "model.layers.0.mlp.experts.down_proj");
    EXPECT_EQ(f.modules[1].path, "model.layers.0.mlp.experts.gate_up_proj");
    for (const AdapterFileModule& m : f.modules) {
      EXPECT_EQ(m.copies, 8);
      EXPECT_EQ(m.rank, 3);
      EXPECT_TRUE(m.is_parameter);
      EXPECT_EQ(m.part.part, Part::kRoutedExpert);
    }
  }
  // One alone is told from the other by its shape, whatever its depth.
  const AdapterFile alone = read([](WeightFile& w) {
    w.add_zeros("base_model.model.model.layers.0.mlp.experts.lora_A.weight", {24, 64});
    w.add_zeros("base_model.model.model.layers.0.mlp.experts.lora_B.weight", {32, 24});
  }, shape, "qwen3_moe");
  ASSERT_EQ(alone.modules.size(), 1u);
  EXPECT_EQ(alone.modules[0].path, "model.layers.0.mlp.experts.gate_up_proj");
}

TEST(AdapterFile, StacksWithoutAConfigFallBackOnNestingAndRank) {
  const AdapterFile f = read([](WeightFile& w) { add_stacks(w, 8, 3, 64, 16, false); }, {{"adapter.rank", 3}}, "qwen3_moe");
  ASSERT_EQ(f.modules.size(), 2u);
  EXPECT_EQ(f.modules[0].path, "model.layers.0.mlp.experts.down_proj");
  EXPECT_EQ(f.modules[0].in, 16);
  EXPECT_EQ(f.modules[0].copies, 8);
  EXPECT_EQ(f.modules[1].path, "model.layers.0.mlp.experts.gate_up_proj");
  EXPECT_EQ(f.modules[1].in, 64);
}

TEST(AdapterFile, ABiasOfAStackIsAMatrix) {
  const nlohmann::json shape = {{"model.num_layers", 1}, {"model.moe_layers", {0}}, {"router.num_experts", 8},
                                {"model.hidden_size", 64}, {"model.expert_width", 16}};
  const AdapterFile f = read([](WeightFile& w) {  // gate_up_proj_bias [8, 32] with rank 8
    w.add_zeros("base_model.model.model.layers.0.mlp.experts.lora_A.weight", {8, 32});
    w.add_zeros("base_model.model.model.layers.0.mlp.experts.lora_B.weight", {8, 8});
  }, shape, "gpt_oss");
  ASSERT_EQ(f.modules.size(), 1u);
  EXPECT_EQ(f.modules[0].path, "model.layers.0.mlp.experts.gate_up_proj_bias");
  EXPECT_EQ(f.modules[0].copies, 1);
  EXPECT_EQ(f.modules[0].rank, 8);
}

TEST(AdapterTensors, ValuesThatAreNotNumbers) {
  const TempTree tree;
  WeightFile w;
  std::vector<float> b(6, 0.0f);
  b[1] = std::numeric_limits<float>::infinity();
  b[4] = std::numeric_limits<float>::quiet_NaN();
  w.add_f32("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", {2, 2}, {3, 0, 0, 4});
  w.add_f32("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", {3, 2}, b);
  w.add_zeros("base_model.model.model.layers.0.self_attn.v_proj.ia3_l", {3});
  Bench bench;
  bench.adapter = open_weights(tree.write("adapter_model.safetensors", w.text()), "adapter_model");
  bench.run(measure_adapter_tensors);
  const AdapterTensors& t = bench.facts.adapter_tensors.value();
  ASSERT_EQ(t.module.size(), 1u);
  EXPECT_EQ(t.norm_a[0], 5.0);
  EXPECT_EQ(t.non_finite[0], 2);
  EXPECT_EQ(t.bad_tensor[0], "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
  EXPECT_EQ(t.bad_index[0], 1);
  EXPECT_FALSE(t.b_zero[0]);
  EXPECT_TRUE(std::isnan(t.norm_b[0]));
}

TEST(AdapterTensors, SaysWhyItCannotTell) {
  Bench bench;
  bench.run(measure_adapter_tensors);
  EXPECT_EQ(bench.facts.adapter_tensors.why_unknown(), "no adapter weights are among the inputs");
  const TempTree tree;
  WeightFile w;
  w.add_zeros("base_model.model.model.layers.0.self_attn.v_proj.ia3_l", {3});
  bench.adapter = open_weights(tree.write("adapter_model.safetensors", w.text()), "adapter_model");
  bench.run(measure_adapter_tensors);
  EXPECT_NE(bench.facts.adapter_tensors.why_unknown().find("no pairs of LoRA matrices"), std::string::npos);
}

}  // namespace
}  // namespace moeaudit
