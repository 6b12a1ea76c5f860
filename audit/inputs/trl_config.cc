// YAML of TRL's command line (`trl sft --config FILE`): fields of the trainer's own config, ModelConfig and
// ScriptArguments side by side. huggingface/trl @f2cd5771 trl/trainer/{sft,dpo,grpo,kto,reward}_config.py,
// trl/trainer/model_config.py, trl/scripts/utils.py. An unknown key is refused by TrlParser, so none is ever silently
// ignored.
#include <algorithm>
#include <vector>

#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

constexpr Row kOwnRows[] = {
    {"model_name_or_path", ""},
    {"model_revision", "base_model_revision"},
    {"trust_remote_code", "trust_remote_code"},
    {"packing", "packing"},
    {"use_peft", ""},
    {"lora_r", "r", as_number},
    {"lora_alpha", "lora_alpha", as_number},
    {"lora_dropout", "lora_dropout", as_number},
    {"lora_target_modules", "target_modules"},
    {"lora_target_parameters", "target_parameters"},
    {"lora_modules_to_save", "modules_to_save"},
    {"use_rslora", "use_rslora"},
    {"load_in_4bit", "load_in_4bit"},
    {"load_in_8bit", "load_in_8bit"},
    {"bnb_4bit_quant_type", "bnb_4bit_quant_type"},
    {"dtype", "torch_dtype"},
    {"torch_dtype", "torch_dtype"},  // the name until TRL 0.24
    {"model_init_kwargs.dtype", "torch_dtype"},
    {"model_init_kwargs.torch_dtype", "torch_dtype"},
    {"max_length", "max_length", as_number},
    {"max_seq_length", "max_length", as_number},  // the name until TRL 0.20
    {"loss_type", "loss_type"},
    {"use_vllm", "use_vllm"},
    {"vllm_mode", "vllm_mode"},
    {"vllm_enable_sleep_mode", "vllm_enable_sleep_mode"},
    {"router_aux_loss_coef", "trl.router_aux_loss_coef", as_number},
};

// Fields that only one trainer's config has.
struct Tell {
  std::string_view key, trainer;
};
constexpr Tell kTells[] = {
    {"dataset_text_field", "SFTTrainer"},
    {"packing", "SFTTrainer"},
    {"packing_strategy", "SFTTrainer"},
    {"eval_packing", "SFTTrainer"},
    {"assistant_only_loss", "SFTTrainer"},
    {"completion_only_loss", "SFTTrainer"},
    {"max_seq_length", "SFTTrainer"},
    {"precompute_ref_log_probs", "DPOTrainer"},
    {"f_divergence_type", "DPOTrainer"},
    {"rpo_alpha", "DPOTrainer"},
    {"num_generations", "GRPOTrainer"},
    {"scale_rewards", "GRPOTrainer"},
    {"desirable_weight", "KTOTrainer"},
    {"undesirable_weight", "KTOTrainer"},
    {"center_rewards_coefficient", "RewardTrainer"},
};

Match recognises(const Node& root) {
  for (std::string_view key : {"base_model", "finetuning_type", "stage", "cutoff_len"}) {
    if (root.find(key)) return Match::kNo;  // Axolotl, LLaMA-Factory
  }
  constexpr std::string_view kOwn[] = {"use_peft",   "lora_r",         "lora_target_modules",  "dataset_name",
                                       "lora_alpha", "max_seq_length", "use_bnb_nested_quant", "router_aux_loss_coef"};
  const bool own = std::any_of(std::begin(kOwn), std::end(kOwn), [&](std::string_view k) { return root.find(k); }) ||
                   std::any_of(std::begin(kTells), std::end(kTells), [&](const Tell& t) { return root.find(t.key); });
  const bool training = root.find("model_name_or_path") || count_training_arguments(root) >= 2;
  return own && training ? Match::kSure : Match::kNo;
}

void read(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::span<const Row> shared = training_arguments_rows();
  std::vector<Row> rows(shared.begin(), shared.end());
  rows.insert(rows.end(), std::begin(kOwnRows), std::end(kOwnRows));
  read_rows(file, rows, Unread::kAll, material);
  state_base_model(file, "model_name_or_path", material);
  if (is_true(root.find("use_peft"))) {
    add_setting(file, "use_peft", "peft_type", string_node("LORA", *root.find("use_peft")), material);
    state_adapter(file, "use_peft", material);
  } else {
    for (UnreadKey& key : take_back_adapter_settings(file, material)) material->unread_keys.push_back(std::move(key));
  }
  const Tell* tell = nullptr;
  bool one = true;
  for (const Tell& t : kTells) {
    if (!root.find(t.key)) continue;
    one = one && (!tell || tell->trainer == t.trainer);
    tell = &t;
  }
  const bool known = tell && one;
  state_framework(file, "trl", known ? tell->trainer : "", known ? tell->key : "model_name_or_path", material);
}

}  // namespace

extern const ConfigReader config_reader_trl_config;
const ConfigReader config_reader_trl_config{"trl", "TRL config", recognises, read, ""};

}  // namespace moeaudit
