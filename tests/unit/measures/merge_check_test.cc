// Merges made by hand, right and wrong: each wrong form is named, and only a wrong one.
#include <cmath>
#include <random>

#include "kernels/host/low_precision.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_merge_check;
namespace {

using namespace test;
using kernels::Float;

constexpr int kSize = 24, kRank = 3, kExperts = 4;
constexpr double kAlpha = 6;  // scale 2; alpha / sqrt(r) is 3.46
const std::string kModule = "model.layers.0.self_attn.o_proj";

using Values = std::vector<float>;

Values random_values(std::size_t n, double scale, unsigned seed) {
  std::mt19937 g(seed);
  Values v(n);
  for (float& x : v) x = static_cast<float>(scale * (static_cast<double>(g()) / 0x1p31 - 1));
  return v;
}

/// B A, [rows, columns].
std::vector<double> product(const Values& b, const Values& a, int rows, int rank, int columns) {
  std::vector<double> out(static_cast<std::size_t>(rows * columns));
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < rank; ++i) {
      for (int c = 0; c < columns; ++c) out[r * columns + c] += static_cast<double>(b[r * rank + i]) * a[i * columns + c];
    }
  }
  return out;
}

Values rounded(const std::vector<double>& v, Float to) {
  Values out;
  for (double x : v) out.push_back(static_cast<float>(kernels::round_to(x, to)));
  return out;
}

std::string bytes(const Values& v, const std::string& dtype) {
  std::string out;
  for (float x : v) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == "BF16") bits >>= 16;
    out.append(reinterpret_cast<const char*>(&bits), dtype == "BF16" ? 2 : 4);
  }
  return out;
}

struct Made {
  Values w = random_values(kSize * kSize, 0.05, 1), a = random_values(kRank * kSize, 0.1, 2), b = random_values(kSize * kRank, 0.1, 3);
  std::vector<double> update = product(b, a, kSize, kRank, kSize);

  std::vector<double> sum(double scale, bool transposed = false) const {
    std::vector<double> m(w.begin(), w.end());
    for (int r = 0; r < kSize; ++r) {
      for (int c = 0; c < kSize; ++c) m[r * kSize + c] += scale * update[transposed ? c * kSize + r : r * kSize + c];
    }
    return m;
  }
  MergeTable check(const Values& merged, const std::string& dtype, bool rslora = false) const {
    WeightFile base, out, adapter;
    base.add_f32(kModule + ".weight", {kSize, kSize}, w);
    out.add(kModule + ".weight", dtype, {kSize, kSize}, bytes(merged, dtype));
    base.add_f32("model.norm.weight", {2}, {1, 2});
    out.add_f32("model.norm.weight", {2}, {1, 2});
    adapter.add_f32("base_model.model." + kModule + ".lora_A.weight", {kRank, kSize}, a);
    adapter.add_f32("base_model.model." + kModule + ".lora_B.weight", {kSize, kRank}, b);
    return run(base, out, adapter, rslora);
  }
  static MergeTable run(const WeightFile& base, const WeightFile& merged, const WeightFile& adapter, bool rslora, const nlohmann::json& more = {}) {
    TempTree tree;
    tree.write("base/model.safetensors", base.text());
    tree.write("merged/model.safetensors", merged.text());
    tree.write("adapter/adapter_model.safetensors", adapter.text());
    Bench bench;
    nlohmann::json facts = {{"adapter.alpha", kAlpha}, {"adapter.rslora", rslora}};
    if (more.is_object()) facts.update(more);
    bench.facts = testing::facts_from_json(facts);
    bench.base = open_weights(tree.path("base"));
    bench.model = open_weights(tree.path("merged"));
    bench.adapter = open_weights(tree.path("adapter"), "adapter_model");
    bench.threads = 2;
    bench.run(measure_merge_check);
    EXPECT_TRUE(bench.facts.merge.known()) << bench.facts.merge.why_unknown();
    return bench.facts.merge.known() ? bench.facts.merge.value() : MergeTable{};
  }
};

