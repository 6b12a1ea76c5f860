// Every reader on the real files of fixtures/, against golden.json: the same files read by PyYAML, Python's json and an
// unpickler of empty shells (make_golden.py). A fixture that the golden file does not know fails the test.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "audit/inputs/readers.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

using Json = nlohmann::json;

const Json& golden() {
  static const Json g =
      Json::parse(std::ifstream(std::string(MOE_AUDIT_SOURCE_DIR) + "/tests/unit/inputs/golden.json"));
  return g;
}
std::string at(const std::string& path) { return std::string(MOE_AUDIT_SOURCE_DIR) + "/" + path; }

Json to_json(const Node& n) {
  switch (n.kind) {
    case Node::Kind::kNull: return nullptr;
    case Node::Kind::kBool: return n.boolean;
    case Node::Kind::kNumber: return n.as_double().value();
    case Node::Kind::kString: return n.text;
    case Node::Kind::kList: {
      Json list = Json::array();
      for (const Node& item : n.items) list.push_back(to_json(item));
      return list;
    }
    case Node::Kind::kMap: {
      Json map = Json::object();
      for (std::size_t i = 0; i < n.keys.size(); ++i) map[n.keys[i]] = to_json(n.items[i]);
      return map;
    }
  }
  return nullptr;
}

/// What counts: the last statement of each name.
Json settings_of(const Material& m) {
  Json out = Json::object();
  for (const Setting& s : m.settings) out[s.name] = to_json(s.value);
  return out;
}

void expect_equal(const Json& got, const Json& want, const std::string& where) {
  EXPECT_EQ(got.size(), want.size()) << where << "\n got " << got << "\nwant " << want;
  for (const auto& [name, value] : want.items()) {
    ASSERT_TRUE(got.contains(name)) << where << ": no " << name;
    EXPECT_EQ(got[name], value) << where << ": " << name;
  }
}

void expect_places(const Material& m, bool has_lines, const std::string& where) {
  for (const Setting& s : m.settings) {
    EXPECT_EQ(s.source.file, where) << s.name;
    EXPECT_FALSE(s.source.key.empty()) << s.name;
    if (!has_lines) continue;
    std::ifstream file(where);
    std::string line;
    for (int i = 0; i < s.source.line; ++i) std::getline(file, line);
    const std::string leaf = s.source.key.substr(s.source.key.rfind('.') + 1);
    EXPECT_NE(line.find(leaf), std::string::npos) << where << ":" << s.source.line << " should hold " << s.source.key;
  }
}

TEST(Golden, TrainingConfigs) {
  for (const auto& [path, want] : golden()["configs"].items()) {
    Material m;
    Node root;
    ASSERT_TRUE(read_tree(at(path), &root, &m)) << path << ": " << m.problems.front().what;
    EXPECT_TRUE(m.problems.empty()) << path;
    const ConfigReader* reader = find_config_reader(root);
    ASSERT_TRUE(reader && reader->read) << path;
    EXPECT_EQ(reader->framework, want["framework"].get<std::string>()) << path;
    reader->read({at(path), Role::kTrainingConfig, &root}, &m);
    EXPECT_EQ(m.framework, want["framework"].get<std::string>()) << path;
    EXPECT_EQ(m.trainer, want.value("trainer", "")) << path;
    EXPECT_EQ(m.base_model, want["base"].get<std::string>()) << path;
    EXPECT_EQ(m.adapter_seen, want["settings"].contains("peft_type")) << path;
    expect_equal(settings_of(m), want["settings"], path);
    expect_places(m, true, at(path));
    std::set<std::string> other;
    for (const UnreadKey& k : m.unread_keys) other.insert(k.key);
    for (const IgnoredKey& k : m.ignored_keys) other.insert(k.key);
    EXPECT_EQ(Json(other), want["other"]) << path;
  }
}

TEST(Golden, AccelerateConfigOfLlamaFactory) {
  Material m;
  Node root;
  const std::string path = test::fixture("configs/llama-factory/accelerate__fsdp2_config_qwen35_moe.yaml");
  ASSERT_TRUE(read_tree(path, &root, &m));
  const ConfigReader* reader = find_config_reader(root);
  ASSERT_TRUE(reader && reader->read);
  EXPECT_EQ(reader->framework, "");  // it does not say who trains
  reader->read({path, Role::kTrainingConfig, &root}, &m);
  EXPECT_EQ(settings_of(m), Json({{"accelerate.mixed_precision", "bf16"}, {"fsdp", true}, {"fsdp_version", 2}, {"world_size", 8}}));
  expect_places(m, true, path);
}

TEST(Golden, TrainingArguments) {
  for (const auto& [path, want] : golden()["training_args"].items()) {
    Material m;
    read_training_args(at(path), &m);
    ASSERT_TRUE(m.problems.empty()) << path << ": " << m.problems.front().what;
    expect_equal(settings_of(m), want["settings"], path);
    expect_places(m, false, at(path));
    // Axolotl's own class runs transformers' loop, which resolve() says; the other two say it themselves.
    const std::string name = want["class"];
    const bool sft = name == "trl.trainer.sft_config.SFTConfig",
               axolotl = name == "axolotl.core.trainer_builder.AxolotlTrainingArguments";
    EXPECT_TRUE(sft || axolotl || name == "transformers.training_args.TrainingArguments") << name;
    EXPECT_EQ(m.framework, sft ? "trl" : axolotl ? "axolotl" : "transformers") << path;
    EXPECT_EQ(m.trainer, sft ? "SFTTrainer" : axolotl ? "" : "Trainer") << path;
    EXPECT_EQ(m.trainer_source.key, want["class"].get<std::string>());
  }
}

