// The YAML or JSON of `accelerate config` / `accelerate launch` (huggingface/accelerate @v1.15.0
// commands/config/config_args.py, commands/config/cluster.py, utils/launch.py). The launcher hands its values to the
// trainer through the environment; unknown keys are refused, so none is silently ignored.
#include <vector>

#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

constexpr Row kRows[] = {
    {"distributed_type", ""},
    {"mixed_precision", "accelerate.mixed_precision"},
    {"num_processes", ""},
    {"parallelism_config.parallelism_config_tp_size", ""},
    {"parallelism_config.parallelism_config_cp_size", ""},
    {"parallelism_config.parallelism_config_sp_size", ""},
    // Where the processes run and how they find each other: nothing of it reaches the loss.
    {"compute_environment", ""},
    {"debug", ""},
    {"downcast_bf16", ""},  // on TPUs
    {"enable_cpu_affinity", ""},
    {"gpu_ids", ""},
    {"machine_rank", ""},
    {"main_process_ip", ""},
    {"main_process_port", ""},
    {"main_training_function", ""},
    {"num_machines", ""},
    {"rdzv_backend", ""},
    {"same_network", ""},
    {"tpu_env", ""},
    {"tpu_use_cluster", ""},
    {"tpu_use_sudo", ""},
    {"use_cpu", ""},
};

constexpr Row kDeepSpeedRows[] = {
    {"deepspeed_config.zero_stage", "deepspeed.zero_optimization.stage"},
    {"deepspeed_config.gradient_accumulation_steps", "deepspeed.gradient_accumulation_steps"},
    {"deepspeed_config.gradient_clipping", "deepspeed.gradient_clipping"},
    {"deepspeed_config.deepspeed_config_file", "deepspeed.file"},
    {"deepspeed_config.deepspeed_moe_layer_cls_names", "accelerate.moe_layer_cls_names", comma_list},
};

constexpr Row kFsdpRows[] = {
    {"fsdp_config.fsdp_version", "fsdp_version"},
    {"fsdp_config.fsdp_activation_checkpointing", "accelerate.fsdp_activation_checkpointing"},
};

Match recognises(const Node& root) {
  return root.find("compute_environment") || (root.find("distributed_type") && root.find("num_processes"))
             ? Match::kSure
             : Match::kNo;
}

std::string_view word(const Node& root, std::string_view key) {
  const Node* value = root.find(key);
  return value && value->is_string() ? std::string_view(value->text) : std::string_view();
}

/// num_processes counts all machines; processes of one tensor, context or sequence parallel group see the same batch.
void read_processes(const ConfigFile& file, Material* material) {
  const Node* value = file.root->find("num_processes");
  auto processes = value ? value->as_int() : std::nullopt;
  if (!processes || *processes < 1) return;
  for (const char* key : {"tp", "cp", "sp"}) {
    const Node* size =
        file.root->find_path("parallelism_config.parallelism_config_" + std::string(key) + "_size");
    const auto n = size ? size->as_int() : std::nullopt;
    if (n && *n > 1 && *processes % *n == 0) *processes /= *n;
  }
  Node node = *value;
  node.kind = Node::Kind::kNumber;
  node.text = std::to_string(*processes);
  add_setting(file, "num_processes", "world_size", std::move(node), material);
}

void read(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::string_view kind = word(root, "distributed_type");
  std::vector<Row> rows(std::begin(kRows), std::end(kRows));
  if (kind == "DEEPSPEED") rows.insert(rows.end(), std::begin(kDeepSpeedRows), std::end(kDeepSpeedRows));
  if (kind == "FSDP") rows.insert(rows.end(), std::begin(kFsdpRows), std::end(kFsdpRows));
  read_rows(file, rows, Unread::kAll, material);
  read_processes(file, material);
  const Node* type = root.find("distributed_type");
  if (kind == "FSDP") add_setting(file, "distributed_type", "fsdp", bool_node(true, *type), material);
  if (kind != "DEEPSPEED") return;
  add_setting(file, "distributed_type", "deepspeed", bool_node(true, *type), material);
  // Without a file of its own the plugin builds the JSON from these keys; ZeRO stage 2 unless they say another
  // (accelerate utils/dataclasses.py DeepSpeedPlugin).
  const Node* inside = root.find("deepspeed_config");
  if (inside && inside->is_map() && (inside->find("deepspeed_config_file") || inside->find("zero_stage"))) return;
  Node two = *type;
  two.kind = Node::Kind::kNumber;
  two.text = "2";
  add_setting(file, "distributed_type", "deepspeed.zero_optimization.stage", std::move(two), material);
}

}  // namespace

extern const ConfigReader config_reader_accelerate_config;
const ConfigReader config_reader_accelerate_config{"", "Accelerate config", recognises, read, ""};

}  // namespace moeaudit