TEST(MergeCheck, RightMergesPassInEveryDType) {
  const Made made;
  const double scale = kAlpha / kRank;
  for (const auto& [dtype, to] : {std::pair{"F32", Float::kF32}, {"BF16", Float::kBF16}}) {
    const MergeTable t = made.check(rounded(made.sum(scale), to), dtype);
    ASSERT_EQ(t.form.size(), 1u);
    EXPECT_EQ(t.form[0], "") << dtype;
    EXPECT_EQ(t.outside[0], 0);
    EXPECT_LE(t.worst[0], 1);
    EXPECT_EQ(t.rank[0], kRank);
    EXPECT_EQ(t.scale[0], scale);
    EXPECT_EQ(t.unadapted, 1);
  }
  // As PEFT does on a GPU: base, both products and the sum in bfloat16, one after the other.
  std::vector<double> m;
  for (std::size_t i = 0; i < made.w.size(); ++i) {
    const double delta = kernels::round_to(scale * kernels::round_to(made.update[i], Float::kBF16), Float::kBF16);
    m.push_back(kernels::round_to(made.w[i], Float::kBF16) + delta);
  }
  EXPECT_EQ(made.check(rounded(m, Float::kBF16), "BF16").form[0], "");
  EXPECT_EQ(made.check(rounded(made.sum(kAlpha / std::sqrt(kRank)), Float::kF32), "F32", true).form[0], "");
}

TEST(MergeCheck, WrongScalesAreNamed) {
  const Made made;
  const struct {
    double scale;
    const char* form;
  } cases[] = {{0, "not merged at all (scale 0)"},
               {4, "merged twice (2 x the scale)"},
               {6 / std::sqrt(3.0), "scale alpha / sqrt(r) instead of alpha / r"},
               {1, "alpha and r ignored (scale 1)"},
               {6, "r ignored (scale alpha)"},
               {0.5, "scale r / alpha"},
               {-2, "subtracted instead of added"},
               {0.8, "another scale"}};
  for (const auto& [dtype, to] : {std::pair{"F32", Float::kF32}, {"BF16", Float::kBF16}}) {
    for (const auto& c : cases) {
      const MergeTable t = made.check(rounded(made.sum(c.scale), to), dtype);
      EXPECT_EQ(t.form.at(0), c.form) << dtype;
      EXPECT_NEAR(t.fitted[0], c.scale, 0.02);
    }
  }
}

TEST(MergeCheck, WrongLayoutsAndRoundingsAreNamed) {
  const Made made;
  EXPECT_EQ(made.check(rounded(made.sum(2, true), Float::kF32), "F32").form.at(0), "the update transposed");
  EXPECT_EQ(made.check(rounded(made.sum(2), Float::kBF16), "F32").form.at(0), "summed in bfloat16 before it was stored");
  Values noise = rounded(made.sum(2), Float::kF32);
  noise[17] += 0.01f;
  const MergeTable t = made.check(noise, "F32");
  EXPECT_EQ(t.form.at(0), "unknown");
  EXPECT_EQ(t.outside.at(0), 1);
}

TEST(MergeCheck, ATensorWithoutAnAdapterMustBeTheBases) {
  const Made made;
  WeightFile base, merged, adapter;
  base.add_f32(kModule + ".weight", {kSize, kSize}, made.w);
  merged.add_f32(kModule + ".weight", {kSize, kSize}, rounded(made.sum(2), Float::kF32));
  base.add_f32("lm_head.weight", {1, 3}, {1, 2, 3});
  merged.add_f32("lm_head.weight", {1, 3}, {1, 2, 4});
  base.add_f32("model.embed_tokens.weight", {1, 2}, {1, 2});
  merged.add_f32("model.embed_tokens.weight", {1, 2}, {5, 6});
  adapter.add_f32("base_model.model." + kModule + ".lora_A.weight", {kRank, kSize}, made.a);
  adapter.add_f32("base_model.model." + kModule + ".lora_B.weight", {kSize, kRank}, made.b);
  adapter.add_f32("base_model.model.model.embed_tokens.weight", {1, 2}, {5, 6});  // trained and saved whole
  const MergeTable t = Made::run(base, merged, adapter, false);
  ASSERT_EQ(t.form.size(), 2u);
  EXPECT_EQ(t.form[1], "differs from the base without an adapter");
  EXPECT_EQ(t.module[1], "lm_head.weight");
  EXPECT_EQ(t.outside[1], 1);
  EXPECT_EQ(t.unadapted, 1);
}