TEST(Golden, TrainerState) {
  auto same = [](double got, const Json& want) {
    return want.is_number() ? got == want.get<double>() : std::isnan(got);
  };
  for (const auto& [path, want] : golden()["trainer_state"].items()) {
    Material m;
    read_trainer_state(at(path), &m);
    ASSERT_TRUE(m.problems.empty()) << path << ": " << m.problems.front().what;
    EXPECT_EQ(m.global_step, want["global_step"]) << path;
    EXPECT_EQ(settings_of(m), (Json{{"max_steps", want["max_steps"]}})) << path;
    const LogTable& log = m.log;
    ASSERT_EQ(log.step.size(), want["step"].size()) << path;
    EXPECT_EQ(log.file, at(path));
    EXPECT_EQ(Json(log.line), want["line"]) << path;
    for (std::size_t i = 0; i < log.step.size(); ++i) {
      EXPECT_EQ(log.step[i], want["step"][i]) << path;
      EXPECT_TRUE(same(log.loss[i], want["loss"][i])) << path << " entry " << i;
      EXPECT_TRUE(same(log.grad_norm[i], want["grad_norm"][i])) << path << " entry " << i;
      EXPECT_TRUE(same(log.eval_loss[i], want["eval_loss"][i])) << path << " entry " << i;
      EXPECT_TRUE(same(log.aux_loss[i], want["aux_loss"][i])) << path << " entry " << i;
      EXPECT_TRUE(same(log.learning_rate[i], want["learning_rate"][i])) << path << " entry " << i;
      // A written NaN is there, an absent number is not.
      EXPECT_EQ(log.has_loss[i] != 0, !want["loss"][i].is_null()) << path;
      EXPECT_EQ(log.has_grad_norm[i] != 0, !want["grad_norm"][i].is_null()) << path;
      EXPECT_EQ(log.has_eval_loss[i] != 0, !want["eval_loss"][i].is_null()) << path;
      EXPECT_EQ(log.has_aux_loss[i] != 0, !want["aux_loss"][i].is_null()) << path;
    }
  }
}

TEST(Golden, AdapterConfig) {
  for (const auto& [path, want] : golden()["adapter"].items()) {
    Material m;
    read_adapter_config(at(path), &m);
    ASSERT_TRUE(m.problems.empty()) << path << ": " << m.problems.front().what;
    expect_equal(settings_of(m), want["settings"], path);
    expect_places(m, true, at(path));
    EXPECT_TRUE(m.adapter_seen);
    EXPECT_EQ(m.base_model, want["base"].get<std::string>());
    const VersionSet* peft = version_of(m, "peft");
    ASSERT_EQ(peft != nullptr, want["peft"].is_string()) << path;
    if (!peft) continue;
    EXPECT_TRUE(peft->exact && *peft->exact == *Version::parse(want["peft"].get<std::string>())) << path;
  }
}

TEST(Golden, Requirements) {
  for (const auto& [path, want] : golden()["requirements"].items()) {
    Material m;
    ASSERT_TRUE(read_versions(at(path), &m)) << path;
    EXPECT_TRUE(m.problems.empty()) << path << ": " << m.problems.front().what;
    EXPECT_EQ(m.versions.size(), want.size()) << path;
    for (const auto& [package, version] : want.items()) {
      std::string name = package;  // PEP 503
      for (char& c : name) c = c == '_' || c == '.' ? '-' : static_cast<char>(std::tolower(c));
      const VersionSet* set = version_of(m, name);
      ASSERT_TRUE(set && set->exact) << path << " " << package;
      EXPECT_TRUE(*set->exact == *Version::parse(version.get<std::string>())) << path << " " << package;
    }
  }
}

/// The golden file knows every fixture there is: a new one must be added with make_golden.py.
TEST(Golden, IsComplete) {
  namespace fs = std::filesystem;
  for (const auto& entry : fs::recursive_directory_iterator(test::fixture(""))) {
    const std::string path = "fixtures/" + fs::relative(entry.path(), test::fixture("")).string();
    const std::string name = entry.path().filename().string();
    const bool run = path.starts_with("fixtures/runs/");
    const std::string ending = entry.path().extension().string();
    const std::pair<const char*, const char*> kinds[] = {{"training_args.bin", "training_args"},
                                                         {"trainer_state.json", "trainer_state"},
                                                         {"adapter_config.json", "adapter"},
                                                         {"requirements.txt", "requirements"}};
    for (const auto& [file, kind] : kinds) {
      if (run && name == file) {
        EXPECT_TRUE(golden()[kind].contains(path)) << path;
      }
    }
    if (path.starts_with("fixtures/configs/") && ending.starts_with(".y") && !name.starts_with("accelerate__")) {
      EXPECT_TRUE(golden()["configs"].contains(path)) << path;
    }
  }
}

}  // namespace
}  // namespace moeaudit
