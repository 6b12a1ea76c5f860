// The build's own reader of audit/families, audit/behaviours and its advisories: what it refuses, and that it says where.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace {

namespace fs = std::filesystem;
const fs::path kSource = MOE_AUDIT_SOURCE_DIR;

std::string read(const fs::path& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

/// A copy of the two folders in which one file gets one text replaced, or is written anew.
class CompileTables : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    root_ = fs::temp_directory_path() / ("moe-audit-tables-" + std::to_string(::getpid()) + "-" + test->name());
    for (const char* folder : {"families", "behaviours", "behaviours/advisories"}) {
      fs::create_directories(root_ / folder);
      for (const auto& entry : fs::directory_iterator(kSource / "audit" / folder)) {
        if (entry.path().extension() == ".yaml") fs::copy_file(entry.path(), root_ / folder / entry.path().filename());
      }
    }
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& file, const std::string& text) { std::ofstream(root_ / file) << text; }
  void replace(const std::string& file, const std::string& from, const std::string& to) {
    std::string text = read(root_ / file);
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n'));
    write(file, text.replace(at, from.size(), to));
  }
  /// Exit status; what it said is in output_.
  int run() {
    const std::string command = std::string(MOE_AUDIT_BINARY_DIR) + "/bin/compile_tables '" +
                                (root_ / "families").string() + "' '" + (root_ / "behaviours").string() + "' '" +
                                (root_ / "out").string() + "' 2>&1";
    FILE* pipe = popen(command.c_str(), "r");
    output_.clear();
    std::array<char, 512> buffer;
    while (pipe && fgets(buffer.data(), buffer.size(), pipe)) output_ += buffer.data();
    return pipe ? pclose(pipe) : -1;
  }
  void expect_refused(const std::string& file, const std::string& why) {
    EXPECT_NE(run(), 0);
    EXPECT_NE(output_.find(file + ":" + std::to_string(line_) + ": error: "), std::string::npos) << output_;
    EXPECT_NE(output_.find(why), std::string::npos) << output_;
    EXPECT_EQ(std::count(output_.begin(), output_.end(), '\n'), 1) << output_;
  }

  fs::path root_;
  std::string output_;
  int line_ = 0;
};

TEST_F(CompileTables, AcceptsTheCommittedFolders) {
  EXPECT_EQ(run(), 0) << output_;
  EXPECT_TRUE(output_.empty());
  EXPECT_NE(read(root_ / "out/families.cc").find("\"mixtral\""), std::string::npos);
}

TEST_F(CompileTables, IsDeterministic) {
  ASSERT_EQ(run(), 0);
  const std::string first = read(root_ / "out/families.cc") + read(root_ / "out/behaviours.cc");
  ASSERT_EQ(run(), 0);
  EXPECT_EQ(read(root_ / "out/families.cc") + read(root_ / "out/behaviours.cc"), first);
}

TEST_F(CompileTables, RefusesAnUnknownKey) {
  replace("families/mixtral.yaml", "moe_layer_rule: all", "moe_layer_rule: all\nmoe_layer_rul: all");
  ++line_;
  expect_refused("families/mixtral.yaml", "unknown key 'moe_layer_rul'");
}

TEST_F(CompileTables, RefusesToCountWithoutAList) {
  replace("families/mixtral.yaml", "moe_layer_rule: all", "moe_layer_rule: {from: 0, counts: true}");
  expect_refused("families/mixtral.yaml", "counts: true needs 'types'");
}

TEST_F(CompileTables, RefusesAnAlternativeThatIsNoTensor) {
  replace("families/nemotron_h.yaml", "instead: [\"backbone.layers.{L}.mixer.in_proj.weight\", \"backbone.layers.{L}.mixer.q_proj.weight\"]",
          "instead: [\"backbone.layers.{L}.mixer.in_proj.weight\", \"backbone.layers.{L}.mixer.qkv.weight\"]");
  expect_refused("families/nemotron_h.yaml", "instead: 'backbone.layers.{L}.mixer.qkv.weight' is no tensor of this family");
}

TEST_F(CompileTables, RefusesAKeyWrittenTwice) {
  replace("families/mixtral.yaml", "moe_layer_rule: all", "moe_layer_rule: all\nmoe_layer_rule: all");
  ++line_;
  expect_refused("families/mixtral.yaml", "written twice");
}

TEST_F(CompileTables, RefusesAMisspeltWord) {
  replace("families/olmoe.yaml", "  scoring: softmax", "  scoring: softmx");
  expect_refused("families/olmoe.yaml",
                 "'softmx' is no value of 'scoring'; write one of: sigmoid, softmax, sqrtsoftplus");
}

TEST_F(CompileTables, RefusesAnUnknownFact) {
  replace("families/olmoe.yaml", "  router.top_k: ", "  router.topk: ");
  expect_refused("families/olmoe.yaml", "'router.topk' is no fact");
}

TEST_F(CompileTables, RefusesAMissingCite) {
  replace("families/olmoe.yaml", "  router.top_k: {keys: [num_experts_per_tok], default: 8, cite: \"config:83\"}",
          "  router.top_k: {keys: [num_experts_per_tok], default: 8}");
  expect_refused("families/olmoe.yaml", "missing key 'cite'");
}

