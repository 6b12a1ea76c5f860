// config.json of a model: kept whole (audit/families says which keys mean what), with its quantisation as statements.
#include <algorithm>
#include <optional>

#include "audit/families/family.h"
#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

constexpr Row kQuantisationRows[] = {
    {"quantization_config.quant_method", "quant_method"},
    {"quantization_config.load_in_4bit", "load_in_4bit"},
    {"quantization_config.load_in_8bit", "load_in_8bit"},
    {"quantization_config.bnb_4bit_quant_type", "bnb_4bit_quant_type"},
    {"quantization_config.llm_int8_skip_modules", "llm_int8_skip_modules"},
    {"quantization_config.modules_to_not_convert", "llm_int8_skip_modules"},  // the same list for mxfp4, awq, fp8
    {"quantization_config.ignore", "llm_int8_skip_modules"},                  // and for compressed-tensors
    {"quantization_config.bits", "quant_bits", as_number},
    {"quantization_config.config_groups", ""},
    // How the values are stored, and what a kernel needs: nothing of it says which modules are rounded.
    {"quantization_config._load_in_4bit", ""},
    {"quantization_config._load_in_8bit", ""},
    {"quantization_config.activation_scheme", ""},
    {"quantization_config.backend", ""},
    {"quantization_config.bnb_4bit_compute_dtype", ""},
    {"quantization_config.bnb_4bit_quant_storage", ""},
    {"quantization_config.bnb_4bit_use_double_quant", ""},
    {"quantization_config.checkpoint_format", ""},
    {"quantization_config.desc_act", ""},
    {"quantization_config.format", ""},
    {"quantization_config.group_size", ""},
    {"quantization_config.llm_int8_threshold", ""},
    {"quantization_config.quantization_status", ""},
    {"quantization_config.sym", ""},
    {"quantization_config.version", ""},
    {"quantization_config.weight_block_size", ""},
    {"quantization_config.zero_point", ""},
};

/// compressed-tensors: bits of the weights, if all groups have the same, and targets other than every Linear.
void state_groups(const ConfigFile& file, const Node& quantisation, Material* material) {
  const Node* groups = quantisation.find("config_groups");
  if (!groups || !groups->is_map()) return;
  std::optional<std::int64_t> bits;
  const Node* place = nullptr;
  bool same = true, linear = true;
  for (const Node& group : groups->items) {
    if (!group.is_map()) continue;
    const Node* n = group.find_path("weights.num_bits");
    const auto value = n ? n->as_int() : std::nullopt;
    same = same && value && (!bits || bits == value);
    bits = value;
    place = n;
    const Node* targets = group.find("targets");
    linear = linear && targets && targets->is_list() && targets->items.size() == 1 && targets->items[0].is_string() &&
             targets->items[0].text == "Linear";
  }
  auto state = [&](std::string name, Node value) {
    Source source = place_of(file, quantisation, "config_groups", "quantization_config.config_groups");
    if (value.line > 0) source.line = value.line;
    material->settings.push_back({std::move(name), std::move(value), std::move(source)});
  };
  if (same && bits && place) state("quant_bits", *place);
  if (!linear) state("quant_targets_other", bool_node(true, *groups));
}

// Where multimodal configs keep their language model.
constexpr std::string_view kNested[] = {"text_config", "llm_config", "language_config", "thinker_config.text_config"};

const Node* find_text(const Node& root, std::string* path) {
  for (std::string_view key : kNested) {
    const Node* nested = root.find_path(key);
    if (!nested || !nested->is_map() || nested->items.empty()) continue;
    *path = std::string(key);
    return nested;
  }
  return nullptr;
}

void state_quantisation(const ConfigFile& file, Material* material) {
  const Node* quantisation = file.root->find("quantization_config");
  if (!quantisation || !quantisation->is_map()) return;
  // A file of its own for the walk: other keys of config.json are the families' business.
  Node only = *file.root;
  only.keys = {"quantization_config"};
  only.key_lines = {quantisation->line};
  only.items = {*quantisation};
  read_rows({file.path, file.role, &only}, kQuantisationRows, Unread::kNonEmpty, material);
  state_groups(file, *quantisation, material);
}

bool same_scalar(const Node& a, const Node& b) {
  return a.kind == b.kind && a.text == b.text && a.boolean == b.boolean && a.items.empty() && b.items.empty();
}

