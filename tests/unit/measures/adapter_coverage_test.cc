// What the adapters of the fixtures reach, from their files and from their configurations. Expected counts are worked out by
// hand from the recipes in fixtures/make/make_run.py: layers x experts x projections.
#include <map>
#include <set>
#include <sstream>

#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_adapter_coverage;
namespace {

using namespace test;
using nlohmann::json;

std::string base_of(const std::string& run) {
  if (std::filesystem::exists(fixture(run + "/base"))) return fixture(run + "/base");
  return fixture(run) + "/" + std::string(read_json(fixture(run + "/run.json"))["model_name_or_path"]);
}

/// A line "package==version" of requirements.txt.
json pinned(const std::string& run, const std::string& package) {
  std::ifstream file(fixture(run + "/requirements.txt"));
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(package + "==", 0) == 0) return line.substr(package.size());
  }
  ADD_FAILURE() << run << " has no " << package;
  return nullptr;
}

/// The facts the readers take from adapter_config.json and requirements.txt of a run.
json run_facts(const std::string& run, const std::string& checkpoint) {
  json facts = model_facts(base_of(run));
  const json config = read_json(fixture(run + "/" + checkpoint + "/adapter_config.json"));
  facts["adapter.present"] = true;
  facts["adapter.rank"] = config["r"];
  facts["adapter.dropout"] = config["lora_dropout"];
  facts["adapter.target_modules"] = {{"value", config["target_modules"]}, {"role", "adapter_config"}, {"file", "adapter_config.json"}, {"line", 30}};
  facts["adapter.target_modules_is_pattern"] = {{"value", false}, {"role", "adapter_config"}, {"file", "adapter_config.json"}, {"line", 30}};
  if (config.contains("target_parameters") && config["target_parameters"].is_array()) {
    facts["adapter.target_parameters"] = {{"value", config["target_parameters"]}, {"role", "adapter_config"}};
  }
  json ranks = json::array();
  for (const auto& [pattern, rank] : config["rank_pattern"].items()) ranks.push_back(pattern + "=" + std::to_string(rank.get<int>()));
  facts["adapter.rank_pattern"] = ranks;
  facts["versions.transformers"] = pinned(run, "transformers");
  facts["versions.peft"] = pinned(run, "peft");
  return facts;
}

Bench cover(const json& facts, const std::string& model = {}, const std::string& adapter = {}) {
  Bench bench;
  bench.facts = testing::facts_from_json(facts);
  if (!model.empty()) bench.model = open_weights(model);
  if (!adapter.empty()) bench.adapter = open_weights(adapter, "adapter_model");
  bench.run(measure_adapter_coverage);
  return bench;
}

std::map<Part, std::size_t> parts(const AdapterModules& m) {
  std::map<Part, std::size_t> out;
  for (Part p : m.part) ++out[p];
  return out;
}
using Parts = std::map<Part, std::size_t>;

struct Finished {
  std::string name, checkpoint;
  Parts parts;
};
const std::vector<Finished> kRuns = {
    // 4 layers: 4 attention projections, 8 experts x w1 w2 w3, one router
    {"mixtral-qlora-broken", "checkpoint-10", {{Part::kAttention, 16}, {Part::kRoutedExpert, 96}, {Part::kRouter, 4}}},
    {"mixtral-qlora-healthy", "checkpoint-10", {{Part::kAttention, 16}, {Part::kRoutedExpert, 96}}},
    {"expert-untrained", "checkpoint-10", {{Part::kAttention, 16}, {Part::kRoutedExpert, 96}}},
    {"layer-experts-untrained", "checkpoint-10", {{Part::kAttention, 16}, {Part::kRoutedExpert, 96}}},
    {"mixtral-sft-trl", "checkpoint-30", {{Part::kAttention, 16}}},
    {"mixtral-nan-loss", "checkpoint-10", {{Part::kAttention, 8}}},
    // q_proj and v_proj, and the two stacks of each layer where they were hit
    {"qwen3moe-fused-missed", "checkpoint-10", {{Part::kAttention, 8}}},
    {"qwen3moe-fused-hit", "checkpoint-10", {{Part::kAttention, 8}, {Part::kRoutedExpert, 8}}},
    {"qwen3moe-peft-rewritten", "checkpoint-10", {{Part::kAttention, 8}, {Part::kRoutedExpert, 8}}},
    // 5 attention matrices x 4; layer 0 dense; 3 layers x (16 experts + 1 shared) x 3
    {"deepseek_v3-lora", "checkpoint-10", {{Part::kAttention, 20}, {Part::kDenseMlp, 3}, {Part::kRoutedExpert, 144}, {Part::kSharedExpert, 9}}}};

