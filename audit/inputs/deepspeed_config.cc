// DeepSpeed's JSON, as a file or as the dict in `deepspeed:` of a training config (deepspeedai/DeepSpeed @v0.19.5
// runtime/config.py, runtime/zero/config.py, runtime/zero/leaf_module_config.py). "auto" is filled in by transformers
// from TrainingArguments (integrations/deepspeed.py) and says nothing of its own.
#include <algorithm>

#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

constexpr Row kRows[] = {
    {"train_micro_batch_size_per_gpu", "deepspeed.train_micro_batch_size_per_gpu"},
    {"gradient_accumulation_steps", "deepspeed.gradient_accumulation_steps"},
    {"train_batch_size", "deepspeed.train_batch_size"},
    {"gradient_clipping", "deepspeed.gradient_clipping"},
    {"optimizer.params.lr", "deepspeed.optimizer.params.lr"},
    {"fp16.enabled", "deepspeed.fp16.enabled"},
    {"bf16.enabled", "deepspeed.bf16.enabled"},
    {"bfloat16.enabled", "deepspeed.bf16.enabled"},  // the older name
    {"torch_autocast.enabled", "deepspeed.torch_autocast.enabled"},
    {"torch_autocast.dtype", "deepspeed.torch_autocast.dtype"},
    {"zero_optimization.stage", "deepspeed.zero_optimization.stage"},
    {"zero_optimization.leaf_module.classes", "deepspeed.leaf_module.classes"},
    {"zero_optimization.leaf_module.names", "deepspeed.leaf_module.names"},
    {"zero_optimization.leaf_module.name_suffixes", "deepspeed.leaf_module.name_suffixes"},
};

Match recognises(const Node& root) {
  constexpr std::string_view kOwn[] = {"zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer",
                                       "steps_per_print", "wall_clock_breakdown"};
  return std::any_of(std::begin(kOwn), std::end(kOwn), [&](std::string_view k) { return root.find(k); }) ? Match::kSure
                                                                                                         : Match::kNo;
}

void read(const ConfigFile& file, Material* material) { read_deepspeed(file, "", material); }

}  // namespace

void read_deepspeed(const ConfigFile& file, std::string_view key, Material* material) {
  const std::size_t first = material->settings.size();
  const std::size_t first_unread = material->unread_keys.size();
  // A file that a program wrote (training_args.bin) holds every default.
  read_rows(file, kRows, file.role == Role::kTrainingConfig ? Unread::kAll : Unread::kNonEmpty, material);
  Source here;
  here.role = file.role;
  here.file = file.path;
  here.line = file.root->line;
  here.key = std::string(key);
  material->settings.push_back({"deepspeed.read", bool_node(true, *file.root), std::move(here)});
  if (key.empty()) return;
  const std::string inside = std::string(key) + ".";
  for (std::size_t i = first; i + 1 < material->settings.size(); ++i) material->settings[i].source.key.insert(0, inside);
  for (std::size_t i = first_unread; i < material->unread_keys.size(); ++i)
    material->unread_keys[i].key.insert(0, inside);
}

extern const ConfigReader config_reader_deepspeed_config;
const ConfigReader config_reader_deepspeed_config{"", "DeepSpeed config", recognises, read, ""};

}  // namespace moeaudit
