// Axolotl's YAML (PyYAML dialect). Keys and meanings: axolotl-ai-cloud/axolotl @067b021c
// src/axolotl/utils/schemas/*.py, utils/config/__init__.py (resolve_dtype, normalize_config),
// core/builders/{base,causal,rl}.py, loaders/{model,adapter}.py.
#include <algorithm>

#include "audit/behaviours/behaviour.h"
#include "audit/families/family.h"
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

/// "qlora" is "lora" with load_in_4bit, which the schema demands beside it; other names are plugins' own methods.
std::optional<Node> adapter_kind(const Node& n) {
  if (!n.is_string()) return std::nullopt;
  return string_node(n.text == "qlora" || n.text == "lora" ? "LORA" : n.text, n);
}

constexpr Row kRows[] = {
    {"base_model", ""},
    {"base_model_config", ""},
    {"revision_of_model", "base_model_revision"},
    {"model_revision", "base_model_revision"},
    {"model_config.*", "model_config.*"},               // setattr on the config before the model is built
    {"overrides_of_model_config.*", "model_config.*"},  // the field's own name; model_config is its alias
    {"trust_remote_code", "trust_remote_code"},
    {"sample_packing", "packing"},
    {"adapter", "peft_type", adapter_kind},
    {"lora_r", "r", as_number},
    {"lora_alpha", "lora_alpha", as_number},
    {"lora_dropout", "lora_dropout", as_number},
    {"lora_target_modules", "target_modules"},
    {"lora_target_linear", "lora_target_linear"},
    {"lora_target_parameters", "target_parameters"},
    {"lora_modules_to_save", "modules_to_save"},
    {"lora_rank_pattern", "rank_pattern"},
    {"lora_alpha_pattern", "alpha_pattern"},
    {"peft_layers_to_transform", "layers_to_transform"},
    {"peft_use_rslora", "use_rslora"},
    {"load_in_4bit", "load_in_4bit"},
    {"load_in_8bit", "load_in_8bit"},
    {"bnb_config_kwargs.bnb_4bit_quant_type", "bnb_4bit_quant_type"},
    {"bnb_config_kwargs.llm_int8_skip_modules", "llm_int8_skip_modules"},
    {"model_quantization_config", ""},
    {"model_quantization_config_kwargs.dequantize", "quant_dequantize"},
    {"quantize_moe_experts", "quantize_moe_experts"},
    {"bf16", ""},
    {"fp16", ""},
    {"bfloat16", ""},
    {"float16", ""},
    {"tf32", "tf32"},
    {"fp8", "fp8"},
    {"micro_batch_size", "per_device_train_batch_size", as_number},
    {"gradient_accumulation_steps", "gradient_accumulation_steps", as_number},
    {"batch_size", ""},
    {"sequence_len", "max_length", as_number},
    {"max_steps", "max_steps", as_number},
    {"warmup_steps", "warmup_steps", as_number},
    {"warmup_ratio", "warmup_ratio", as_number},
    {"learning_rate", "learning_rate", as_number},
    {"max_grad_norm", "max_grad_norm", as_number},
    {"gradient_checkpointing", "gradient_checkpointing"},
    {"gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs"},
    {"activation_offloading", "activation_offloading"},
    {"deepspeed", "deepspeed"},
    {"fsdp", "fsdp"},
    {"fsdp_config", "fsdp"},  // FSDP2 needs no `fsdp:` list
    {"fsdp_version", "fsdp_version"},
    {"unfrozen_parameters", "unfrozen_parameters"},
    {"rl", ""},
    {"reward_model", ""},
    {"process_reward_model", ""},
    {"trainer_cls", ""},
    {"plugins", ""},
};