TEST(AdapterCoverage, TheFileTheRunWroteIsMeasured) {
  for (const Finished& run : kRuns) {
    SCOPED_TRACE(run.name);
    const std::string folder = "runs/" + run.name;
    const Bench bench = cover(run_facts(folder, run.checkpoint), base_of(folder), fixture(folder + "/" + run.checkpoint));
    ASSERT_TRUE(bench.facts.adapter_modules.known());
    EXPECT_EQ(bench.facts.adapter_modules.origin(), Origin::kMeasured);
    EXPECT_EQ(parts(bench.facts.adapter_modules.value()), run.parts);
  }
}

// Two roads to one table: names, ranks and sizes from the tensors, and from resolving the configuration the run wrote under
// the versions it pinned.
TEST(AdapterCoverage, ResolutionGivesWhatTheFileHolds) {
  for (const Finished& run : kRuns) {
    SCOPED_TRACE(run.name);
    const std::string folder = "runs/" + run.name;
    const json facts = run_facts(folder, run.checkpoint);
    const Bench measured = cover(facts, base_of(folder), fixture(folder + "/" + run.checkpoint));
    const Bench resolved = cover(facts, base_of(folder));
    ASSERT_TRUE(resolved.facts.adapter_modules.known()) << resolved.facts.adapter_modules.why_unknown();
    EXPECT_EQ(resolved.facts.adapter_modules.origin(), Origin::kDerived);
    const AdapterModules &m = measured.facts.adapter_modules.value(), &r = resolved.facts.adapter_modules.value();
    std::map<std::string, std::size_t> row;
    for (std::size_t i = 0; i < m.module.size(); ++i) row[m.module[i]] = i;
    ASSERT_EQ(row.size(), r.module.size());
    for (std::size_t j = 0; j < r.module.size(); ++j) {
      SCOPED_TRACE(r.module[j]);
      ASSERT_TRUE(row.count(r.module[j]));
      const std::size_t i = row[r.module[j]];
      EXPECT_EQ(r.part[j], m.part[i]);
      EXPECT_EQ(r.layer[j], m.layer[i]);
      EXPECT_EQ(r.expert[j], m.expert[i]);
      EXPECT_EQ(r.rank[j], m.rank[i]);
      EXPECT_EQ(r.in[j], m.in[i]);
      EXPECT_EQ(r.out[j], m.out[i]);
      EXPECT_EQ(r.copies[j], m.copies[i]);
      EXPECT_EQ(r.by_parameter[j], m.by_parameter[i]);
      EXPECT_EQ(r.adapter_parameters[j], m.adapter_parameters[i]);
      EXPECT_EQ(r.base_parameters[j], m.base_parameters[i]);
    }
  }
}

TEST(AdapterCoverage, SizesOfARouterAdapter) {
  const std::string run = "runs/mixtral-qlora-broken";
  const AdapterModules m = cover(run_facts(run, "checkpoint-10"), base_of(run), fixture(run + "/checkpoint-10")).facts.adapter_modules.value();
  std::size_t routers = 0;
  for (std::size_t i = 0; i < m.module.size(); ++i) {
    if (m.part[i] != Part::kRouter) continue;
    EXPECT_EQ(m.adapter_parameters[i], 16 * (64 + 8));  // r (d + E)
    EXPECT_EQ(m.base_parameters[i], 64 * 8);            // d E
    ++routers;
  }
  EXPECT_EQ(routers, 4u);
}

