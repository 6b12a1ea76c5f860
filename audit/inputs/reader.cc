// The walk over a reader's rows, and the small conversions rows use.
#include "audit/inputs/reader.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <utility>

#include "audit/families/family.h"

namespace moeaudit {
namespace {

constexpr std::string_view kBelow = ".*";

bool is_last_of_its_name(const Node& map, std::size_t i) {
  return std::find(map.keys.begin() + static_cast<std::ptrdiff_t>(i) + 1, map.keys.end(), map.keys[i]) ==
         map.keys.end();
}

class Walk {
 public:
  Walk(const ConfigFile& file, std::span<const Row> rows, Unread unread, Material* material)
      : file_(file), rows_(rows), unread_(unread), material_(material) {}

  void map(const Node& node, const std::string& prefix) {
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      if (!is_last_of_its_name(node, i)) continue;  // the last one wins; the others are reported as duplicates
      const std::string path = prefix + node.keys[i];
      if (!take(node, i, path)) list_unread(node, i, path);
    }
  }

 private:
  bool take(const Node& map_node, std::size_t i, const std::string& path) {
    const Node& value = map_node.items[i];
    for (const Row& row : rows_) {
      const bool below = row.key.ends_with(kBelow);
      const std::string_view stem = below ? row.key.substr(0, row.key.size() - kBelow.size()) : row.key;
      if (path == stem) {
        if (!below) return state(row, row.setting, map_node, i, path);
        if (value.is_null()) return true;
        if (!value.is_map()) return false;
        everything_below(row, value, path);
        return true;
      }
    }
    const std::string inside = path + ".";
    const bool has_rows_inside =
        std::any_of(rows_.begin(), rows_.end(), [&](const Row& r) { return r.key.starts_with(inside); });
    if (!has_rows_inside) return false;
    if (value.is_null()) return true;
    if (!value.is_map()) return false;
    map(value, inside);
    return true;
  }

  void everything_below(const Row& row, const Node& node, const std::string& path) {
    const std::string_view stem = row.key.substr(0, row.key.size() - kBelow.size());
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      if (!is_last_of_its_name(node, i)) continue;
      const std::string inner = path + "." + node.keys[i];
      if (node.items[i].is_map()) {
        everything_below(row, node.items[i], inner);
        continue;
      }
      const std::string name =
          std::string(row.setting.substr(0, row.setting.size() - kBelow.size())) + inner.substr(stem.size());
      state(row, name, node, i, inner);
    }
  }

  bool state(const Row& row, std::string_view name, const Node& map_node, std::size_t i, const std::string& path) {
    const Node& value = map_node.items[i];
    if (name.empty() || (value.is_null() && !row.null_speaks)) return true;
    std::optional<Node> converted = row.convert && !value.is_null() ? row.convert(value) : std::optional<Node>(value);
    if (!converted) return false;
    material_->settings.push_back(
        {std::string(name), std::move(*converted), place_of(file_, map_node, map_node.keys[i], path)});
    return true;
  }

  void list_unread(const Node& map_node, std::size_t i, const std::string& path) {
    if (unread_ == Unread::kNone || (unread_ == Unread::kNonEmpty && !says_something(map_node.items[i]))) return;
    material_->unread_keys.push_back({file_.path, map_node.key_lines[i], path});
  }

  const ConfigFile& file_;
  std::span<const Row> rows_;
  Unread unread_;
  Material* material_;
};

}  // namespace

void read_rows(const ConfigFile& file, std::span<const Row> rows, Unread unread, Material* material) {
  if (file.root->is_map()) Walk(file, rows, unread, material).map(*file.root, "");
}

Source place_of(const ConfigFile& file, const Node& map, std::string_view key, std::string_view path) {
  Source source;
  source.role = file.role;
  source.file = file.path;
  source.key = std::string(path);
  for (std::size_t i = map.keys.size(); i-- > 0;) {
    if (map.keys[i] != key) continue;
    source.line = map.key_lines[i];
    if (map.items[i].line == source.line) source.column = map.items[i].column;
    break;
  }
  return source;
}