Match recognises(const Node& root) {
  if (!root.find("base_model")) return Match::kNo;
  constexpr std::string_view kOwn[] = {"micro_batch_size",   "sequence_len", "adapter",      "lora_r",
                                       "load_in_4bit",       "datasets",     "num_epochs",   "model_config",
                                       "sample_packing",     "rl",           "val_set_size", "batch_size",
                                       "unfrozen_parameters"};
  return std::any_of(std::begin(kOwn), std::end(kOwn), [&](std::string_view k) { return root.find(k); }) ? Match::kSure
                                                                                                         : Match::kNo;
}

/// core/builders/rl.py and causal.py: the trl class behind each of Axolotl's own trainers. "" is transformers' loop.
std::string_view trainer_of(const Node& root, std::string_view* key) {
  struct Choice {
    std::string_view rl, trainer;
  };
  constexpr Choice kChoices[] = {{"dpo", "DPOTrainer"},   {"ipo", "DPOTrainer"},   {"kto", "KTOTrainer"},
                                 {"orpo", "ORPOTrainer"}, {"simpo", "CPOTrainer"}, {"grpo", "GRPOTrainer"},
                                 {"gdpo", "GRPOTrainer"}};
  const Node* custom = root.find("trainer_cls");
  if (custom && custom->is_string() && !custom->text.empty()) {
    *key = "trainer_cls";
    return custom->text;
  }
  const Node* rl = root.find("rl");
  if (rl && rl->is_string()) {
    *key = "rl";
    for (const Choice& c : kChoices) {
      if (rl->text == c.rl) return c.trainer;
    }
    return rl->text;  // a trainer that no table knows: what it does is unknown, not "as Trainer does"
  }
  if (is_true(root.find("reward_model"))) {
    *key = "reward_model";
    return "RewardTrainer";
  }
  if (is_true(root.find("process_reward_model"))) {
    *key = "process_reward_model";
    return "PRMTrainer";
  }
  *key = "base_model";
  return "";
}

/// resolve_dtype() and _configure_precision_settings(). `bf16: auto` stays "auto": the training machine decides.
void read_precision(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const Node* bf16 = root.find("bf16");
  const Node* fp16 = root.find("fp16");
  const bool full = bf16 && bf16->is_string() && bf16->text == "full";
  const bool automatic = bf16 && bf16->is_string() && bf16->text == "auto";
  auto dtype = [&](std::string_view key, std::string_view name) {
    add_setting(file, key, "torch_dtype", string_node(name, *root.find(key)), material);
  };
  auto flag = [&](std::string_view key, std::string name, bool value) {
    add_setting(file, key, std::move(name), bool_node(value, *root.find(key)), material);
  };
  if (full) {  // weights in bf16, no autocast
    flag("bf16", "bf16", false);
    flag("bf16", "bf16_full_eval", true);
    dtype("bf16", "bfloat16");
  } else if (is_true(bf16)) {
    flag("bf16", "bf16", true);
    dtype("bf16", "bfloat16");
    if (fp16 && fp16->as_bool()) flag("fp16", "fp16", false);  // bf16 switches fp16 off
  } else if (is_true(fp16)) {
    flag("fp16", "fp16", true);
    flag("fp16", "bf16", false);
    dtype("fp16", "float16");
  } else if (automatic) {
    add_setting(file, "bf16", "bf16", *bf16, material);
  } else if (is_true(root.find("bfloat16")) && bf16) {  // TrainingArguments gets bf16 = bf16 or bfloat16
    flag("bfloat16", "bf16", true);
    dtype("bfloat16", "bfloat16");
  } else if (bf16 && bf16->as_bool()) {  // bf16: false
    flag("bf16", "bf16", false);
    if (fp16 && fp16->as_bool()) flag("fp16", "fp16", false);
    if (is_true(root.find("float16")))
      dtype("float16", "float16");
    else if (is_true(root.find("load_in_8bit")))
      dtype("load_in_8bit", "float16");
    else
      dtype("bf16", "float32");
  }
}