TEST(AdapterCoverage, RanksOfRewrittenStacks) {
  const std::string run = "runs/qwen3moe-peft-rewritten";
  const AdapterModules m = cover(run_facts(run, "checkpoint-10"), base_of(run), fixture(run + "/checkpoint-10")).facts.adapter_modules.value();
  for (std::size_t i = 0; i < m.module.size(); ++i) {
    if (m.part[i] != Part::kRoutedExpert) continue;
    EXPECT_EQ(m.rank[i], m.module[i].find("gate_up_proj") != std::string::npos ? 4 : 2);  // gate and up at r = 2 each
    EXPECT_EQ(m.copies[i], 64);
    EXPECT_TRUE(m.by_parameter[i]);
  }
}

// ---- entries ---------------------------------------------------------------------------------------------------------

std::size_t row_of(const AdapterTargets& t, const std::string& entry) {
  const auto at = std::find(t.entry.begin(), t.entry.end(), entry);
  EXPECT_NE(at, t.entry.end()) << entry;
  return static_cast<std::size_t>(at - t.entry.begin());
}

TEST(AdapterTargets, ExpertNamesThatMissTheFusedExperts) {
  const std::string run = "runs/qwen3moe-fused-missed";
  const AdapterTargets t = cover(run_facts(run, "checkpoint-10"), base_of(run), fixture(run + "/checkpoint-10")).facts.adapter_targets.value();
  ASSERT_EQ(t.entry.size(), 5u);
  for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
    const std::size_t i = row_of(t, name);
    EXPECT_EQ(t.hits[i], 0);
    EXPECT_EQ(t.reaches[i], "");
    EXPECT_TRUE(t.names_experts[i]);
    EXPECT_NE(t.why[i].find("target_parameters"), std::string::npos);
  }
  const std::size_t q = row_of(t, "q_proj");
  EXPECT_EQ(t.hits[q], 4);
  EXPECT_EQ(t.reaches[q], std::string(name_of(Part::kAttention)) + " 4");
  EXPECT_FALSE(t.names_experts[q]);
  EXPECT_TRUE(t.certain[q]);
  EXPECT_EQ(t.file[q], "adapter_config.json");
  EXPECT_EQ(t.line[q], 30);
}

/// What a user configures before the run: target names in an Axolotl file, on a model directory.
json configured(const std::string& model, const json& targets, const std::string& transformers, const std::string& peft) {
  json facts = model_facts(fixture("models/" + model));
  facts["adapter.present"] = true;
  facts["adapter.rank"] = 8;
  facts["adapter.dropout"] = 0.0;
  const json place = {{"role", "training_config"}, {"file", "axolotl.yml"}, {"line", 12}};
  facts["adapter.target_modules"] = place;
  facts["adapter.target_modules"]["value"] = targets.is_string() ? json::array({targets}) : targets;
  facts["adapter.target_modules_is_pattern"] = place;
  facts["adapter.target_modules_is_pattern"]["value"] = targets.is_string();
  if (!transformers.empty()) facts["versions.transformers"] = transformers;
  if (!peft.empty()) facts["versions.peft"] = peft;
  return facts;
}

TEST(AdapterTargets, UnknownVersionsShowTheBestCaseAndSayItIsNotCertain) {
  const Bench bench = cover(configured("mixtral-tf4", {"q_proj", "w1", "w2", "w3"}, "", ""));
  EXPECT_FALSE(bench.facts.adapter_modules.known());
  EXPECT_EQ(bench.facts.adapter_modules.why_unknown().find("depends on the versions:"), 0u);
  const AdapterTargets& t = bench.facts.adapter_targets.value();
  EXPECT_EQ(t.hits, (std::vector<std::int64_t>{4, 32, 32, 32}));  // 4 layers; 8 experts each
  EXPECT_EQ(t.certain, (std::vector<char>{1, 0, 0, 0}));
  EXPECT_EQ(t.names_experts, (std::vector<char>{0, 1, 1, 1}));
  // Attention is reached alike everywhere.
  const Bench attention = cover(configured("mixtral-tf4", {"q_proj", "v_proj"}, "", ""));
  EXPECT_EQ(parts(attention.facts.adapter_modules.value()), (Parts{{Part::kAttention, 8}}));
}