TEST_F(CompileTables, RefusesACiteOfNoSource) {
  replace("families/olmoe.yaml", "cite: \"config:83\"", "cite: \"confg:83\"");
  expect_refused("families/olmoe.yaml", "'confg' is not in sources:");
}

TEST_F(CompileTables, RefusesACiteOfNoSourceAtARelease) {
  replace("families/olmoe.yaml", "cite: \"config:83\"", "cite: \"confg@v5.0.0:83\"");
  expect_refused("families/olmoe.yaml", "'confg' is not in sources:");
}

TEST_F(CompileTables, RefusesAFamilyThatKeepsSilentAboutAFact) {
  replace("families/olmoe.yaml", "  router.routed_scaling: {default: 1, cite: \"code:344\"}\n", "");
  line_ = 2;  // the file's mapping begins below its first comment
  expect_refused("families/olmoe.yaml", "nothing is said of 'router.routed_scaling'");
}

TEST_F(CompileTables, AcceptsAFactThatIsSaidToBeUnknown) {
  replace("families/olmoe.yaml", "  router.routed_scaling: {default: 1, cite: \"code:344\"}\n", "");
  replace("families/olmoe.yaml", "moe_layer_rule: all", "unknown: [router.routed_scaling]\nmoe_layer_rule: all");
  EXPECT_EQ(run(), 0) << output_;
}

TEST_F(CompileTables, RefusesTwoFamiliesOfOneModelType) {
  replace("families/qwen2_moe.yaml", "model_types: [qwen2_moe]", "model_types: [qwen2_moe, mixtral]");
  expect_refused("families/qwen2_moe.yaml", "model_type 'mixtral' belongs to");
}

TEST_F(CompileTables, RefusesABadShapeAndATensorOfNoFamily) {
  replace("families/mixtral.yaml", "shape: [E, 2*I, H]", "shape: [E, 2I, H]");
  expect_refused("families/mixtral.yaml", "shape '2I'");
  replace("families/mixtral.yaml", "shape: [E, 2I, H]", "shape: [E, 2*I, H]");
  replace("families/mixtral.yaml", "  weight: \"model.layers.{L}.block_sparse_moe.gate.weight\"",
          "  weight: \"model.layers.{L}.gate.weight\"");
  expect_refused("families/mixtral.yaml", "is no hub tensor of this family");
}

TEST_F(CompileTables, RefusesASecondSetOfExpertsThatIsAudited) {
  replace("families/ernie4_5_vl_moe.yaml", "experts.{v}.up_proj.weight\", shape: [\"?\", H], part: other",
          "experts.{v}.up_proj.weight\", shape: [\"?\", H], part: routed_expert");
  expect_refused("families/ernie4_5_vl_moe.yaml", "{v} is of a second set of experts, part: other");
}

TEST_F(CompileTables, AFamilyLikeAnotherTakesItsNamesOver) {
  ASSERT_EQ(run(), 0) << output_;
  EXPECT_NE(read(root_ / "out/families.cc").find("\"model.language_model.layers.{L}.mlp.gate.weight\""), std::string::npos);
  replace("families/qwen3_5_moe.yaml", "like: qwen3_5_moe_text", "like: qwen3_6_moe_text");
  expect_refused("families/qwen3_5_moe.yaml", "there is no qwen3_6_moe_text.yaml");
}

TEST_F(CompileTables, RefusesAHubModelOfNoFamilyOrKey) {
  replace("families/hub_ids.yaml", "family: gpt_oss", "family: gptoss");
  expect_refused("families/hub_ids.yaml", "family 'gptoss' has no file");
  replace("families/hub_ids.yaml", "family: gptoss", "family: gpt_oss");
  replace("families/hub_ids.yaml", "{num_local_experts: 32", "{num_lokal_experts: 32");
  expect_refused("families/hub_ids.yaml", "'num_lokal_experts' is no config key");
}

TEST_F(CompileTables, RefusesYamlThatDoesNotParse) {
  write("families/broken.yaml", "# broken\nfamily: [\n");
  EXPECT_NE(run(), 0);
  EXPECT_NE(output_.find("families/broken.yaml:"), std::string::npos) << output_;
}

constexpr const char* kHead = "package: some\nrows:\n";

TEST_F(CompileTables, RefusesContradictingRows) {
  write("behaviours/some.yaml",
        std::string(kHead) +
            "  - {topic: t, from: \"1.0\", until: \"2.0\", value: a, cite: a/b@1}\n"
            "  - {topic: t, when: {family: [mixtral]}, from: \"1.5\", value: b, cite: a/b@2}\n");
  line_ = 4;
  expect_refused("behaviours/some.yaml", "some t: 'b' contradicts 'a'");
}

