// Model families as data. One YAML a family in this folder; cmake/compile_tables.cc turns all of them into the constant
// table below at build time, and nothing parses YAML at start. The schema of the YAML is docs/add_a_family.md.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/values.h"

namespace moeaudit {

/// How config.json spells one fact of the fact sheet.
struct FamilyKey {
  std::string_view fact;                    // "router.num_experts"
  std::span<const std::string_view> keys;   // accepted spellings, first the one the current class writes; none: a constant
  std::string_view default_value;           // of the config class (or the constant), as text; "" if the class has none or
                                            // its releases differ: then behaviours have "config_default.<key>"
  std::string_view cite;                    // framework file at a commit : line
};

/// One tensor of the family. Placeholders: {L} layer, {D} layer of the decoder behind an encoder, {e} expert, {v} expert of a second
/// set of as many, which names number behind the first. Shape symbols: E experts, H hidden, I expert width, Z what an expert gets,
/// S shared width, V vocabulary, X rows of the router beyond one an expert, numbers, products ("2*I"), sums ("E+X"), "?" any.
struct FamilyTensor {
  // name in the saved file | parameter name in memory (transformers >= 5) | in released files, where these have others |
  // in files of older releases of the class
  enum class Where { kHub, kMemory, kReleased, kOlder };
  enum class Layers { kMoe, kDense, kAll, kNone };  // which layers have it; kNone: neither {L} nor {D}
  std::string_view name;
  std::string_view shape;
  Part part;
  Where where;
  Layers layers;
  bool optional;                            // may be absent (tied, bias switched off, ...)
  std::string_view optional_when;           // "tie_word_embeddings", "attention_bias=false", ...; free text, may be ""
  std::span<const std::string_view> alternatives;  // optional only where one of these stands in for it in the same layer
  bool beyond;                              // {e} may go on through X: what is there runs nothing, and may be missing
};

/// One number of a MoeLayerRule: its config key and what the class takes without it. No key: a constant of the family.
struct LayerKey {
  std::string_view key;
  std::int64_t fallback;
};

/// A number of the config, and what the class takes without it. No key: a constant of the family.
struct ConfigNumber {
  std::string_view key;
  double fallback;
};

/// A config key that has this value. Key "": no condition.
struct FamilyCondition {
  std::string_view key, value;
};

/// Which layers are MoE: those from `from` to `to` (both included; to < 0: to the last) whose index divided by `every`
/// leaves `offset` (offset < 0: every - 1), but none that the list `dense` names. A list `only` replaces all of it, and so
/// does a list of words, one a layer, that the config has under a key of `types`: those with the word `value`. A text stands
/// for the list of its letters.
struct MoeLayerRule {
  LayerKey from, to, every, offset;
  std::string_view dense, only;  // config keys of lists; may be ""
  std::span<const FamilyCondition> types;
  bool counts;                   // that list says how many layers there are, too
};

/// What of the scaling the router's own weights have.
enum class WeightScaling {
  kRouted,         // the factor of router.routed_scaling
  kBehindExperts,  // none of it: the block multiplies the sum of its experts' outputs by it
  kInverseK,       // they are divided by k, and the block multiplies that sum by k
};

/// Everything moe-audit knows of one family that does not depend on the version of the framework; what does depend on
/// it (is the router nn.Linear, does the flag work) is in audit/behaviours.
struct Family {
  std::string_view name;
  std::span<const std::string_view> model_types;   // exactly one family matches a model_type
  std::span<const std::string_view> classes;       // causal-LM classes
  std::span<const FamilyKey> keys;
  std::span<const FamilyTensor> tensors;
  MoeLayerRule moe_layer_rule;         // of the encoder, where there is one
  MoeLayerRule decoder_layer_rule;     // of the decoder behind it
  FamilyCondition table_layers;        // list of words, one a layer: in layers with this one a table of token ids gives the experts
  FamilyCondition moe_if;              // the class builds experts only where the config says so; else the model is dense
  Routing routing;                     // conventions; groups, scaling, renormalise and the next three are overwritten from the config
  ConfigNumber logit_softcap, renormalise_floor;
  ConfigNumber mixer_jitter;           // where routing.sparse_mixer
  ConfigNumber renormalise_norm;       // null: the weights are not renormalised; another word or no p > 0: the order is not known
  FamilyCondition groups_if;           // groups count only where the config says so
  std::span<const FamilyCondition> routing_if;  // where the config says something else, the order is not known
  bool logits_dtype_by_version;        // routing.logits_dtype is behaviours' "router_logits_dtype"
  WeightScaling weight_scaling;        // routing.scaling is overwritten accordingly
  bool scores_dtype_by_version;        // routing.scores_dtype is behaviours' "router_scores_dtype"
  std::string_view not_replayed;       // why `routing` cannot be replayed: an order that its fields cannot express; ""
  std::string_view renormalise;        // "always" | "never" | "config" (key of router.renormalised)
  Balance balance;                     // kAuxLoss: the class has a balance-loss path when its flag is on
  double aux_uniform_value_per_k;      // 1: uniform routing gives k (HF form); 0: gives 1
  std::string_view aux_counted_twice;  // routers below a module of this name are in that loss twice; may be ""
  bool documented_fp32_router;         // the modelling code upcasts the gate matmul, or the paper demands it
  std::string_view documented_fp32_cite;
  std::span<const std::string_view> fp32_tensors;  // kept in float32 by the class ("e_score_correction_bias")
  std::span<const std::string_view> expert_names;  // names by which users target routed experts: "w1", "experts", ...
  std::span<const std::string_view> router_names;  // "gate", "router"
  std::span<const std::string_view> extras;        // files may hold these too: names with '*' for any run of characters
  std::span<const std::string_view> towers;        // and what the class builds beside the language model, which no row describes
  std::span<const std::string_view> unknown;       // facts that are known not to be known, listed out loud
  std::span<const std::string_view> cites;         // sources of the entry as a whole
};

extern const Family kFamilies[];
extern const int kNumFamilies;

/// Base models users name by hub id: "mistralai/Mixtral-8x7B-v0.1" -> family and the numbers of its config.json that
/// rules need (E, k, layers, hidden, ...). From audit/families/hub_ids.yaml; origin kFamily.
struct HubModel {
  std::string_view id;      // compared without case
  std::string_view family;
  std::span<const std::pair<std::string_view, std::string_view>> config;  // config key -> value as text
  std::string_view cite;
};
extern const HubModel kHubModels[];
extern const int kNumHubModels;

/// The factor on the weights that the router gives its experts.
double weight_scaling(const Family& family, double routed_scaling, std::int64_t top_k);

const Family* find_family_by_model_type(std::string_view model_type);
const Family* find_family(std::string_view name);
const HubModel* find_hub_model(std::string_view id);

/// Numbers that expand a family's patterns for one model.
struct FamilyShape {
  std::int64_t layers = 0, experts = 0, hidden = 0, expert_width = 0, shared_width = 0, vocabulary = 0;
  std::vector<std::int64_t> moe_layers;
  std::int64_t encoder_layers = 0;     // of `layers`: layer encoder_layers is the decoder's first
  std::int64_t extra_rows = 0;         // rows of the router beyond one an expert
  std::int64_t expert_input = 0;       // width of what an expert gets; 0: the hidden size
};
struct ExpandedTensor {
  std::string name;
  std::vector<std::int64_t> shape;   // -1: any
  Part part;
  int layer;                         // -1 none
  int expert;                        // -1 none
  bool optional;
  std::vector<std::string> alternatives;  // if not empty: missing all the same, unless one of these is there
};
/// All tensors of `where` for one model, in a fixed order. A symbol of the shape that is 0 in `shape` gives -1.
std::vector<ExpandedTensor> expand(const Family& family, const FamilyShape& shape, FamilyTensor::Where where);
/// True for a family with {v} among its tensors.
bool has_second_set(const Family& family);
/// A name of `extras` or `towers`: '*' is any run of characters.
bool matches_glob(std::string_view pattern, std::string_view name);
/// True for a name that no row describes but that is known to come along: towers, MTP layers, scales of quantised weights.
bool is_known_extra(const Family& family, std::string_view name);

/// Part, layer and expert of a tensor or module name under a family (nullptr: by common names alone: "experts", "gate",
/// "router", "self_attn", ...). Accepts hub and memory names, with or without ".weight", "base_model.model." and
/// ".lora_A.weight" around them.
struct NamedPart {
  Part part = Part::kOther;
  int layer = -1;
  int expert = -1;
  bool fused = false;   // a whole stack of experts
};
/// Layers are numbered through both stacks: behind an encoder of `encoder_layers`, decoder layer 0 is that number. Of `experts`
/// experts (0: not known) one with that number or a higher one is of a second set where the family has {v}: Part::kOther.
NamedPart classify(const Family* family, std::string_view name, std::int64_t encoder_layers = 0, std::int64_t experts = 0);
/// The layer and expert for which `name` is `pattern`; nullopt if it is not.
struct PatternMatch {
  int layer = -1;
  int expert = -1;
};
std::optional<PatternMatch> match_pattern(std::string_view pattern, std::string_view name, std::int64_t encoder_layers = 0);

}  // namespace moeaudit