/// A stack of experts [E, out, in] as PEFT adapts it: expert slow in the rows of A, fast in the columns of B.
TEST(MergeCheck, StacksAreMergedExpertByExpert) {
  constexpr int kOut = 8, kIn = 6;
  const Values w = random_values(kExperts * kOut * kIn, 0.05, 4), a = random_values(kExperts * kRank * kIn, 0.1, 5),
               b = random_values(kOut * kRank * kExperts, 0.1, 6);
  const auto merged = [&](bool slow) {
    std::vector<double> m(w.begin(), w.end());
    for (int e = 0; e < kExperts; ++e) {
      for (int o = 0; o < kOut; ++o) {
        for (int i = 0; i < kIn; ++i) {
          for (int r = 0; r < kRank; ++r) {
            const float bv = b[o * kRank * kExperts + (slow ? e * kRank + r : r * kExperts + e)];
            m[(e * kOut + o) * kIn + i] += 2.0 * static_cast<double>(bv) * a[(e * kRank + r) * kIn + i];
          }
        }
      }
    }
    return rounded(m, Float::kF32);
  };
  WeightFile base, adapter;
  base.add_f32("model.layers.0.mlp.experts.down_proj", {kExperts, kOut, kIn}, w);
  adapter.add_f32("base_model.model.model.layers.0.mlp.experts.lora_A.weight", {kExperts * kRank, kIn}, a);
  adapter.add_f32("base_model.model.model.layers.0.mlp.experts.lora_B.weight", {kOut, kRank * kExperts}, b);
  const nlohmann::json facts = {{"model.family", "qwen3_moe"}, {"model.num_layers", 1},  {"model.moe_layers", {0}},
                                {"router.num_experts", kExperts}, {"model.hidden_size", kOut}, {"model.expert_width", kIn}};
  for (bool slow : {false, true}) {
    WeightFile out;
    out.add_f32("model.layers.0.mlp.experts.down_proj", {kExperts, kOut, kIn}, merged(slow));
    const MergeTable t = Made::run(base, out, adapter, false, facts);
    ASSERT_EQ(t.form.size(), static_cast<std::size_t>(kExperts));
    for (int e = 0; e < kExperts; ++e) {
      EXPECT_EQ(t.expert[e], e);
      EXPECT_EQ(t.form[e], slow ? "B of the stack read with the expert as the slow index of its columns" : "");
    }
  }
}

TEST(MergeCheck, AlphaPatternsCount) {
  const Made made;
  WeightFile base, merged, adapter;
  base.add_f32(kModule + ".weight", {kSize, kSize}, made.w);
  merged.add_f32(kModule + ".weight", {kSize, kSize}, rounded(made.sum(2), Float::kF32));
  adapter.add_f32("base_model.model." + kModule + ".lora_A.weight", {kRank, kSize}, made.a);
  adapter.add_f32("base_model.model." + kModule + ".lora_B.weight", {kSize, kRank}, made.b);
  const MergeTable t = Made::run(base, merged, adapter, false, {{"adapter.alpha_pattern", {"o_proj=15"}}});
  EXPECT_EQ(t.scale.at(0), 5);
  EXPECT_EQ(t.form.at(0), "alpha_pattern ignored");
}

}  // namespace
}  // namespace moeaudit
