// What the readers of configs share: a table of rows (key of the file -> name in Material, conversion), the walk over
// it, and the table of framework readers that cmake/tables.cmake makes of this folder. A reader has recognises() apart
// from read(): the first looks at keys only and never writes.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "audit/families/family.h"
#include "audit/inputs/material.h"

namespace moeaudit {

/// A parsed file, and where it stands.
struct ConfigFile {
  std::string path;  // as shown to the user
  Role role = Role::kTrainingConfig;
  const Node* root = nullptr;
};

/// nullopt: this value was not understood; the key is listed as unread.
using Convert = std::optional<Node> (*)(const Node&);

struct Row {
  std::string_view key;  // dotted path; "model_config.*" takes every key below
  std::string_view
      setting;  // name in Material::settings ("model_config.*" keeps the rest); "": read by the reader's code
  Convert convert = nullptr;  // nullptr: as written
  bool null_speaks = false;   // a null is a statement ("deepspeed": null), not silence
};

/// What to do with keys that no row names: list all of them (a file that a user wrote), or only those with something in
/// them (a file that a program wrote, with every default in it).
enum class Unread { kAll, kNonEmpty, kNone };

/// Appends one Setting a row found, in the order of the file, and lists the rest in material->unread_keys.
void read_rows(const ConfigFile& file, std::span<const Row> rows, Unread unread, Material* material);

Source place_of(const ConfigFile& file, const Node& map, std::string_view key, std::string_view path);
void add_setting(const ConfigFile& file, std::string_view key, std::string name, Node value, Material* material);

// ---- values
// ----------------------------------------------------------------------------------------------------------
Node string_node(std::string_view text, const Node& place);
Node bool_node(bool value, const Node& place);
std::optional<Node> as_number(const Node& n);   // "2e-5", which PyYAML reads as a string, becomes the number
std::optional<Node> not_bool(const Node& n);    // negation of a bool
std::optional<Node> comma_list(const Node& n);  // "q_proj, v_proj" -> list; lists stay
bool is_true(const Node* n);
bool says_something(const Node& n);  // not null, false, zero or empty

// ---- what is shared between the files of one run ------------------------------------------------------------------
/// The base model that `key` names; a later file outranks an earlier one.
void state_base_model(const ConfigFile& file, std::string_view key, Material* material);
/// An adapter is trained, because `key` of this file says so.
void state_adapter(const ConfigFile& file, std::string_view key, Material* material);
/// The file names no adapter, so what it says of LoRA has no effect: takes these statements back and returns their
/// keys.
std::vector<UnreadKey> take_back_adapter_settings(const ConfigFile& file, Material* material);
/// Who trains, as this config file tells it; `trainer` is "" where the framework runs transformers' own loop.
void state_framework(const ConfigFile& file, std::string_view framework, std::string_view trainer, std::string_view key,
                     Material* material);
/// The strongest statement so far about a package, or nullptr.
const VersionSet* version_of(const Material& material, std::string_view package);
/// "axolotl 0.18.0" or "axolotl".
std::string with_version(const Material& material, std::string_view package);
/// Names balance loss, z-loss, router or experts.
bool is_moe_key(std::string_view key);
/// A key that some family's config class reads ("router_aux_loss_coef", "num_experts_per_tok").
bool is_model_config_key(std::string_view key);
bool family_reads(const Family& family, std::string_view key);
/// A key by which another framework or family sets a router loss, and that no class of transformers' families reads.
enum class ForeignKey { kNo, kBalanceLoss, kZLoss };
ForeignKey foreign_moe_key(std::string_view key);

// ---- training configs of frameworks ---------------------------------------------------------------------------------
/// How sure recognises() is. The surest reader takes the file; of equals the first in the table.
enum class Match { kNo, kGeneric, kSure };

struct ConfigReader {
  std::string_view framework;  // "axolotl"; "" if the file does not tell who trains
  std::string_view kind;       // for people: "Axolotl config"
  Match (*recognises)(const Node& root);
  void (*read)(const ConfigFile& file, Material* material);  // nullptr: recognised, and not read
  std::string_view why_not_read;                             // what the user can give instead
  /// What can be told only once the model's config is read (material->configs); nullptr: nothing.
  void (*after_model)(const ConfigFile& file, Material* material) = nullptr;
};
extern const ConfigReader* const kConfigReaders[];
extern const int kNumConfigReaders;
const ConfigReader* find_config_reader(const Node& root);

/// The family of the model whose config was read last, or of the hub id that is in the committed table; nullptr:
/// unknown.
const Family* family_of(const Material& material);
/// By the model_type of the file itself, else by that of the language model nested in it; nullptr also for a model whose
/// class builds no experts for what the config says.
const Family* family_of(const ModelConfig& config);
/// The family that has the model_type, experts or none.
const Family* described_by(const ModelConfig& config);
/// The words, one a layer, that a config has under a key of the rule's `types`; a text is the list of its letters.
struct LayerWords {
  std::string_view key, moe;  // where they stand, and the word of a MoE layer
  std::vector<std::string> words;
};
std::optional<LayerWords> layer_words(const MoeLayerRule& rule, const std::function<const Node*(std::string_view)>& value_of);
/// model_type of the (text) config that was read last, "" if none.
std::string model_type_of(const Material& material);

/// DeepSpeed's settings: `file.root` is the JSON, or the dict that stands at `key` of another file ("" for a file).
void read_deepspeed(const ConfigFile& file, std::string_view key, Material* material);

/// Rows that every framework on transformers' TrainingArguments shares.
std::span<const Row> training_arguments_rows();
/// Keys of TrainingArguments in `root` by which a file is recognised as one of its kind.
int count_training_arguments(const Node& root);

/// The value in YAML's flow style, on one line.
std::string flow_style(const Node& n);

}  // namespace moeaudit
