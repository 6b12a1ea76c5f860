// ms-swift: args.json, which it writes into the output folder with every argument resolved, and YAML with the same names
// (modelscope/ms-swift @v4.4.3 swift/arguments/*.py; @v3.9.0 swift/llm/argument/*.py, where tuner_type was train_type).
#include <algorithm>
#include <cctype>
#include <vector>

#include "audit/behaviours/behaviour.h"
#include "audit/families/family.h"
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

constexpr Row kOwnRows[] = {
    {"swift_version", ""},
    {"model", ""},
    {"model_revision", "base_model_revision"},
    {"tuner_type", ""},
    {"train_type", ""},
    {"target_modules", ""},
    {"target_regex", ""},
    {"target_parameters", "target_parameters"},
    {"modules_to_save", "modules_to_save"},
    {"lora_rank", "r", as_number},
    {"lora_alpha", "lora_alpha", as_number},
    {"lora_dropout", "lora_dropout", as_number},
    {"use_rslora", "use_rslora"},
    {"torch_dtype", "torch_dtype"},
    {"max_length", "max_length", as_number},
    {"quant_method", ""},
    {"quant_bits", ""},
    {"bnb_4bit_quant_type", "bnb_4bit_quant_type"},
    {"rlhf_type", ""},
    {"loss_type", "loss_type"},
    {"router_aux_loss_coef", ""},  // after_model
    {"deepspeed", "deepspeed"},
};

constexpr std::string_view kMegatronKeys[] = {"tensor_model_parallel_size", "moe_aux_loss_coeff", "expert_model_parallel_size"};

Match recognises(const Node& root) {
  if (root.find("swift_version")) return Match::kSure;
  const bool tuner = root.find("tuner_type") || root.find("train_type");
  return tuner && (root.find("model") || root.find("model_type")) ? Match::kSure : Match::kNo;
}

bool on_megatron(const Node& root) {
  return std::any_of(std::begin(kMegatronKeys), std::end(kMegatronKeys), [&](std::string_view k) { return root.find(k); });
}

/// "Seq2SeqTrainer" for sft and pt; trainers/trainer_factory.py has the rest under rlhf_type.
std::string trainer_of(const Node& root, std::string_view* key) {
  *key = root.find("tuner_type") ? "tuner_type" : root.find("train_type") ? "train_type" : "swift_version";
  for (std::string_view megatron : kMegatronKeys) {
    if (!root.find(megatron)) continue;
    *key = megatron;
    return "Megatron";
  }
  const Node* rlhf = root.find("rlhf_type");
  if (!rlhf || !rlhf->is_string() || rlhf->text.empty()) return "Seq2SeqTrainer";
  *key = "rlhf_type";
  std::string name = rlhf->text;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return name + "Trainer";
}

void read_adapter(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::string_view key = root.find("tuner_type") ? "tuner_type" : "train_type";
  const Node* type = root.find(key);
  const bool lora = !type || type->is_null() || (type->is_string() && (type->text == "lora" || type->text == "adalora"));
  if (type && type->is_string() && type->text == "full") {  // in args.json they hold their defaults
    const std::vector<UnreadKey> unused = take_back_adapter_settings(file, material);
    const bool program = root.find("swift_version");
    if (!program) material->unread_keys.insert(material->unread_keys.end(), unused.begin(), unused.end());
    return;
  }
  const std::string_view place = type ? key : "swift_version";
  if (!root.find(place)) return;
  add_setting(file, place, "peft_type", string_node(lora ? "LORA" : type->is_string() ? type->text : "unknown", *root.find(place)),
              material);
  state_adapter(file, place, material);
  const Node* regex = root.find("target_regex");
  const Node* targets = root.find("target_modules");
  if (regex && regex->is_string() && !regex->text.empty()) {
    add_setting(file, "target_regex", "target_modules", *regex, material);
    return;
  }
  const auto list = targets && !targets->is_null() ? comma_list(*targets) : std::nullopt;
  const bool all = !list || std::any_of(list->items.begin(), list->items.end(), [](const Node& n) {
    return n.is_string() && n.text == "all-linear";
  });
  if (!all) {
    add_setting(file, "target_modules", "target_modules", *list, material);
  } else if (!list || list->items.size() == 1) {
    // find_all_linears(): the names of every class with "linear" in its name but the head, listed.
    const std::string_view from = targets ? "target_modules" : place;
    add_setting(file, from, "lora_target_linear", bool_node(true, *root.find(from)), material);
    material->settings.back().source.key = "target_modules.all-linear";
  } else {
    material->unread_keys.push_back({file.path, targets->line, "target_modules"});
  }
}

