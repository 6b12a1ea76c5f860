// The model: family, numbers of its config.json as the config class would read them, MoE layers.
#include <algorithm>
#include <charconv>
#include <sstream>
#include <type_traits>

#include "audit/inputs/reader.h"
#include "audit/inputs/resolve_parts.h"
#include "audit/tensors/recognise.h"

namespace moeaudit {
namespace {

/// A number, or a list of one number a layer that are all the same (hunyuan_v1_moe: moe_topk).
std::optional<std::int64_t> one_number(const Node& n) {
  if (!n.is_list() || n.items.empty()) return node_int(n);
  const auto first = node_int(n.items[0]);
  const bool same = std::all_of(n.items.begin(), n.items.end(), [&](const Node& i) { return node_int(i) == first; });
  return same ? first : std::nullopt;
}

template <class T>
std::optional<T> convert(const Node& n) {
  if constexpr (std::is_same_v<T, bool>) return node_bool(n);
  else if constexpr (std::is_same_v<T, std::int64_t>) return one_number(n);
  else if constexpr (std::is_same_v<T, double>) return node_double(n);
  else if constexpr (std::is_same_v<T, std::string>) return node_string(n);
  else if constexpr (std::is_same_v<T, DType>) return n.is_string() ? dtype_from_text(n.text) : std::nullopt;
  else return std::nullopt;
}

/// Sets the fact called `name`; false if there is none or the value does not fit its type.
bool set_by_name(FactSheet& facts, std::string_view name, const Node& value, Origin origin, const Source& source,
                 bool only_if_unknown) {
  bool done = false;
  facts.visit([&](auto& fact) {
    using T = std::decay_t<decltype(fact.value())>;
    if (done || fact.info().name != name) return;
    if (std::optional<T> v = convert<T>(value)) {
      only_if_unknown ? fact.set_if_unknown(std::move(*v), origin, source) : fact.set(std::move(*v), origin, source);
      done = true;
    }
  });
  return done;
}

Node text_node(std::string_view text) {
  Node n;
  n.kind = Node::Kind::kString;
  n.text = std::string(text);
  return n;
}

/// The value at "key", or one level down at "outer.key" or, of a list, "key.0".
const Node* find_key(const Node& text, std::string_view key) {
  const std::size_t dot = key.find('.');
  if (dot == std::string_view::npos) return text.find(key);
  const Node* outer = text.find(key.substr(0, dot));
  if (!outer || !outer->is_list()) return outer ? outer->find(key.substr(dot + 1)) : nullptr;
  const auto item = node_int(text_node(key.substr(dot + 1)));
  return item && *item >= 0 && *item < static_cast<std::int64_t>(outer->items.size()) ? &outer->items[static_cast<std::size_t>(*item)] : nullptr;
}

Source place(const ModelConfig& config, const Node& value, std::string_view key) {
  Source s;
  s.role = config.role;
  s.file = config.file;
  s.line = value.line;
  s.column = value.column;
  s.key = config.text_path.empty() ? std::string(key) : config.text_path + "." + std::string(key);
  return s;
}

void apply_config(Resolver& r, const ModelConfig& config) {
  const Node& text = config.text ? *config.text : config.root;
  if (const Node* v = text.find("model_type"); v && v->is_string()) {
    r.facts.model_type.set(v->text, Origin::kStated, place(config, *v, "model_type"));
  }
  if (const Node* v = config.root.find("architectures"); v && v->is_list() && !v->items.empty() && v->items[0].is_string()) {
    Source s = place(config, *v, "architectures");
    s.key = "architectures";
    r.facts.model_class.set(v->items[0].text, Origin::kStated, std::move(s));
  }
  for (std::string_view key : {"dtype", "torch_dtype"}) {
    const Node* v = text.find(key);
    if (!v) v = config.root.find(key);
    if (!v || !v->is_string()) continue;
    if (auto dtype = dtype_from_text(v->text)) {
      r.facts.weights_dtype.set(*dtype, Origin::kStated, place(config, *v, key));
      break;
    }
  }
  if (!r.family) return;
  for (const FamilyKey& row : r.family->keys) {
    for (std::string_view key : row.keys) {
      const Node* v = find_key(text, key);
      if (!v || v->is_null()) continue;
      set_by_name(r.facts, row.fact, *v, Origin::kStated, place(config, *v, key), false);
      break;  // the first spelling that is there is the one the class reads
    }
  }
}

/// Overrides that a training config makes on the model's config before loading (Axolotl model_config:).
void apply_overrides(Resolver& r) {
  if (!r.family) return;
  // Axolotl sets overrides on the outer config (loaders/utils.py@v0.18.0:203), which a nested language model does not
  // read: axolotl_config.cc lists them as ignored.
  if (r.material.framework == "axolotl" && !r.material.configs.empty() && r.material.configs.back().text) return;
  for (const Setting& s : r.material.settings) {
    constexpr std::string_view kPrefix = "model_config.";
    if (s.name.rfind(kPrefix, 0) != 0) continue;
    const std::string_view key = std::string_view(s.name).substr(kPrefix.size());
    for (const FamilyKey& row : r.family->keys) {
      if (std::find(row.keys.begin(), row.keys.end(), key) == row.keys.end()) continue;
      set_by_name(r.facts, row.fact, s.value, Resolver::origin_of(s.source), s.source, false);
    }
  }
}

/// The last config that has `key` decides; nullptr: none has it.
const Node* config_value(const Resolver& r, std::string_view key) {
  const Node* found = nullptr;
  for (const ModelConfig& c : r.material.configs) {
    if (const Node* v = key.empty() ? nullptr : find_key(c.text ? *c.text : c.root, key)) found = v;
  }
  return found;
}

bool has_value(const Node* node, std::string_view value) {
  const Node wanted = text_node(value);
  const auto yes = node_bool(*node), wanted_yes = node_bool(wanted);
  if (yes && wanted_yes) return *yes == *wanted_yes;
  const auto have = node_double(*node), want = node_double(wanted);
  return have && want ? *have == *want : node->is_string() && node->text == value;
}

void resolve_routing(Resolver& r, const Source& source) {
  FactSheet& f = r.facts;
  const Family& family = *r.family;
  Routing routing = family.routing;
  const FamilyCondition& grouped = family.groups_if;
  if (!family.not_replayed.empty()) {
    f.routing.explain_unknown(std::string(family.not_replayed));
    return;
  }
  for (const FamilyCondition& holds : family.routing_if) {
    const Node* condition = config_value(r, holds.key);
    if (!condition || has_value(condition, holds.value)) continue;
    f.routing.explain_unknown("the order is known for " + std::string(holds.key) + " " + std::string(holds.value) +
                              " only, and the configuration says something else");
    return;
  }
  const auto by_version = [&](bool asked, std::string_view topic, DType* dtype) {
    if (!asked) return true;
    const BehaviourAnswer answer = r.ask_about("transformers", topic);
    if (!answer.value) f.routing.explain_unknown(answer.why);
    else *dtype = dtype_from_text(*answer.value).value_or(DType::kUnknown);
    return answer.value.has_value();
  };
  if (!by_version(family.logits_dtype_by_version, "router_logits_dtype", &routing.logits_dtype) ||
      !by_version(family.scores_dtype_by_version, "router_scores_dtype", &routing.scores_dtype)) {
    return;
  }
  if (f.num_groups.known()) routing.groups = std::max<std::int64_t>(1, f.num_groups.value());
  if (f.top_groups.known()) routing.top_groups = std::max<std::int64_t>(1, f.top_groups.value());
  if (!grouped.key.empty()) {
    const Node* says = config_value(r, grouped.key);
    if (!says || !has_value(says, grouped.value)) routing.groups = routing.top_groups = 1;
  }
  if (routing.groups <= 1) routing.group_score = GroupScore::kNone;
  if (const VersionSet* v = r.versions("transformers"); v && routing.groups > 1 && !routing.group_mask_is_zero) {
    // Masked groups got 0.0 before 5.6 (transformers commit cb0adddc3682, pull request 45441), -inf since.
    VersionWindow before;
    before.until = Version::parse("5.6.0");
    routing.group_mask_is_zero = v->inside(before);
  }
  const auto number = [&](const ConfigNumber& n) {
    const Node* says = config_value(r, n.key);
    return (says ? node_double(*says) : std::nullopt).value_or(n.fallback);
  };
  routing.logit_softcap = number(family.logit_softcap);
  routing.renormalise_floor = number(family.renormalise_floor);
  routing.mixer_jitter = number(family.mixer_jitter);
  if (const Node* p = config_value(r, family.renormalise_norm.key); p && !p->is_null()) {
    routing.renormalise_norm = node_double(*p).value_or(0.0);
    if (!(routing.renormalise_norm > 0)) {
      f.routing.explain_unknown(std::string(family.renormalise_norm.key) + " is " + flow_style(*p) + ": of no p-norm is the order known");
      return;
    }
  }
  if (f.renormalised.known()) routing.renormalise = f.renormalised.value();
  routing.scaling = weight_scaling(family, f.routed_scaling.known() ? f.routed_scaling.value() : routing.scaling,
                                   f.top_k.known() ? f.top_k.value() : 0);
  f.routing.set(std::move(routing), Origin::kFamily, source);
}

template <class T>
constexpr std::string_view wanted_kind() {
  if constexpr (std::is_same_v<T, bool>) return "neither true nor false";
  else if constexpr (std::is_same_v<T, std::int64_t>) return "no whole number";
  else if constexpr (std::is_same_v<T, double>) return "no number";
  else return "not what this key holds";
}

/// The config has the key, and its value is of another kind; or a list of one number a layer that are not all the same. No
/// default stands for it.
bool explain_unreadable(Resolver& r, const FamilyKey& row) {
  bool explained = false;
  for (const ModelConfig& c : r.material.configs) {
    for (std::string_view key : row.keys) {
      const Node* v = find_key(c.text ? *c.text : c.root, key);
      if (!v || v->is_null()) continue;
      r.facts.visit([&](auto& fact) {
        using T = std::decay_t<decltype(fact.value())>;
        if (fact.info().name != row.fact || fact.known() || convert<T>(*v)) return;
        fact.explain_unknown(v->is_list() ? std::string(key) + " in " + c.file + " differs from layer to layer"
                                          : std::string(key) + " is " + flow_style(*v) + " (" + c.file + ":" + std::to_string(v->line) +
                                                "), which is " + std::string(wanted_kind<T>()));
        explained = true;
      });
    }
  }
  return explained;
}

void apply_family(Resolver& r) {
  Source source;
  source.role = Role::kFamilyTable;
  source.cite = r.family->cites.empty() ? std::string() : std::string(r.family->cites[0]);
  FactSheet& f = r.facts;
  f.family.set(std::string(r.family->name), Origin::kFamily, source);
  for (const FamilyKey& row : r.family->keys) {
    if (row.default_value.empty() || explain_unreadable(r, row)) continue;
    Source s = source;
    s.cite = std::string(row.cite);
    s.key = row.keys.empty() ? std::string() : std::string(row.keys[0]);
    std::string value(row.default_value);
    if (row.fact == "balance.aux_coefficient" && !row.keys.empty()) {
      // Some classes changed this default between releases (gpt_oss: 0.9, then 0.001).
      const BehaviourAnswer by_version = r.ask_about("transformers", "config_default." + std::string(row.keys[0]));
      if (by_version.value) {
        value = *by_version.value;
        s.cite = by_version.cite;
      } else if (!by_version.rows.empty()) {
        f.aux_coefficient.explain_unknown(by_version.why);
        continue;
      }
      set_by_name(f, "balance.aux_coefficient_default", text_node(value), Origin::kFrameworkDefault, s, true);
    }
    set_by_name(f, row.fact, text_node(value), Origin::kFrameworkDefault, s, true);
  }
  for (const FamilyKey& row : r.family->keys) {
    if (row.keys.empty()) continue;
    if (row.fact == "balance.aux_flag") f.aux_flag_key.set(std::string(row.keys[0]), Origin::kFamily, source);
    if (row.fact == "balance.aux_coefficient") f.aux_coefficient_key.set(std::string(row.keys[0]), Origin::kFamily, source);
  }
  f.scoring.set(r.family->routing.scoring, Origin::kFamily, source);
  if (r.family->renormalise == "always" || r.family->renormalise == "never") {
    const Node* p = config_value(r, r.family->renormalise_norm.key);  // null: divided by nothing
    f.renormalised.set(r.family->renormalise == "always" && !(p && p->is_null()), Origin::kFamily, source);
  }
  f.balance.set(r.family->balance, Origin::kFamily, source);
  Source fp32 = source;
  fp32.cite = std::string(r.family->documented_fp32_cite);
  f.router_documented_fp32.set(r.family->documented_fp32_router, Origin::kFamily, fp32);
  if (f.top_k.known()) {
    f.aux_uniform_value.set(r.family->aux_uniform_value_per_k > 0 ? static_cast<double>(f.top_k.value()) : 1.0,
                            Origin::kFamily, source);
  }

  resolve_routing(r, source);
}

/// What the configs say; without one, what the table of hub models says.
std::int64_t config_number(const Resolver& r, const LayerKey& wanted) {
  std::optional<std::int64_t> found;
  if (const Node* v = config_value(r, wanted.key)) found = node_int(*v);
  const HubModel* hub = r.material.configs.empty() ? find_hub_model(r.material.base_model) : nullptr;
  for (const auto& [key, value] : hub ? hub->config : std::span<const std::pair<std::string_view, std::string_view>>{}) {
    if (key == wanted.key) found = node_int(text_node(value));
  }
  return found.value_or(wanted.fallback);
}

std::optional<std::vector<std::int64_t>> config_numbers(const Resolver& r, std::string_view key) {
  const Node* v = config_value(r, key);
  std::vector<std::int64_t> out;
  if (v && v->is_string()) {  // step3p5: "3,4,5"
    std::stringstream text(v->text);
    for (std::string item; std::getline(text, item, ',');) {
      const auto number = node_int(text_node(item.substr(std::min(item.find_first_not_of(' '), item.size()))));
      if (!number) return std::nullopt;
      out.push_back(*number);
    }
    return out;
  }
  if (!v || !v->is_list()) return std::nullopt;
  for (const Node& item : v->items) {
    if (auto i = node_int(item)) out.push_back(*i);
  }
  return out;
}

std::string rule_text(const MoeLayerRule& rule) {
  std::string out;
  std::vector<std::string_view> keys = {rule.from.key, rule.to.key, rule.every.key, rule.offset.key, rule.dense, rule.only};
  for (const FamilyCondition& types : rule.types) keys.push_back(types.key);
  for (std::string_view key : keys) {
    if (!key.empty()) out += (out.empty() ? "" : ", ") + std::string(key);
  }
  return out.empty() ? "all layers are MoE" : "the family's rule on " + out;
}

/// Appends the MoE layers of one stack of n layers, the first of which is layer `first` of the model.
void add_moe_layers(const Resolver& r, const MoeLayerRule& rule, std::int64_t first, std::int64_t n, std::vector<std::int64_t>* layers) {
  const std::int64_t from = config_number(r, rule.from), to = config_number(r, rule.to);
  const std::int64_t every = std::max<std::int64_t>(1, config_number(r, rule.every));
  const std::int64_t named = config_number(r, rule.offset);
  const std::int64_t offset = named < 0 ? every - 1 : named == 1 && every == 1 ? 0 : named;  // a step of 1: every layer
  const auto dense = config_numbers(r, rule.dense), only = config_numbers(r, rule.only);
  const auto types = layer_words(rule, [&](std::string_view key) { return config_value(r, key); });
  auto names = [](const std::vector<std::int64_t>& list, std::int64_t i) {
    return std::find(list.begin(), list.end(), i) != list.end();
  };
  for (std::int64_t i = 0; i < n; ++i) {
    const bool by_rule = i >= from && (to < 0 || i <= to) && i % every == offset;
    const auto at = static_cast<std::size_t>(i);
    if (types  ? at < types->words.size() && types->words[at] == types->moe
        : only ? names(*only, i)
               : by_rule && !(dense && names(*dense, i)))
      layers->push_back(first + i);
  }
}

void resolve_moe_layers(Resolver& r) {
  FactSheet& f = r.facts;
  if (!r.family) return;
  if (r.family->moe_layer_rule.counts) {
    std::string looked_for;
    for (const FamilyCondition& listed : r.family->moe_layer_rule.types) looked_for += (looked_for.empty() ? "" : " or ") + std::string(listed.key);
    const auto types = layer_words(r.family->moe_layer_rule, [&](std::string_view key) { return config_value(r, key); });
    if (types) f.num_layers.set(static_cast<std::int64_t>(types->words.size()), Origin::kDerived, derived_from("the length of " + std::string(types->key)));
    else f.num_layers.explain_unknown("the configuration has no list " + looked_for);
  }
  if (!f.num_layers.known()) return;
  constexpr std::int64_t kMost = 100000;  // more is nonsense in the config; RT003 and the tensor comparison speak of it
  const std::int64_t encoder = f.encoder_layers.known() ? f.encoder_layers.value() : 0, n = f.num_layers.value();
  if (n < 0 || n > kMost || encoder < 0 || encoder > kMost) return;
  const MoeLayerRule& rule = r.family->moe_layer_rule;
  std::vector<std::int64_t> layers;
  if (f.encoder_layers.known()) {
    add_moe_layers(r, rule, 0, encoder, &layers);
    add_moe_layers(r, r.family->decoder_layer_rule, encoder, n, &layers);
    f.num_layers.set(encoder + n, Origin::kDerived, derived_from("layers of the encoder and of the decoder"));
  } else {
    add_moe_layers(r, rule, 0, n, &layers);
  }
  f.num_dense_layers.set(f.num_layers.value() - static_cast<std::int64_t>(layers.size()), Origin::kDerived, f.num_layers.source());
  f.moe_layers.set(std::move(layers), Origin::kDerived, derived_from(rule_text(rule)));
}

/// A hub id that is not in the local cache: what the committed table knows of it.
void apply_hub_model(Resolver& r) {
  const HubModel* hub = r.material.base_model.empty() ? nullptr : find_hub_model(r.material.base_model);
  if (!hub) return;
  r.family = find_family(hub->family);
  if (!r.family) return;
  Source source = r.material.base_model_source;
  source.cite = std::string(hub->cite);
  r.facts.model_type.set(std::string(r.family->model_types[0]), Origin::kFamily, source);
  if (!r.family->classes.empty()) r.facts.model_class.set(std::string(r.family->classes[0]), Origin::kFamily, source);
  for (const FamilyKey& row : r.family->keys) {
    for (const auto& [key, value] : hub->config) {
      if (std::find(row.keys.begin(), row.keys.end(), key) == row.keys.end()) continue;
      Source s = source;
      s.key = std::string(key);
      set_by_name(r.facts, row.fact, text_node(value), Origin::kFamily, s, false);
    }
  }
}

constexpr std::string_view kExpertKeys[] = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"};

/// A model_type nobody described: are there experts at all?
void recognise_unknown(Resolver& r) {
  FactSheet& f = r.facts;
  const Recognised found = recognise_moe(r.material.model);
  Source source;
  source.role = Role::kModelWeights;
  if (!r.material.model.files().empty()) source.file = r.material.model.files().front();
  if (found.layers > 0) {
    source.tensor = found.router_tensor;
    f.has_moe.set(true, Origin::kDerived, source);
    f.family.set("unknown", Origin::kDerived, source);
    if (found.experts > 0) f.num_experts.set_if_unknown(found.experts, Origin::kDerived, source);
    if (found.hidden > 0) f.hidden_size.set_if_unknown(found.hidden, Origin::kDerived, source);
    f.moe_layers.set_if_unknown(found.moe_layers, Origin::kDerived, source);
    return;
  }
  for (const ModelConfig& c : r.material.configs) {
    if (described_by(c)) continue;  // and its class builds no experts for this config
    const Node& text = c.text ? *c.text : c.root;
    for (std::string_view key : kExpertKeys) {
      const Node* v = text.find(key);
      const auto n = v ? node_int(*v) : std::nullopt;
      if (!n || *n < 2) continue;
      f.has_moe.set(true, Origin::kDerived, place(c, *v, key));
      f.family.set("unknown", Origin::kDerived, place(c, *v, key));
      f.num_experts.set_if_unknown(*n, Origin::kStated, place(c, *v, key));
    }
  }
  if (f.has_moe.known() || r.material.configs.empty()) return;
  Source where;
  where.role = r.material.configs.back().role;
  where.file = r.material.configs.back().file;
  f.has_moe.set(false, Origin::kDerived, where);
}

/// Whatever else is given: of a family without a table nobody can tell what its config and its code mean.
void explain_unknown_family(FactSheet& f) {
  if (!f.family.known() || f.family.value() != "unknown") return;
  const std::string who = f.model_type.known() ? "model_type " + f.model_type.value() : "this model's architecture";
  f.visit([&](auto& fact) {
    const std::string_view supply = fact.info().supply;
    if (fact.known() || (supply != "--model DIR with config.json" && supply != "--model DIR of a known family")) return;
    fact.explain_unknown("nothing is recorded about " + who);
  });
}

/// The matrices of the family's stacks, one copy a MoE layer.
void count_expert_parameters(Resolver& r) {
  FactSheet& f = r.facts;
  if (!r.family || !f.moe_layers.known() || f.moe_layers.value().empty() || !f.num_experts.known() || !f.hidden_size.known() ||
      !f.expert_width.known()) {
    return;
  }
  FamilyShape shape;
  shape.layers = 1;
  shape.moe_layers = {0};
  shape.experts = f.num_experts.value();
  shape.hidden = f.hidden_size.value();
  shape.expert_width = f.expert_width.value();
  shape.expert_input = f.expert_input.known() ? f.expert_input.value() : 0;
  std::int64_t total = 0;
  for (const ExpandedTensor& t : expand(*r.family, shape, FamilyTensor::Where::kMemory)) {
    const bool open = std::any_of(t.shape.begin(), t.shape.end(), [](std::int64_t d) { return d <= 0; });  // packed bytes
    if (t.part != Part::kRoutedExpert || t.shape.size() < 2 || open || t.name.ends_with("bias")) continue;
    std::int64_t n = static_cast<std::int64_t>(f.moe_layers.value().size());
    for (std::int64_t d : t.shape) {
      if (__builtin_mul_overflow(n, d, &n)) return;
    }
    if (__builtin_add_overflow(total, n, &total)) return;
  }
  if (total > 0) f.expert_parameters.set(total, Origin::kDerived, f.expert_width.source());
}

}  // namespace

void resolve_model(Resolver& r) {
  FactSheet& f = r.facts;
  for (const ModelConfig& c : r.material.configs) {
    if (c.root.find("model_type") || (c.text && c.text->find("model_type"))) r.family = family_of(c);
  }
  if (r.material.configs.empty()) apply_hub_model(r);
  for (const ModelConfig& c : r.material.configs) {
    apply_config(r, c);
    Source source;
    source.role = c.role;
    source.file = c.file;
    source.key = "auto_map";
    const Node* code = c.root.find_path("auto_map.AutoModelForCausalLM");
    f.remote_code.set(code != nullptr, code ? Origin::kStated : Origin::kAbsent, std::move(source));
  }
  apply_overrides(r);
  if (r.family) {
    apply_family(r);
    f.has_moe.set(true, Origin::kFamily, f.family.source());
  } else {
    recognise_unknown(r);
    explain_unknown_family(f);
  }
  resolve_moe_layers(r);

  auto ask_bool = [&](Fact<bool>& fact, std::string_view topic) {
    const BehaviourAnswer answer = r.ask_about("transformers", topic);
    if (answer.value) fact.set(*answer.value == "true", Origin::kFrameworkDefault, source_of(answer));
    else fact.explain_unknown(answer.why);
  };
  if (f.family.known()) {
    ask_bool(f.router_is_linear, "router_is_linear");
    ask_bool(f.experts_fused, "experts_fused");
    if (r.family && r.family->routing.correction_bias) ask_bool(f.bias_kept_fp32, "bias_kept_fp32");
    ask_bool(f.experts_skipped, "skips_idle_experts");
    if (f.expert_capacity.known()) {
      const BehaviourAnswer answer = r.ask_about("transformers", "capacity_group");
      if (answer.value) f.capacity_group.set(*answer.value, Origin::kFrameworkDefault, source_of(answer));
      else f.capacity_group.explain_unknown(answer.why);
    }
  }
  count_expert_parameters(r);
}

}  // namespace moeaudit