/// A MoE key beside the nested config of the language model: transformers keeps it as an attribute of the outer config,
/// and the layers and the loss read the nested one (self.config.text_config.router_aux_loss_coef in
/// models/qwen3_vl_moe/modeling_qwen3_vl_moe.py@v5.23.0 and its relatives). Equal values are no conflict.
void check_outer_keys(const ModelConfig& config, const Family& family, Material* material) {
  for (std::size_t i = 0; i < config.root.keys.size(); ++i) {
    const std::string& key = config.root.keys[i];
    const Node& value = config.root.items[i];
    if (!is_moe_key(key) || !family_reads(family, key) || !says_something(value)) continue;
    const Node* inner = config.text->find(key);
    if (inner && same_scalar(*inner, value)) continue;
    const std::string written = value.is_string() ? "\"" + value.text + "\"" : value.kind == Node::Kind::kBool ? "true" : value.text;
    material->ignored_keys.push_back(
        {config.file, config.root.key_lines[i], key, with_version(*material, "transformers"), true,
         "\"" + config.text_path + "\": {\"" + key + "\": " + written + "}",
         "the language model reads " + config.text_path + "." + key + ", which " +
             (inner ? "is " + (inner->kind == Node::Kind::kBool ? std::string(inner->boolean ? "true" : "false") : inner->text)
                    : "is not stated")});
  }
}

void check_model_config(const ModelConfig& config, Material* material) {
  const Node& text = config.text ? *config.text : config.root;
  const Family* family = family_of(config);
  if (!family) return;
  if (config.text) check_outer_keys(config, *family, material);
  for (std::size_t i = 0; i < text.keys.size(); ++i) {
    const std::string& key = text.keys[i];
    const ForeignKey kind = foreign_moe_key(key);
    const double value = text.items[i].as_double().value_or(0.0);
    if (family_reads(*family, key)) continue;
    const std::string path = config.text_path.empty() ? key : config.text_path + "." + key;
    if (kind == ForeignKey::kNo || value == 0.0) {
      if (is_moe_key(key) && says_something(text.items[i])) {
        material->unread_keys.push_back({config.file, text.key_lines[i], path});
      }
      continue;
    }
    IgnoredKey ignored;
    ignored.file = config.file;
    ignored.line = text.key_lines[i];
    ignored.key = path;
    ignored.framework = with_version(*material, "transformers");
    ignored.about_moe = true;
    ignored.why = "no config class of " + std::string(family->name) +
                  " has this key: transformers keeps it, and the model never reads it";
    if (kind == ForeignKey::kBalanceLoss && family_reads(*family, "router_aux_loss_coef")) {
      ignored.instead = "\"router_aux_loss_coef\": " + text.items[i].text;
    }
    material->ignored_keys.push_back(std::move(ignored));
  }
}

}  // namespace

void read_model_config(const std::string& path, Role role, bool states_version, Material* material) {
  Node root;
  if (!read_tree(path, &root, material)) return;
  const Node* version = root.is_map() ? root.find("transformers_version") : nullptr;
  const std::size_t before = material->configs.size();
  std::optional<VersionStatement> statement;
  if (states_version && version && version->is_string()) {
    if (auto set = VersionSet::parse(version->text)) {
      statement = {"transformers", std::move(*set), place_of({path, role, &root}, root, "transformers_version", "transformers_version")};
    }
  }
  read_model_config(path, std::move(root), role, material);
  if (statement && material->configs.size() > before) material->versions.push_back(std::move(*statement));
}

void read_model_config(const std::string& path, Node root_node, Role role, Material* material) {
  ModelConfig config;
  config.root = std::move(root_node);
  config.file = path;
  config.role = role;
  const Node& root = config.root;
  if (!root.is_map() || !(root.find("model_type") || root.find("architectures"))) {
    material->problems.push_back(
        {path, root.line, root.column,
         "neither \"model_type\" nor \"architectures\": this is no config.json of a transformers model",
         "give the folder that save_pretrained() wrote, or the config.json of the model on the hub"});
    return;
  }
  const ConfigFile file{path, role, &root};
  state_quantisation(file, material);
  config.text = find_text(root, &config.text_path);
  material->configs.push_back(std::move(config));  // `text` points into the heap of root.items, which a move keeps
}

void check_model_configs(Material* material) {
  for (const ModelConfig& config : material->configs) check_model_config(config, material);
}

}  // namespace moeaudit
