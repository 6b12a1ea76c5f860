// A base and what was trained from it: are both here, and which MoE keys of their config.json differ?
#include <algorithm>
#include <array>

#include "audit/inputs/reader.h"
#include "audit/inputs/resolve_parts.h"

namespace moeaudit {
namespace {

/// Keys that families have and audit/families does not name one by one. https://github.com/huggingface/transformers,
/// configuration_{switch_transformers,deepseek_v2,deepseek_v3,mixtral,phimoe,qwen2_moe}.py
struct KnownKey {
  std::string_view key, effect;
};
constexpr std::array<KnownKey, 10> kOtherKeys = {{{"scoring_func", "routing"},
                                                  {"topk_method", "routing"},
                                                  {"expert_capacity", "routing"},
                                                  {"capacity_factor", "routing"},
                                                  {"moe_layer_freq", "shape"},
                                                  {"decoder_sparse_step", "shape"},
                                                  {"mlp_only_layers", "shape"},
                                                  {"router_jitter_noise", "training"},
                                                  {"input_jitter_noise", "training"},
                                                  {"router_z_loss_coef", "training"}}};

std::string_view effect_of(std::string_view fact) {
  if (fact.substr(0, 8) == "balance.") return "training";
  if (fact.substr(0, 7) == "router.") return fact == "router.num_experts" ? "shape" : "routing";
  return "shape";
}

/// What a node says, in one spelling: 2 and 2.0 are equal, and so are true and True.
std::string word_of(const Node& n) {
  if (n.kind == Node::Kind::kBool) return n.boolean ? "true" : "false";
  if (const auto number = node_double(n)) return to_text(*number);
  if (n.is_string()) return n.text == "True" ? "true" : n.text == "False" ? "false" : n.text;
  std::string text = "[";
  for (std::size_t i = 0; i < n.items.size(); ++i) text += (i ? ", " : "") + word_of(n.items[i]);
  return n.is_null() ? "null" : text + "]";
}

struct Said {
  std::string word;  // "": nobody says, and the class has no default that we know
  int line = 0;
};

const Node& text_of(const ModelConfig& c) { return c.text ? *c.text : c.root; }

template <class Keys>
Said said(const ModelConfig& config, const Keys& keys, std::string_view otherwise) {
  for (std::string_view key : keys) {
    const Node* v = text_of(config).find(key);
    if (v && !v->is_null()) return {word_of(*v), v->line};
  }
  Node node;
  node.kind = Node::Kind::kString;
  node.text = std::string(otherwise);
  return {word_of(node), 0};
}

void add(const Said& base, const Said& trained, std::string_view key, std::string_view effect, ConfigChanges* out) {
  if (base.word.empty() || trained.word.empty() || base.word == trained.word) return;
  out->key.emplace_back(key);
  out->base.push_back(base.word);
  out->trained.push_back(trained.word);
  out->effect.emplace_back(effect);
  out->base_line.push_back(base.line);
  out->line.push_back(trained.line);
}

/// Which layers have experts, by the config's list; releases call the other layers by other names, or all by letters.
std::optional<std::vector<bool>> listed_experts(const MoeLayerRule& rule, const ModelConfig& config) {
  const auto listed = layer_words(rule, [&](std::string_view key) { return text_of(config).find(key); });
  if (!listed) return std::nullopt;
  std::vector<bool> out;
  for (const std::string& word : listed->words) out.push_back(word == listed->moe);
  return out;
}

const ModelConfig* strongest(const Material& m, Role role) {
  const ModelConfig* found = nullptr;
  for (const ModelConfig& c : m.configs) {
    if (c.role == role) found = &c;
  }
  return found;
}

}  // namespace

void resolve_base(Resolver& r) {
  const Material& m = r.material;
  FactSheet& f = r.facts;
  const bool both = !m.model.empty() && !m.base.empty();
  Source weights;
  weights.role = Role::kModelWeights;
  if (both) weights.file = m.base.files().front();
  f.base_given.set(both, !both ? Origin::kAbsent : m.base_asked ? Origin::kStated : Origin::kDerived, weights);

  const ModelConfig* base = strongest(m, Role::kBaseModelConfig);
  const ModelConfig* trained = strongest(m, Role::kCheckpointConfig);
  if (!base || !trained || base->file == trained->file) {
    f.base_config.explain_unknown("there is no config.json of a base model beside one that the run wrote");
    return;
  }
  ConfigChanges changes;
  changes.base_file = base->file;
  changes.file = trained->file;
  if (r.family) {
    for (const FamilyKey& row : r.family->keys) {
      if (row.keys.empty()) continue;  // a constant of the family
      const auto experts = row.fact == "model.moe_layers" ? listed_experts(r.family->moe_layer_rule, *base) : std::nullopt;
      if (experts && experts == listed_experts(r.family->moe_layer_rule, *trained)) continue;
      add(said(*base, row.keys, row.default_value), said(*trained, row.keys, row.default_value), row.keys.front(), effect_of(row.fact), &changes);
    }
  }
  for (const KnownKey& known : kOtherKeys) {
    if (r.family && std::any_of(r.family->keys.begin(), r.family->keys.end(), [&](const FamilyKey& row) {
          return std::find(row.keys.begin(), row.keys.end(), known.key) != row.keys.end();
        })) {
      continue;
    }
    const std::array<std::string_view, 1> key = {known.key};
    add(said(*base, key, ""), said(*trained, key, ""), known.key, known.effect, &changes);
  }
  for (std::size_t i = 0; i < changes.key.size(); ++i) {
    if (r.last("model_config." + changes.key[i])) changes.effect[i] = "chosen";  // the training config asks for it
  }
  Source source;
  source.role = Role::kCheckpointConfig;
  source.file = trained->file;
  f.base_config.set(std::move(changes), Origin::kDerived, source);
}

}  // namespace moeaudit