/// batch_size // micro_batch_size, where gradient_accumulation_steps is not given (normalize_config).
void read_batch(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const Node* steps = root.find("gradient_accumulation_steps");
  const Node* batch = root.find("batch_size");
  const Node* micro = root.find("micro_batch_size");
  if ((steps && !steps->is_null()) || !batch || !micro) return;
  const auto total = batch->as_int();
  const auto each = micro->as_int();
  if (!total || !each || *each < 1 || *total < *each) return;
  Node value = *batch;
  value.text = std::to_string(*total / *each);
  add_setting(file, "batch_size", "gradient_accumulation_steps", std::move(value), material);
}

constexpr std::string_view kKeyList = "axolotl";  // audit/behaviours/axolotl_keys.yaml

/// Plugins bring keys of their own; those of axolotl.integrations are in the key list, foreign ones are not.
bool has_foreign_plugin(const Node& root) {
  const Node* plugins = root.find("plugins");
  if (!plugins || !plugins->is_list()) return false;
  return std::any_of(plugins->items.begin(), plugins->items.end(),
                     [](const Node& p) { return !p.is_string() || !p.text.starts_with("axolotl.integrations."); });
}

/// The block that does what a misplaced model key was meant to do, with what the file's own block already has (PyYAML
/// takes the last of two); "" where the key is none of the model config's.
std::string model_config_block(const Node& root, std::string_view key) {
  const Node* value = root.find(key);
  const bool balance = foreign_moe_key(key) == ForeignKey::kBalanceLoss;
  if (!value || !(balance || is_model_config_key(key))) return {};
  std::string block = "model_config:";
  const Node* present = root.find("model_config");
  for (std::size_t i = 0; present && present->is_map() && i < present->keys.size(); ++i) {
    block += "\n  " + present->keys[i] + ": " + flow_style(present->items[i]);
  }
  return block + "\n  " + (balance ? "router_aux_loss_coef" : std::string(key)) + ": " + flow_style(*value);
}

/// "router_aux_loss_coef and 12 more": keys that look like MoE keys first.
std::string examples_of(std::vector<std::string> keys) {
  std::stable_partition(keys.begin(), keys.end(), [](const std::string& k) { return is_moe_key(k); });
  std::string out = keys.empty() ? std::string() : keys[0];
  if (keys.size() > 1) out += " and " + std::to_string(keys.size() - 1) + " more";
  return out;
}

/// Validation dumps the schema's fields over the config, so a key that no field has is gone without a word.
void sort_out_ignored(const ConfigFile& file, std::size_t first_unread, Material* material) {
  const VersionSet* versions = version_of(*material, "axolotl");
  const bool listed = has_key_list("axolotl", kKeyList, versions);
  const bool foreign = has_foreign_plugin(*file.root);
  auto& unread = material->unread_keys;
  std::vector<UnreadKey> kept(unread.begin(), unread.begin() + static_cast<std::ptrdiff_t>(first_unread));
  std::vector<std::string> undecided;
  for (std::size_t i = first_unread; i < unread.size(); ++i) {
    const UnreadKey& key = unread[i];
    const bool nested = key.key.find('.') != std::string::npos;
    if (nested || (listed && !key_unknown("axolotl", kKeyList, key.key, versions))) {
      kept.push_back(key);
    } else if (!listed || foreign) {
      kept.push_back(key);
      undecided.push_back(key.key);
    } else {
      IgnoredKey ignored{file.path, key.line, key.key, with_version(*material, "axolotl"), is_moe_key(key.key), "", ""};
      ignored.why =
          "Axolotl's schema has no top-level key of this name, and its validation drops such keys without a word";
      ignored.instead = model_config_block(*file.root, key.key);
      material->ignored_keys.push_back(std::move(ignored));
    }
  }
  unread = std::move(kept);
  if (undecided.empty()) return;
  material->keys_not_compared =
      (!listed ? "which keys Axolotl knows depends on its release, and there is no list for " +
                     (versions ? to_text(*versions) : "an unknown one")
               : "a plugin from outside Axolotl may bring keys of its own") +
      std::string(" (undecided: ") + examples_of(std::move(undecided)) + ")";
}