void add_setting(const ConfigFile& file, std::string_view key, std::string name, Node value, Material* material) {
  material->settings.push_back({std::move(name), std::move(value), place_of(file, *file.root, key, key)});
}

Node string_node(std::string_view text, const Node& place) {
  Node n;
  n.kind = Node::Kind::kString;
  n.text = std::string(text);
  n.line = place.line;
  n.column = place.column;
  return n;
}

Node bool_node(bool value, const Node& place) {
  Node n;
  n.kind = Node::Kind::kBool;
  n.boolean = value;
  n.line = place.line;
  n.column = place.column;
  return n;
}

std::optional<Node> as_number(const Node& n) {
  if (!n.is_string()) return n;
  double v = 0;
  const char* begin = n.text.data();
  const char* end = begin + n.text.size();
  const auto result = std::from_chars(begin, end, v);
  if (n.text.empty() || result.ec != std::errc{} || result.ptr != end) return n;  // words such as "auto" stay words
  Node number = n;
  number.kind = Node::Kind::kNumber;
  return number;
}

std::optional<Node> not_bool(const Node& n) {
  const auto b = n.as_bool();
  if (!b) return std::nullopt;
  return bool_node(!*b, n);
}

std::optional<Node> comma_list(const Node& n) {
  if (n.is_list()) return n;
  if (!n.is_string()) return std::nullopt;
  Node list;
  list.kind = Node::Kind::kList;
  list.line = n.line;
  list.column = n.column;
  std::size_t start = 0;
  while (start <= n.text.size()) {
    const std::size_t comma = std::min(n.text.find(',', start), n.text.size());
    std::string_view entry = std::string_view(n.text).substr(start, comma - start);
    while (!entry.empty() && entry.front() == ' ') entry.remove_prefix(1);
    while (!entry.empty() && entry.back() == ' ') entry.remove_suffix(1);
    if (!entry.empty()) list.items.push_back(string_node(entry, n));
    start = comma + 1;
  }
  return list;
}

bool says_something(const Node& n) {
  switch (n.kind) {
    case Node::Kind::kNull: return false;
    case Node::Kind::kBool: return n.boolean;
    case Node::Kind::kNumber: return n.as_double().value_or(1.0) != 0.0;
    case Node::Kind::kString: return !n.text.empty();
    case Node::Kind::kList:
    case Node::Kind::kMap: return !n.items.empty();
  }
  return true;
}

bool is_true(const Node* n) { return n && n->as_bool().value_or(false); }

void state_base_model(const ConfigFile& file, std::string_view key, Material* material) {
  const Node* value = file.root->find(key);
  if (!value || !value->is_string() || value->text.empty()) return;
  material->base_model = value->text;
  material->base_model_source = place_of(file, *file.root, key, key);
}

void state_adapter(const ConfigFile& file, std::string_view key, Material* material) {
  material->adapter_seen = true;
  material->adapter_source = place_of(file, *file.root, key, key);
}

std::vector<UnreadKey> take_back_adapter_settings(const ConfigFile& file, Material* material) {
  constexpr std::string_view kNames[] = {"r",
                                         "lora_alpha",
                                         "lora_dropout",
                                         "use_rslora",
                                         "target_modules",
                                         "target_parameters",
                                         "exclude_modules",
                                         "modules_to_save",
                                         "layers_to_transform",
                                         "rank_pattern",
                                         "alpha_pattern",
                                         "lora_target_linear"};
  std::vector<UnreadKey> keys;
  std::erase_if(material->settings, [&](const Setting& s) {
    if (s.source.file != file.path || std::find(std::begin(kNames), std::end(kNames), s.name) == std::end(kNames))
      return false;
    keys.push_back({file.path, s.source.line, s.source.key});
    return true;
  });
  return keys;
}

