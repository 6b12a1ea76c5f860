// A checkpoint's routers on hidden states, against what the real MoE blocks chose on them (fixtures/make/family_routing.py).
#include "audit/measures/routed_states.h"

#include <gtest/gtest.h>

#include <set>

#include "audit/inputs/inputs.h"
#include "audit/measures/expert_health.h"
#include "tests/unit/measures/fixture_model.h"
#include "tests/unit/traces/trace_files.h"

namespace moeaudit {
namespace {

using test::fixture;

struct Loaded {
  LoadedRun run;
  std::vector<InputProblem> problems;
  std::unique_ptr<Trace> trace;
  std::shared_ptr<ReplayBackend> backend = {};
};

Loaded route(const std::string& model, const std::string& states, const std::string& transformers) {
  RunOptions options;
  options.paths = {model};
  options.hidden_states = states;
  options.assume = {{"transformers", transformers}};
  Loaded out{std::move(load_runs(options).at(0)), {}, nullptr};
  out.trace = route_hidden_states(&out.run.facts, out.run.model, out.run.hidden_states, Device::kCpu, &out.backend, &out.problems);
  return out;
}

TEST(RoutedStates, ChooseAsTheRealBlocksDo) {
  const auto golden = test::read_json(fixture("golden/family_routing.json"));
  const test::TempTree tree;
  const std::vector<float> x = golden["x"];
  const std::string states = tree.write("x.safetensors", test::SafetensorsText().add("x", "F32", {16, 64}, x).text());
  int compared = 0;
  for (const char* name : {"mixtral-tf4", "olmoe-tf5", "qwen3_moe-tf4", "deepseek_v3-tf5", "gpt_oss-tf5"}) {
    const auto& model = golden["models"][name];
    const Loaded l = route(fixture(std::string("models/") + name), states, model["transformers"]);
    ASSERT_TRUE(l.trace) << name << ": " << (l.problems.empty() ? "" : l.problems[0].what);
    EXPECT_TRUE(l.problems.empty()) << name;
    ASSERT_EQ(l.trace->micro_batches().size(), 1u);
    std::vector<WeightProblem> problems;
    const MicroBatch mb = l.trace->open(l.trace->micro_batches()[0], &problems);
    const LayerTensors& last = mb.layers.back();
    std::vector<std::int32_t> ids(static_cast<std::size_t>(16 * last.top_k));
    ASSERT_TRUE(read_ids(*last.selected_experts, 0, 16 * last.top_k, ids.data()));
    for (const auto& run : model["runs"]) {
      if (run["dtype"] != "float32") continue;
      for (std::size_t t = 0; t < 16; ++t) {
        const std::vector<int> theirs = run["experts"][t];
        const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(t) * last.top_k;
        EXPECT_EQ(std::set<int>(theirs.begin(), theirs.end()), std::set<int>(begin, begin + last.top_k)) << name << ", token " << t;
        ++compared;
      }
    }
    const HealthReport report = measure_health(*l.trace, {});
    EXPECT_EQ(report.layers.size(), mb.layers.size());
    EXPECT_EQ(report.layers.back().tokens, 16);
    EXPECT_EQ(report.score_from, "family");
  }
  EXPECT_GE(compared, 5 * 16);
}

TEST(RoutedStates, SayWhatIsMissing) {
  const test::TempTree tree;
  const std::string narrow = tree.write("x.safetensors", test::SafetensorsText().add("x", "F32", {16, 4}, std::vector<float>(64)).text());
  const Loaded wrong_width = route(fixture("models/mixtral-tf4"), narrow, "4.57.6");
  EXPECT_FALSE(wrong_width.trace);
  ASSERT_FALSE(wrong_width.problems.empty());
  EXPECT_NE(wrong_width.problems[0].what.find("[tokens, 64]"), std::string::npos) << wrong_width.problems[0].what;
  const Loaded nothing = route(fixture("models/mixtral-tf4"), "", "4.57.6");
  EXPECT_FALSE(nothing.trace);
  EXPECT_NE(nothing.problems.at(0).remedy.find("--hidden-states"), std::string::npos);
  EXPECT_FALSE(route(fixture("models/dense-llama"), narrow, "4.57.6").trace);
}

}  // namespace
}  // namespace moeaudit