void read_quantisation(const ConfigFile& file, Material* material) {
  const Node* method = file.root->find("quant_method");
  const Node* bits = file.root->find("quant_bits");
  const auto n = bits ? as_number(*bits)->as_int() : std::nullopt;
  if (!method || !method->is_string()) return;
  if (method->text == "bnb") {
    if (n == 4) add_setting(file, "quant_bits", "load_in_4bit", bool_node(true, *bits), material);
    if (n == 8) add_setting(file, "quant_bits", "load_in_8bit", bool_node(true, *bits), material);
    if (n == 4 && !file.root->find("bnb_4bit_quant_type"))
      add_setting(file, "quant_bits", "bnb_4bit_quant_type", string_node("nf4", *bits), material);
    return;
  }
  add_setting(file, "quant_method", "quant_method", *method, material);
  if (n) add_setting(file, "quant_bits", "quant_bits", *as_number(*bits), material);
}

/// "zero3" is a file of its own package: only the stage matters here.
void read_preset(const ConfigFile& file, Material* material) {
  const Node* named = file.root->find("deepspeed");
  if (!named || !named->is_string() || !named->text.starts_with("zero") || named->text.size() < 5) return;
  const char stage = named->text[4];
  const std::string_view rest = std::string_view(named->text).substr(5);
  if (stage < '0' || stage > '3' || !(rest.empty() || rest == "_offload")) return;
  std::erase_if(material->settings,
                [&](const Setting& s) { return s.name == "deepspeed" && s.source.file == file.path; });
  Node number = *named;
  number.kind = Node::Kind::kNumber;
  number.text = std::string(1, stage);
  add_setting(file, "deepspeed", "deepspeed", bool_node(true, *named), material);
  add_setting(file, "deepspeed", "deepspeed.zero_optimization.stage", std::move(number), material);
}

void read(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::span<const Row> shared = training_arguments_rows();
  std::vector<Row> rows;
  for (const Row& row : shared) {
    if (row.key != "deepspeed") rows.push_back(row);
  }
  rows.insert(rows.end(), std::begin(kOwnRows), std::end(kOwnRows));
  const Node* version = root.find("swift_version");
  read_rows(file, rows, version ? Unread::kNonEmpty : Unread::kAll, material);
  if (version && version->is_string()) {
    if (auto set = VersionSet::parse(version->text)) {  // what the user says on the command line comes after, and wins
      material->versions.insert(material->versions.begin(),
                                {"ms-swift", std::move(*set), place_of(file, root, "swift_version", "swift_version")});
    }
  }
  state_base_model(file, "model", material);
  std::string_view key;
  const std::string trainer = trainer_of(root, &key);
  state_framework(file, "ms-swift", trainer, key, material);
  if (on_megatron(root)) return;
  read_adapter(file, material);
  read_quantisation(file, material);
  read_preset(file, material);
}

/// What it does to a model with experts before the first step.
void touch_model(const ConfigFile& file, Material* material) {
  if (!family_of(*material) || on_megatron(*file.root)) return;
  const VersionSet* versions = version_of(*material, "ms-swift");
  auto state = [&](std::string name, Node value, const BehaviourAnswer& answer) {
    Source source;
    source.role = Role::kBehaviourTable;
    source.cite = answer.cite;
    material->settings.push_back({std::move(name), std::move(value), std::move(source)});
  };
  const Node& root = *file.root;
  const Node* written = root.find("router_aux_loss_coef");
  const Source place = place_of(file, root, "router_aux_loss_coef", "router_aux_loss_coef");
  const BehaviourAnswer overwrites = ask({"ms-swift", "overwrites_aux", {}}, versions);
  if (overwrites.value == "true") {
    const auto number = written && !written->is_null() ? as_number(*written) : std::nullopt;
    const auto value = number ? number->as_double() : std::optional<double>(0.0);
    if (!value) {
      material->unread_keys.push_back({file.path, place.line, place.key});
    } else if (number) {
      add_setting(file, place.key, "model_config.output_router_logits", bool_node(*value > 0, *written), material);
      add_setting(file, place.key, "model_config.router_aux_loss_coef", *number, material);
    } else {
      Node zero = bool_node(false, root);
      state("model_config.output_router_logits", zero, overwrites);
      zero.kind = Node::Kind::kNumber;
      zero.text = "0";
      state("model_config.router_aux_loss_coef", std::move(zero), overwrites);
    }
  } else if (written && says_something(*written)) {
    material->unread_keys.push_back({file.path, place.line, place.key});
  }
  const Node* method = root.find("quant_method");
  if (!method || !method->is_string() || method->text != "bnb") return;
  const BehaviourAnswer skips = ask({"ms-swift", "bnb_skip_modules", {}}, versions);
  if (skips.value && *skips.value != "none")
    state("llm_int8_skip_modules", *comma_list(string_node(*skips.value, *method)), skips);
}

}  // namespace

extern const ConfigReader config_reader_ms_swift_config;
const ConfigReader config_reader_ms_swift_config{"ms-swift", "ms-swift config", recognises, read, "", touch_model};

}  // namespace moeaudit
