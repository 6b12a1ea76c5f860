// Config files that belong to a training run and that moe-audit knows by sight but does not read: it says so, and names
// what the user can state instead.
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

Match recognises(const Node& root) {
  const bool accelerate =
      root.find("compute_environment") || (root.find("distributed_type") && root.find("num_processes"));
  const bool deepspeed = root.find("zero_optimization") || root.find("train_micro_batch_size_per_gpu");
  const bool torchtune = root.find_path("model._component_") || root.find_path("tokenizer._component_");
  return accelerate || deepspeed || torchtune ? Match::kSure : Match::kNo;
}

}  // namespace

extern const ConfigReader config_reader_other_configs;
const ConfigReader config_reader_other_configs{
    "", "launcher or engine config (Accelerate, DeepSpeed, torchtune)", recognises, nullptr,
    "state the number of processes with --world-size N, and give the trainer's own config with --config FILE"};

}  // namespace moeaudit