void state_framework(const ConfigFile& file, std::string_view framework, std::string_view trainer, std::string_view key,
                     Material* material) {
  const Source source = place_of(file, *file.root, key, key);
  material->framework = std::string(framework);
  material->framework_source = source;
  if (trainer.empty()) return;
  material->trainer = std::string(trainer);
  material->trainer_source = source;
}

const VersionSet* version_of(const Material& material, std::string_view package) {
  const VersionSet* found = nullptr;
  for (const VersionStatement& s : material.versions) {
    if (s.package == package) found = &s.versions;
  }
  return found;
}

std::string with_version(const Material& material, std::string_view package) {
  const VersionSet* versions = version_of(material, package);
  return std::string(package) + (versions ? " " + to_text(*versions) : std::string());
}

bool is_moe_key(std::string_view key) {
  constexpr std::string_view kParts[] = {"router", "expert", "moe_", "aux_loss", "z_loss", "load_balanc"};
  return std::any_of(std::begin(kParts), std::end(kParts),
                     [&](std::string_view part) { return key.find(part) != std::string_view::npos; });
}

bool family_reads(const Family& family, std::string_view key) {
  if (key.empty()) return false;
  for (const MoeLayerRule& rule : {family.moe_layer_rule, family.decoder_layer_rule}) {
    for (std::string_view read : {rule.from.key, rule.to.key, rule.every.key, rule.offset.key, rule.dense, rule.only}) {
      if (read == key) return true;
    }
    for (const FamilyCondition& types : rule.types) {
      if (types.key == key) return true;
    }
  }
  for (std::string_view read : {family.groups_if.key, family.moe_if.key, family.table_layers.key, family.logit_softcap.key,
                                family.renormalise_floor.key, family.mixer_jitter.key, family.renormalise_norm.key}) {
    if (read == key) return true;
  }
  for (const FamilyCondition& holds : family.routing_if) {
    if (key == holds.key) return true;
  }
  return std::any_of(family.keys.begin(), family.keys.end(), [&](const FamilyKey& row) {
    return std::any_of(row.keys.begin(), row.keys.end(), [&](std::string_view read) {
      return read == key || read == std::string(key) + ".0";  // the first of a list
    });
  });
}

bool is_model_config_key(std::string_view key) {
  for (int i = 0; i < kNumFamilies; ++i) {
    if (family_reads(kFamilies[i], key)) return true;
  }
  return false;
}

ForeignKey foreign_moe_key(std::string_view key) {
  // Megatron-LM, JetMoE, LLaMA-Factory, DeepSeek's remote code and OLMo name them so; no causal-LM class of the
  // families in audit/families does. A family that does read one of them lists it among its keys, and is asked first.
  constexpr std::string_view kBalance[] = {
      "aux_loss_coef",         "moe_aux_loss_coef",        "moe_aux_loss_coeff",
      "router_aux_loss_coeff", "load_balancing_loss_coef", "load_balance_loss_coef",
      "aux_loss_weight",       "moe_loss_weight"};
  constexpr std::string_view kZ[] = {"router_z_loss_coef", "router_z_loss_coeff", "z_loss_coef",
                                     "z_loss_coeff",       "moe_z_loss_coeff",    "moe_zloss_weight"};
  if (std::find(std::begin(kBalance), std::end(kBalance), key) != std::end(kBalance)) return ForeignKey::kBalanceLoss;
  if (std::find(std::begin(kZ), std::end(kZ), key) != std::end(kZ)) return ForeignKey::kZLoss;
  return ForeignKey::kNo;
}

std::string model_type_of(const Material& material) {
  if (material.configs.empty()) return {};
  const ModelConfig& config = material.configs.back();
  const Node* type = (config.text ? *config.text : config.root).find("model_type");
  return type && type->is_string() ? type->text : std::string();
}

std::optional<LayerWords> layer_words(const MoeLayerRule& rule, const std::function<const Node*(std::string_view)>& value_of) {
  for (const FamilyCondition& listed : rule.types) {
    const Node* found = value_of(listed.key);
    LayerWords out{listed.key, listed.value, {}};
    if (found && found->is_list()) {
      for (const Node& item : found->items) out.words.push_back(item.text);
    } else if (found && found->is_string() && listed.value.size() == 1) {
      for (const char letter : found->text) out.words.emplace_back(1, letter);
    } else {
      continue;
    }
    return out;
  }
  return std::nullopt;
}

