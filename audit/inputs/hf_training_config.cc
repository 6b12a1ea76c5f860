// TrainingArguments as YAML or JSON: what transformers' HfArgumentParser reads (parse_yaml_file, parse_json_file), and
// the rows that every framework built on TrainingArguments shares.
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

constexpr Row kRows[] = {
    {"gradient_accumulation_steps", "gradient_accumulation_steps", as_number},
    {"per_device_train_batch_size", "per_device_train_batch_size", as_number},
    {"bf16", "bf16"},
    {"fp16", "fp16"},
    {"bf16_full_eval", "bf16_full_eval"},
    {"tf32", "tf32"},
    {"average_tokens_across_devices", "average_tokens_across_devices"},
    {"label_smoothing_factor", "label_smoothing_factor", as_number},
    {"deepspeed", "deepspeed"},
    {"fsdp", "fsdp"},
    {"fsdp_config.version", "fsdp_version"},
    {"fsdp_config.fsdp_version", "fsdp_version"},
    {"gradient_checkpointing", "gradient_checkpointing"},
    {"gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs"},
    {"use_liger_kernel", "use_liger_kernel"},
    {"max_grad_norm", "max_grad_norm", as_number},
    {"warmup_steps", "warmup_steps", as_number},
    {"warmup_ratio", "warmup_ratio", as_number},
    {"max_steps", "max_steps", as_number},
    {"learning_rate", "learning_rate", as_number},
};

// Keys by which people write TrainingArguments; two of them make a file one of its kind.
constexpr std::string_view kTellTale[] = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "lr_scheduler_type",
    "output_dir",
    "logging_steps",
    "save_steps",
    "max_steps",
    "bf16",
    "fp16",
    "warmup_ratio",
    "gradient_checkpointing",
};

Match recognises(const Node& root) { return count_training_arguments(root) >= 2 ? Match::kGeneric : Match::kNo; }

void read(const ConfigFile& file, Material* material) {
  static constexpr Row kOwn[] = {{"model_name_or_path", ""}, {"torch_dtype", "torch_dtype"}, {"dtype", "torch_dtype"}};
  std::vector<Row> rows(std::begin(kRows), std::end(kRows));
  rows.insert(rows.end(), std::begin(kOwn), std::end(kOwn));
  read_rows(file, rows, Unread::kAll, material);
  state_base_model(file, "model_name_or_path", material);
  state_framework(file, "transformers", "", "", material);
}

}  // namespace

std::span<const Row> training_arguments_rows() { return kRows; }

int count_training_arguments(const Node& root) {
  int n = 0;
  for (std::string_view key : kTellTale) n += root.find(key) != nullptr;
  return n;
}

extern const ConfigReader config_reader_hf_training_config;
const ConfigReader config_reader_hf_training_config{"transformers", "TrainingArguments file", recognises, read, ""};

}  // namespace moeaudit
