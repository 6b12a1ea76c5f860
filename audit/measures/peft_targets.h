// What a LoRA configuration reaches in a model: PEFT's own matching (tuners/tuners_utils.py, tuners/lora/layer.py,
// utils/other.py, utils/transformers_weight_conversion.py, read at 0.13.2 to 0.21.2), over a ModuleTree. Held to the real
// library by fixtures/peft/targets.json.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "audit/measures/module_tree.h"

namespace moeaudit {

/// What differs between releases of PEFT, and what it finds in transformers.
struct PeftRules {
  bool has_exclude_modules = true;      // a field of LoraConfig since 0.14
  bool has_target_parameters = true;    // a field of LoraConfig since 0.17
  bool saved_as_pattern = true;         // what modules_to_save takes out of the targets: the pattern (^|.*\.)m($|\..*) since
                                        // 0.14, paths that end in m before
  bool first_index_is_layer = true;     // layers_to_transform counts layers; before 0.20 the last index of the path, an expert's
  bool strings_become_letters = false;  // 0.19 on transformers 5: "all-linear" and regexes end up as a set of characters
  /// Which table rewrites names of transformers 4 (w1, gate, ...) into target_parameters: "mixtral", "qwen2_moe" or "".
  std::string conversion;
  bool operator==(const PeftRules&) const = default;
};

/// The fields of LoraConfig that decide what is reached, as given to PEFT.
struct LoraTargets {
  std::string model_type;                               // for PEFT's default targets
  std::optional<std::vector<std::string>> modules;      // target_modules; nullopt: None
  bool modules_is_string = false;                       // one string: "all-linear" or a regex over the whole path
  bool linear_leaf_names = false;                       // Axolotl's lora_target_linear: last names of all nn.Linear, listed
  std::vector<std::string> parameters, exclude, save;   // target_parameters, exclude_modules, modules_to_save
  bool exclude_is_string = false;
  std::vector<std::int64_t> layers;                     // layers_to_transform; empty: all
  std::int64_t rank = 8;
  std::vector<std::pair<std::string, std::int64_t>> rank_pattern;  // regex anchored at the end -> rank, first hit wins
  double dropout = 0;
  bool operator==(const LoraTargets&) const = default;
};

struct TargetHit {
  int module = -1;               // index into ModuleTree::modules
  int parameter = -1;            // index into ModuleTree::parameters, or -1: the module itself
  std::int64_t rank = 0;         // 0: saved and trained whole
};

struct TargetEntry {
  std::string field;             // "target_modules", ...
  std::string text;              // as given
  std::int64_t hits = 0;         // exclude_modules: modules with parameters that it takes out
  std::map<Part, std::int64_t> parts;
  std::string why;               // where nothing is reached, or PEFT stops because of this entry
  TargetFault fault = TargetFault::kNone;
  std::string partner;           // kLacksPartner: what has to be targeted too
};

struct TargetResolution {
  std::string refused;           // not empty: PEFT raises, and why; `hits` is then what was matched up to there
  std::string cannot_tell;       // not empty: a pattern we cannot read; nothing else is filled in
  std::vector<TargetHit> hits;   // in the order of the model
  std::vector<TargetEntry> entries;
};

TargetResolution resolve_targets(const ModuleTree& tree, const LoraTargets& targets, const PeftRules& rules);

}  // namespace moeaudit