/// load_adapter() returns the bare model where `adapter` is not set: a full fine-tune, whatever lora_r says.
void report_lora_without_adapter(const ConfigFile& file, Material* material) {
  const std::vector<UnreadKey> keys = take_back_adapter_settings(file, material);
  if (keys.empty()) return;
  std::string all;
  for (const UnreadKey& k : keys) all += (all.empty() ? "" : ", ") + k.key;
  const Node* first = file.root->find(keys[0].key);
  const std::string line = first ? "\n" + keys[0].key + ": " + flow_style(*first) : std::string();
  material->ignored_keys.push_back({file.path, keys[0].line, keys[0].key, with_version(*material, "axolotl"), false,
                                    "adapter: lora" + line,
                                    "Axolotl builds an adapter only where `adapter:` says which: without it " + all +
                                        " do nothing and every weight is trained"});
}

/// fsdp_config.fsdp_version is the older place of fsdp_version (schemas/fsdp.py).
void read_fsdp_version(const ConfigFile& file, Material* material) {
  const Node* config = file.root->find("fsdp_config");
  const Node* version = config && config->is_map() ? config->find("fsdp_version") : nullptr;
  if (!version || version->is_null() || file.root->find("fsdp_version")) return;
  material->settings.push_back(
      {"fsdp_version", *version, place_of(file, *config, "fsdp_version", "fsdp_config.fsdp_version")});
}

void read(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::size_t first_unread = material->unread_keys.size();
  read_rows(file, kRows, Unread::kAll, material);
  read_precision(file, material);
  read_batch(file, material);
  read_fsdp_version(file, material);
  sort_out_ignored(file, first_unread, material);
  state_base_model(file, "base_model", material);
  const Node* adapter = root.find("adapter");
  if (adapter && adapter->is_string() && !adapter->text.empty())
    state_adapter(file, "adapter", material);
  else
    report_lora_without_adapter(file, material);
  std::string_view key;
  const std::string_view trainer = trainer_of(root, &key);
  state_framework(file, "axolotl", trainer, key, material);
}

/// load_model_config() sets every override with setattr: a name that the class does not have is stored, and nobody
/// reads it.
void check_overrides(const ConfigFile& file, Material* material) {
  const Family* family = family_of(*material);
  if (!family) return;
  for (const Setting& s : material->settings) {
    constexpr std::string_view kPrefix = "model_config.";
    if (s.source.file != file.path || !s.name.starts_with(kPrefix)) continue;
    const std::string_view key = std::string_view(s.name).substr(kPrefix.size());
    const ModelConfig* config = material->configs.empty() ? nullptr : &material->configs.back();
    if (config && config->text && is_moe_key(key) && family_reads(*family, key)) {
      material->ignored_keys.push_back({file.path, s.source.line, s.source.key, with_version(*material, "axolotl"), true,
                                        "In " + config->file + ":\n\"" + config->text_path + "\": {\"" + std::string(key) +
                                            "\": " + flow_style(s.value) + "}",
                                        "Axolotl sets it on the outer config, and the language model reads " +
                                            config->text_path + "." + std::string(key)});
      continue;
    }
    const ForeignKey kind = foreign_moe_key(key);
    if (kind == ForeignKey::kNo || family_reads(*family, key)) continue;
    IgnoredKey ignored{file.path, s.source.line, s.source.key, with_version(*material, "axolotl"), true, "", ""};
    ignored.why = "no config class of " + std::string(family->name) +
                  " has this key: Axolotl sets it, and the model never reads it";
    if (kind == ForeignKey::kBalanceLoss && family_reads(*family, "router_aux_loss_coef")) {
      ignored.instead = "model_config:\n  router_aux_loss_coef: " + flow_style(s.value);
    }
    material->ignored_keys.push_back(std::move(ignored));
  }
}

}  // namespace

extern const ConfigReader config_reader_axolotl_config;
const ConfigReader config_reader_axolotl_config{"axolotl", "Axolotl config", recognises, read, "", check_overrides};

}  // namespace moeaudit