TEST(AdapterTargets, TheFileTellsWhichStackItWas) {
  const std::string run = "runs/qwen3moe-fused-hit";
  json facts = run_facts(run, "checkpoint-10");
  facts.erase("versions.transformers");
  facts.erase("versions.peft");
  EXPECT_FALSE(cover(facts, base_of(run)).facts.adapter_modules.known());
  const AdapterTargets t = cover(facts, base_of(run), fixture(run + "/checkpoint-10")).facts.adapter_targets.value();
  const std::size_t i = row_of(t, "mlp.experts.gate_up_proj");
  EXPECT_EQ(t.hits[i], 4);
  EXPECT_TRUE(t.certain[i]);
}

TEST(AdapterTargets, AllLinearByVersion) {
  const Parts everything = {{Part::kAttention, 16}, {Part::kRoutedExpert, 96}, {Part::kRouter, 4}};
  const Parts stacks = {{Part::kAttention, 16}, {Part::kRoutedExpert, 8}, {Part::kRouter, 4}};
  const Parts attention = {{Part::kAttention, 16}};
  auto reach = [](const char* tf, const char* peft) { return cover(configured("mixtral-tf4", "all-linear", tf, peft)); };
  EXPECT_EQ(parts(reach("==4.57.6", "==0.18.1").facts.adapter_modules.value()), everything);
  EXPECT_EQ(parts(reach("==5.2.0", "==0.18.1").facts.adapter_modules.value()), attention);
  EXPECT_EQ(parts(reach("==5.2.0", "==0.21.2").facts.adapter_modules.value()), stacks);
  const Bench broken = reach("==5.2.0", "==0.19.1");
  EXPECT_FALSE(broken.facts.adapter_modules.known());
  EXPECT_NE(broken.facts.adapter_modules.why_unknown().find("letters"), std::string::npos);
  EXPECT_EQ(broken.facts.adapter_targets.value().hits, std::vector<std::int64_t>{0});
  EXPECT_FALSE(broken.facts.adapter_targets.value().names_experts[0]);
  // A run that took steps was not stopped by PEFT: of 0.18.1 to 0.20 only those that accept it remain.
  json facts = configured("mixtral-tf4", "all-linear", "==5.2.0", ">=0.18.1,<0.20");
  EXPECT_FALSE(cover(facts).facts.adapter_modules.known());
  facts["training.optimizer_steps"] = 10;
  EXPECT_EQ(parts(cover(facts).facts.adapter_modules.value()), attention);
}

TEST(AdapterTargets, AxolotlsLinearLayersAreAList) {
  json facts = configured("mixtral-tf4", "all-linear", "==5.2.0", "==0.19.1");
  facts["adapter.target_modules"]["key"] = "lora_target_linear";
  facts["adapter.target_modules_is_pattern"]["key"] = "lora_target_linear";
  EXPECT_EQ(parts(cover(facts).facts.adapter_modules.value()), (Parts{{Part::kAttention, 16}}));
}

TEST(AdapterTargets, PatternsNameExpertsByWhatTheyReach) {
  const AdapterTargets experts = cover(configured("mixtral-tf4", R"(.*\.experts\.\d+\.(w1|w2|w3))", "==5.2.0", "==0.18.1")).facts.adapter_targets.value();
  EXPECT_TRUE(experts.names_experts[0]);
  EXPECT_EQ(experts.hits[0], 0);
  const AdapterTargets without = cover(configured("mixtral-tf4", R"(^(?!.*experts).*_proj$)", "==5.2.0", "==0.18.1")).facts.adapter_targets.value();
  EXPECT_FALSE(without.names_experts[0]);
  EXPECT_EQ(without.hits[0], 16);
}