/// Does the class of the family build experts for this config?
bool builds_experts(const Family& family, const Node& text) {
  if (!family.moe_if.key.empty()) {
    const Node* says = text.find(family.moe_if.key);
    const auto yes = says ? says->as_bool() : std::nullopt;
    if (!yes || (*yes ? "true" : "false") != family.moe_if.value) return false;
  }
  const auto layers = layer_words(family.moe_layer_rule, [&](std::string_view key) { return text.find(key); });
  return !layers || std::find(layers->words.begin(), layers->words.end(), layers->moe) != layers->words.end();
}

/// A causal language model that comes with its own code, under a model_type that it shares with another class: Ling 2.5 has that of
/// Ling 3 (bailing_hybrid). Hub files spell some classes otherwise than transformers does (PhiMoEForCausalLM).
bool is_of_another_class(const ModelConfig& config, const Family& family) {
  const Node* classes = config.root.find("architectures");
  if (!config.root.find_path("auto_map.AutoModelForCausalLM") || !classes || !classes->is_list() || classes->items.empty()) return false;
  const std::string& name = classes->items[0].text;
  const auto same = [&](std::string_view own) {
    return std::equal(own.begin(), own.end(), name.begin(), name.end(), [](unsigned char a, unsigned char b) { return std::tolower(a) == std::tolower(b); });
  };
  return name.ends_with("ForCausalLM") && std::none_of(family.classes.begin(), family.classes.end(), same);
}

const Family* described_by(const ModelConfig& config) {
  const Node* type = config.root.find("model_type");
  const Family* family = type && type->is_string() ? find_family_by_model_type(type->text) : nullptr;
  if (!family && config.text) {
    type = config.text->find("model_type");
    family = type && type->is_string() ? find_family_by_model_type(type->text) : nullptr;
  }
  return family && is_of_another_class(config, *family) ? nullptr : family;
}

const Family* family_of(const ModelConfig& config) {
  const Family* family = described_by(config);
  return family && builds_experts(*family, config.text ? *config.text : config.root) ? family : nullptr;
}

const Family* family_of(const Material& material) {
  if (!material.configs.empty()) return family_of(material.configs.back());
  const HubModel* hub = material.base_model.empty() ? nullptr : find_hub_model(material.base_model);
  return hub ? find_family(hub->family) : nullptr;
}

const ConfigReader* find_config_reader(const Node& root) {
  if (!root.is_map()) return nullptr;
  const ConfigReader* generic = nullptr;
  for (int i = 0; i < kNumConfigReaders; ++i) {
    const Match match = kConfigReaders[i]->recognises(root);
    if (match == Match::kSure) return kConfigReaders[i];
    if (match == Match::kGeneric && !generic) generic = kConfigReaders[i];
  }
  return generic;
}

std::string flow_style(const Node& n) {
  constexpr std::string_view kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./-+";
  std::string out;
  switch (n.kind) {
    case Node::Kind::kNull: return "null";
    case Node::Kind::kBool: return n.boolean ? "true" : "false";
    case Node::Kind::kNumber: return n.text;
    case Node::Kind::kString:
      if (!n.text.empty() && n.text.find_first_not_of(kPlain) == std::string::npos) return n.text;
      for (char c : n.text) out += c == '\'' ? "''" : std::string(1, c);
      return "'" + out + "'";
    case Node::Kind::kList:
    case Node::Kind::kMap: break;
  }
  for (std::size_t i = 0; i < n.items.size(); ++i) {
    out += (i ? ", " : "") + (n.is_map() ? n.keys[i] + ": " : std::string()) + flow_style(n.items[i]);
  }
  return n.is_map() ? "{" + out + "}" : "[" + out + "]";
}

}  // namespace moeaudit