TEST_F(CompileTables, AcceptsRowsThatNeverMeet) {
  write("behaviours/some.yaml", std::string(kHead) +
                                    "  - {topic: t, from: \"1.0\", until: \"2.0\", value: a, cite: a/b@1}\n"
                                    "  - {topic: t, from: \"2.0\", when: {family: [mixtral]}, value: b, cite: a/b@2}\n"
                                    "  - {topic: t, from: \"2.0\", when: {family: [olmoe]}, value: c, cite: a/b@3}\n");
  EXPECT_EQ(run(), 0) << output_;
}

TEST_F(CompileTables, RefusesBadVersionsAndEmptyWindows) {
  write("behaviours/some.yaml", std::string(kHead) + "  - {topic: t, from: one, value: a, cite: a/b@1}\n");
  line_ = 3;
  expect_refused("behaviours/some.yaml", "'one' is no version");
  write("behaviours/some.yaml",
        std::string(kHead) + "  - {topic: t, from: \"2.0\", until: \"2.0\", value: a, cite: a/b@1}\n");
  expect_refused("behaviours/some.yaml", "is empty");
}

TEST_F(CompileTables, RefusesReadingWhereMeasuringIsAsked) {
  write("behaviours/some.yaml", std::string(kHead) + "  - {topic: loss_factor, value: GA, cite: a/b@1}\n");
  line_ = 3;
  expect_refused("behaviours/some.yaml", "takes measured rows only");
  write("behaviours/some.yaml",
        std::string(kHead) + "  - {topic: loss_factor, value: GA2, measured: true, cite: fixtures/oracle/x.json}\n");
  expect_refused("behaviours/some.yaml", "'GA2' is no value of topic 'loss_factor'");
}

TEST_F(CompileTables, RefusesAnOpenListOfKeys) {
  write("behaviours/some.yaml",
        "package: some\nknown_keys:\n  - list: L\n    cite: a/b@1\n    groups:\n      - {from: \"1.0\", keys: [a]}\n");
  line_ = 6;
  expect_refused("behaviours/some.yaml", "closed window only");
}

// ---- advisories -----------------------------------------------------------------------------------------------------

constexpr const char* kAdvisory = "behaviours/advisories/trl.yaml";

TEST_F(CompileTables, RefusesAConditionOnNoFact) {
  replace(kAdvisory, "balance.trainer_coefficient != 0", "balance.trainer_koefficient != 0");
  line_ -= 1;  // of the list
  expect_refused(kAdvisory, "no fact is called 'balance.trainer_koefficient'");
}

TEST_F(CompileTables, RefusesComparisonsThatDoNotApply) {
  replace(kAdvisory, "training.trainer == SFTTrainer", "training.trainer > SFTTrainer");
  expect_refused(kAdvisory, "'>' does not apply to training.trainer; write one of: !=, ==, in");
  replace(kAdvisory, "training.trainer > SFTTrainer", "training.trainer == SFTTrainer, DPOTrainer");
  expect_refused(kAdvisory, "one value, or 'in' with several");
  replace(kAdvisory, "training.trainer == SFTTrainer, DPOTrainer", "balance.aux_coefficient != some");
  expect_refused(kAdvisory, "'some' is no number");
}

TEST_F(CompileTables, RefusesAnIdUsedTwice) {
  replace(kAdvisory, "id: AV021", "id: AV020");
  line_ = 0;
  EXPECT_NE(run(), 0);
  EXPECT_NE(output_.find("'AV020' is used twice"), std::string::npos) << output_;
}

TEST_F(CompileTables, RefusesMalformedWindows) {
  replace(kAdvisory, "[{from: \"0.23.0\", until: \"0.23.1\"}]", "[{from: \"0.23.0\"}]");
  expect_refused(kAdvisory, "ends with until");
  replace(kAdvisory, "[{from: \"0.23.0\"}]", "[{from: \"0.23.1\", until: \"0.23.0\"}]");
  expect_refused(kAdvisory, "ends before it begins: 0.23.1 to 0.23.0");
  replace(kAdvisory, "[{from: \"0.23.1\", until: \"0.23.0\"}]", "[{until: \"0.23.1\"}, {from: \"0.23.1\", until: \"0.24.0\"}]");
  expect_refused(kAdvisory, "in order and apart");
}

TEST_F(CompileTables, RefusesARemedyThatDoesNotHelp) {
  replace(kAdvisory, "release: \"trl>=0.23.1\"", "release: \"trl>=0.22\"");
  line_ = 0;
  EXPECT_NE(run(), 0);
  EXPECT_NE(output_.find("trl>=0.22 still lies in an affected window of trl"), std::string::npos) << output_;
}

TEST_F(CompileTables, RefusesAnErrorThatIsOnlyReported) {
  replace(kAdvisory, "evidence: measured", "evidence: reported");
  expect_refused(kAdvisory, "an error needs evidence");
}

TEST_F(CompileTables, RefusesAnAdvisoryForEveryone) {
  write("behaviours/advisories/some.yaml", std::string("package: trl\nadvisories:\n  - id: AV900\n    name: some-name\n"
        "    since: \"0.1.0\"\n    severity: note\n    evidence: read\n    affected: all\n    when: []\n"));
  line_ = 9;
  expect_refused("behaviours/advisories/some.yaml", "say by at least one condition whom it bites");
}

}  // namespace