TEST(AdapterTargets, TheUsersWordsAreShownWherePeftRewroteThem) {
  const std::string run = "runs/qwen3moe-peft-rewritten";
  json facts = run_facts(run, "checkpoint-10");
  // The same targets as run.json states them, under what PEFT wrote.
  const json place = {{"role", "training_config"}, {"file", "run.yml"}, {"line", 7}};
  json as_written = place, is_list = place;
  as_written["value"] = {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"};
  is_list["value"] = false;
  facts["adapter.target_modules"]["shadowed"] = json::array({as_written});
  facts["adapter.target_modules_is_pattern"]["shadowed"] = json::array({is_list});
  const AdapterTargets t = cover(facts, base_of(run), fixture(run + "/checkpoint-10")).facts.adapter_targets.value();
  EXPECT_EQ(t.entry, (std::vector<std::string>{"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}));
  EXPECT_EQ(t.hits, (std::vector<std::int64_t>{4, 4, 4, 4, 4}));  // one stack a layer
  EXPECT_EQ(t.file[2], "run.yml");
  EXPECT_EQ(t.line[2], 7);
  EXPECT_EQ(t.reaches[2], std::string(name_of(Part::kRoutedExpert)) + " 4");
}

TEST(AdapterTargets, SavedContainersTrainWithAllBelow) {
  json facts = configured("mixtral-tf4", {"q_proj"}, "==4.57.6", "==0.18.1");
  facts["adapter.modules_to_save"] = {"block_sparse_moe"};
  const Bench bench = cover(facts);
  EXPECT_EQ(parts(bench.facts.adapter_modules.value()), (Parts{{Part::kAttention, 4}, {Part::kRoutedExpert, 96}, {Part::kRouter, 4}}));
  const AdapterModules& m = bench.facts.adapter_modules.value();
  for (std::size_t i = 0; i < m.module.size(); ++i) {
    if (m.part[i] != Part::kRouter) continue;
    EXPECT_EQ(m.rank[i], 0);
    EXPECT_EQ(m.adapter_parameters[i], 8 * 64);
  }
}

TEST(AdapterTargets, NothingSaidMeansPeftsDefaults) {
  json facts = configured("mixtral-tf4", {"q_proj"}, "==4.57.6", "==0.18.1");
  facts.erase("adapter.target_modules");
  facts.erase("adapter.target_modules_is_pattern");
  EXPECT_EQ(parts(cover(facts).facts.adapter_modules.value()), (Parts{{Part::kAttention, 8}}));  // q_proj, v_proj
  facts.erase("adapter.rank");
  EXPECT_EQ(cover(facts).facts.adapter_modules.why_unknown(), "no file says which modules the adapter targets");
}

TEST(AdapterTargets, SaysWhyItCannotTell) {
  json facts = configured("mixtral-tf4", "(?<=x).*", "==4.57.6", "==0.18.1");
  EXPECT_NE(cover(facts).facts.adapter_targets.why_unknown().find("lookbehind"), std::string::npos);
  facts = configured("mixtral-tf4", {"q_proj"}, "", "");
  facts.erase("model.family");
  EXPECT_EQ(cover(facts).facts.adapter_modules.why_unknown(), "the family of the model is not known");
  facts = configured("mixtral-tf4", {"q_proj"}, "", "");
  facts.erase("model.num_layers");
  EXPECT_EQ(cover(facts).facts.adapter_modules.why_unknown(), "model.num_layers is not known");
  facts = configured("mixtral-tf4", {"q_proj"}, "", "");
  facts["training.method"] = "other_adapter";
  EXPECT_NE(cover(facts).facts.adapter_modules.why_unknown().find("not a LoRA"), std::string::npos);
}

}  // namespace
}  // namespace moeaudit
