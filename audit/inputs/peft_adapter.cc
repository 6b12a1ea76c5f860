// adapter_config.json as PEFT writes it (huggingface/peft src/peft/tuners/lora/config.py, src/peft/config.py). Every
// field of the config class is in it, so only unread keys that say something are listed.
#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

constexpr Row kRows[] = {
    {"peft_type", "peft_type"},
    {"r", "r"},
    {"lora_alpha", "lora_alpha"},
    {"lora_dropout", "lora_dropout"},
    {"use_rslora", "use_rslora"},
    {"target_modules", "target_modules"},
    {"target_parameters", "target_parameters"},
    {"exclude_modules", "exclude_modules"},
    {"modules_to_save", "modules_to_save"},
    {"layers_to_transform", "layers_to_transform"},
    {"rank_pattern", "rank_pattern"},
    {"alpha_pattern", "alpha_pattern"},
    {"use_dora", "use_dora"},
    {"init_lora_weights", "init_lora_weights"},
    {"base_model_name_or_path", ""},
    {"revision", "base_model_revision"},
    {"peft_version", ""},
};

}  // namespace

void read_adapter_of_trace(const std::string& path, const Node& adapter, Material* material) {
  const ConfigFile file{path, Role::kTrace, &adapter};
  read_rows(file, kRows, Unread::kNonEmpty, material);
  state_adapter(file, "peft_type", material);
}

void read_adapter_config(const std::string& path, Material* material) {
  Node root;
  if (!read_tree(path, &root, material)) return;
  const ConfigFile file{path, Role::kAdapterConfig, &root};
  if (!root.is_map() || !root.find("peft_type")) {
    material->problems.push_back({path, root.line, root.column,
                                  "no \"peft_type\": this is no adapter_config.json of PEFT",
                                  "give the adapter folder that save_pretrained() of a PEFT model wrote"});
    return;
  }
  read_rows(file, kRows, Unread::kNonEmpty, material);
  state_base_model(file, "base_model_name_or_path", material);
  state_adapter(file, "peft_type", material);
  const Node* version = root.find("peft_version");  // since PEFT 0.18; a development build appends "@commit"
  if (!version || !version->is_string()) return;
  if (auto set = VersionSet::parse(version->text.substr(0, version->text.find('@')))) {
    material->versions.push_back({"peft", std::move(*set), place_of(file, root, "peft_version", "peft_version")});
  }
}

}  // namespace moeaudit
