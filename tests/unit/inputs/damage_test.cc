// Real files, damaged at a fixed set of places: every reader must end with a problem or with what is left, and nothing
// else.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "audit/inputs/inputs.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

std::string bytes_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

/// Loads the run with the one file damaged in `steps` ways.
void damage(const std::string& file, int steps) {
  test::TempTree tree;
  tree.copy(test::fixture("runs/mixtral-qlora-healthy"), "run");
  const std::string path = tree.path("run/" + file);
  const std::string whole = bytes_of(path);
  ASSERT_FALSE(whole.empty());
  std::uint32_t state = 12345;
  auto random = [&](std::size_t n) {
    state = state * 1664525u + 1013904223u;
    return static_cast<std::size_t>(state >> 8) % n;
  };
  for (int i = 0; i < steps; ++i) {
    std::string damaged = whole;
    if (i % 3 == 0)
      damaged.resize(random(whole.size()));
    else if (i % 3 == 1)
      damaged[random(whole.size())] = static_cast<char>(random(256));
    else
      damaged.insert(random(whole.size()), "\"}]:\n\t{[,&*-|>#%@`'");
    std::ofstream(path, std::ios::binary | std::ios::trunc) << damaged;
    RunOptions options;
    options.paths = {tree.path("run")};
    const std::vector<LoadedRun> runs = load_runs(options);
    ASSERT_EQ(runs.size(), 1u);
    for (const InputProblem& p : runs[0].problems) {
      EXPECT_FALSE(p.what.empty() || p.remedy.empty()) << file << " step " << i;
    }
  }
}

TEST(Damage, AxolotlConfig) { damage("axolotl.yml", 150); }
TEST(Damage, AdapterConfig) { damage("checkpoint-10/adapter_config.json", 150); }
TEST(Damage, ModelConfig) { damage("base/config.json", 150); }
TEST(Damage, TrainerState) { damage("checkpoint-10/trainer_state.json", 150); }
TEST(Damage, TrainingArgs) { damage("checkpoint-10/training_args.bin", 150); }
TEST(Damage, Requirements) { damage("requirements.txt", 60); }
TEST(Damage, ModelCard) { damage("checkpoint-10/README.md", 60); }
TEST(Damage, AdapterWeights) { damage("checkpoint-10/adapter_model.safetensors", 60); }

}  // namespace
}  // namespace moeaudit
