// Correction biases of the fixtures; the counts are torch's: (v.bfloat16().float() != v).sum().
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_correction_bias;
extern const Measure measure_header_scan;
namespace {

using namespace test;

Bench scan(const std::string& folder) {
  Bench bench;
  bench.facts = testing::facts_from_json(model_facts(folder));
  bench.model = open_weights(folder);
  bench.run(measure_header_scan);
  bench.run(measure_correction_bias);
  return bench;
}

TEST(CorrectionBias, StoredInBothTypes) {
  for (const bool half : {true, false}) {
    const Bench bench = scan(fixture(half ? "models/deepseek_v3-tf4" : "models/deepseek_v3-tf5"));
    const CorrectionBias& t = bench.facts.correction_bias.value();
    EXPECT_EQ(t.layer, (std::vector<int>{1, 2, 3}));
    EXPECT_EQ(t.dtype, std::vector<DType>(3, half ? DType::kBF16 : DType::kF32));
    EXPECT_EQ(t.off_bf16, std::vector<std::int64_t>(3, half ? 0 : 16));
    EXPECT_EQ(t.off_fp16, std::vector<std::int64_t>(3, half ? 0 : 16));
    EXPECT_EQ(t.distinct, std::vector<std::int64_t>(3, 16));
    EXPECT_EQ(t.zeros, std::vector<std::int64_t>(3, 0));
    EXPECT_EQ(t.max_abs[0], half ? 0.2119140625 : 0.2117907553911209);
    EXPECT_EQ(t.bf16_spacing[0], 0x1p-10);  // in [1/8, 1/4): 2^-3 x 2^-7
    EXPECT_EQ(t.fp16_spacing[0], 0x1p-13);
    EXPECT_TRUE(t.kept_fp32);
  }
}

TEST(CorrectionBias, SaysWhyItCannotTell) {
  EXPECT_EQ(scan(fixture("models/mixtral-tf4")).facts.correction_bias.why_unknown(), "the weight files hold no correction bias");
  Bench bench;
  bench.run(measure_header_scan);
  bench.run(measure_correction_bias);
  EXPECT_EQ(bench.facts.correction_bias.why_unknown(), "no weights of the model are among the inputs");
}

}  // namespace
}  // namespace moeaudit
