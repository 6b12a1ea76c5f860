// What the readers of audit/inputs hand to the resolver (resolve.h): every statement of every file, in one vocabulary, none
// of them weighed yet. A reader knows one format; the resolver knows which word wins.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "audit/facts/fact_sheet.h"
#include "audit/facts/finding.h"
#include "audit/tensors/tensor_store.h"
#include "audit/text/text.h"

namespace moeaudit {

class Trace;

/// One statement: a value under the name that Hugging Face gives it, whatever the framework calls it.
///   training     gradient_accumulation_steps, per_device_train_batch_size, bf16, fp16, bf16_full_eval, tf32,
///                average_tokens_across_devices, label_smoothing_factor, deepspeed, fsdp, gradient_checkpointing,
///                gradient_checkpointing_kwargs, checkpointing_reentrant, max_grad_norm, warmup_steps, warmup_ratio, max_steps, learning_rate,
///                loss_type, use_liger_kernel, packing, trust_remote_code, torch_dtype (dtype the weights are loaded in), max_length (tokens a sequence), world_size
///   adapter      peft_type, r, lora_alpha, lora_dropout, use_rslora, target_modules, target_parameters, exclude_modules,
///                modules_to_save, layers_to_transform, rank_pattern, alpha_pattern, lora_target_linear (Axolotl, bool)
///   model        model_config.<key>: an override of the model's config.json (Axolotl model_config:, TRL router_aux_loss_coef
///                is stated as trl.router_aux_loss_coef, since TRL decides itself what to do with it)
///   engine       deepspeed.<path in its JSON>, deepspeed.read (its settings are here), deepspeed.not_found (it names a file
///                that is not here), accelerate.mixed_precision, accelerate.moe_layer_cls_names, fsdp_version
///   what trains  finetuning_type, freeze_trainable_layers, freeze_trainable_modules, freeze_extra_modules (LLaMA-Factory),
///                unfrozen_parameters (Axolotl), checkpointing_reentrant
///   quantised    load_in_4bit, load_in_8bit, bnb_4bit_quant_type, llm_int8_skip_modules, quantize_moe_experts,
///                quant_method, quant_bits
struct Setting {
  std::string name;
  Node value;
  Source source;
};

struct VersionStatement {
  std::string package;   // normalised: lower case, "-" for "_"
  VersionSet versions;
  Source source;
};

/// config.json of one model.
struct ModelConfig {
  Node root;             // as written
  const Node* text = nullptr;  // the (nested) config that describes the language model: text_config, llm_config, or root
  std::string text_path; // "text_config", or "" for root
  std::string file;
  Role role = Role::kBaseModelConfig;
};

struct Material {
  std::string name;                       // of the run, as given
  std::string framework;                  // "axolotl", "trl", "transformers", "llama-factory", ... ; "" unknown
  Source framework_source;
  std::string trainer;                    // Trainer class: "SFTTrainer", "DPOTrainer", "Trainer"; "" unknown
  Source trainer_source;
  std::vector<Setting> settings;          // weakest word first; a later one of the same name wins
  std::vector<VersionStatement> versions; // weakest first
  std::vector<ModelConfig> configs;       // weakest first: base model, then what the run wrote
  std::string base_model;                 // hub id or path that a config or adapter names
  Source base_model_source;
  bool base_model_found = false;          // its config.json is among `configs`
  bool adapter_seen = false;              // adapter files or an adapter configuration were read
  Source adapter_source;
  LogTable log;                           // trainer_state.json; empty if none
  Source log_source;
  std::int64_t global_step = -1;          // trainer_state.json
  std::vector<WeightProblem> weight_problems;
  std::vector<IgnoredKey> ignored_keys;
  std::string keys_not_compared;          // why unread_keys may hold keys that the framework ignores; "": it has none
  std::vector<UnreadKey> unread_keys;
  std::vector<Suppression> suppressions;  // comments in the files that were read
  TensorStore model, base, adapter, hidden_states;  // base: only where the model under audit has weights of its own
  std::shared_ptr<const Trace> trace, rollout;  // null: none was given
  bool base_asked = false;                // the user gave the base; otherwise it was found under the name that some file has for it
  std::vector<InputFile> inputs;
  std::vector<InputProblem> problems;
};

}  // namespace moeaudit
