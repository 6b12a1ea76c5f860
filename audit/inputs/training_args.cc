// training_args.bin: the TrainingArguments (or SFTConfig, AxolotlTrainingArguments, ...) that the Trainer really ran
// with, as plain nodes of the inert pickle reader. The class tells who trained. It holds every field, so only unread
// ones that say something are listed.
#include <charconv>
#include <cmath>
#include <filesystem>

#include "audit/inputs/pickle.h"
#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

constexpr Row kRows[] = {
    {"gradient_accumulation_steps", "gradient_accumulation_steps"},
    {"per_device_train_batch_size", "per_device_train_batch_size"},
    {"bf16", "bf16"},
    {"fp16", "fp16"},
    {"bf16_full_eval", "bf16_full_eval"},
    {"tf32", "tf32"},
    {"average_tokens_across_devices", "average_tokens_across_devices"},
    {"label_smoothing_factor", "label_smoothing_factor"},
    {"deepspeed", "deepspeed", nullptr, true},
    {"deepspeed_plugin", "deepspeed"},  // set when `accelerate launch` brings DeepSpeed in and `deepspeed` stays None
    {"hf_deepspeed_config.config", "deepspeed"},  // its JSON as it ran, "auto" filled in
    {"fsdp", "fsdp"},
    {"fsdp_config.version", "fsdp_version"},
    {"fsdp_config.fsdp_version", "fsdp_version"},
    {"gradient_checkpointing", "gradient_checkpointing"},
    {"gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs"},
    {"use_liger_kernel", "use_liger_kernel"},
    {"packing", "packing"},
    {"max_grad_norm", "max_grad_norm"},
    {"warmup_steps", "warmup_steps"},
    {"warmup_ratio", "warmup_ratio"},
    {"max_steps", "max_steps"},
    {"learning_rate", "learning_rate"},
    {"loss_type", "loss_type"},
    {"use_vllm", "use_vllm"},
    {"vllm_mode", "vllm_mode"},
    {"vllm_enable_sleep_mode", "vllm_enable_sleep_mode"},
    {"max_length", "max_length"},
    {"max_seq_length", "max_length"},  // SFTConfig until TRL 0.20
    {"model_init_kwargs.dtype", "torch_dtype"},
    {"model_init_kwargs.torch_dtype", "torch_dtype"},
    {"router_aux_loss_coef", "trl.router_aux_loss_coef"},
    {"distributed_state.num_processes", "world_size"},  // TrainingArguments.world_size
};

Node number(std::string text) {
  Node n;
  n.kind = Node::Kind::kNumber;
  n.text = std::move(text);
  return n;
}

Node real(double v) {
  if (std::isnan(v)) return number("NaN");
  if (std::isinf(v)) return number(v > 0 ? "Infinity" : "-Infinity");
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, v).ptr;
  return number(std::string(buffer, end));
}

constexpr int kMaxDepth = 32;
constexpr int kMaxNodes = 100'000;

/// Memoised objects are shared in a pickle, and may contain themselves: the tree made of them is bounded.
class ToNode {
 public:
  Node make(const PickleNode& p, int depth = 0) {
    using Kind = PickleNode::Kind;
    Node n;
    if (depth > kMaxDepth || ++count_ > kMaxNodes) return n;
    switch (p.kind) {
      case Kind::kNone: break;
      case Kind::kBool:
        n.kind = Node::Kind::kBool;
        n.boolean = p.boolean;
        break;
      case Kind::kInt: return number(std::to_string(p.integer));
      case Kind::kFloat: return real(p.real);
      case Kind::kString:
      case Kind::kBytes:
      case Kind::kGlobal:
        n.kind = Node::Kind::kString;
        n.text = p.text;
        break;
      case Kind::kList:
      case Kind::kTuple:
      case Kind::kSet: list(p, depth, &n); break;
      case Kind::kDict: map(p, depth, &n); break;
      case Kind::kObject:
        // An enum member is its class called with the value: SchedulerType("constant").
        if (p.entries.empty() && p.items.size() == 1 && p.items[0]) return make(*p.items[0], depth + 1);
        map(p, depth, &n);
        break;
    }
    return n;
  }

 private:
  void list(const PickleNode& p, int depth, Node* n) {
    n->kind = Node::Kind::kList;
    for (const auto& item : p.items) {
      if (item) n->items.push_back(make(*item, depth + 1));
    }
  }
  void map(const PickleNode& p, int depth, Node* n) {
    n->kind = Node::Kind::kMap;
    for (const auto& [key, value] : p.entries) {
      if (!key || !value) continue;
      Node k = make(*key, depth + 1);
      n->keys.push_back(std::move(k.text));
      n->key_lines.push_back(0);
      n->items.push_back(make(*value, depth + 1));
    }
  }
  int count_ = 0;
};

struct Owner {
  std::string_view prefix;  // of the class's dotted name
  std::string_view framework;
};
constexpr Owner kOwners[] = {
    {"trl.", "trl"},        {"axolotl.", "axolotl"}, {"llamafactory.", "llama-factory"},
    {"swift.", "ms-swift"}, {"unsloth", "unsloth"},  {"Unsloth", "unsloth"},
};

/// "SFTConfig" -> "SFTTrainer"; "AxolotlDPOConfig", "UnslothSFTConfig" likewise. "" for TrainingArguments of any kind.
std::string trainer_of(std::string_view class_name) {
  for (std::string_view brand : {"Axolotl", "Unsloth"}) {
    if (class_name.starts_with(brand)) class_name.remove_prefix(brand.size());
  }
  constexpr std::string_view kConfig = "Config";
  if (!class_name.ends_with(kConfig) || class_name == kConfig) return {};
  return std::string(class_name.substr(0, class_name.size() - kConfig.size())) + "Trainer";
}

/// A config file that was recognised outranks transformers' plain class, which LLaMA-Factory and older Axolotl run with
/// too; a class that belongs to a framework, or to the user's own script, outranks what a config file looks like.
void state_class(const std::string& path, std::string_view full_name, Material* material) {
  const std::size_t dot = full_name.rfind('.');
  const std::string_view module = full_name.substr(0, dot == std::string_view::npos ? 0 : dot);
  const std::string_view name = full_name.substr(dot == std::string_view::npos ? 0 : dot + 1);
  Source source;
  source.role = Role::kTrainingArguments;
  source.file = path;
  source.key = std::string(full_name);
  const bool plain = module.starts_with("transformers.");
  std::string framework = plain ? "transformers" : std::string(full_name);
  bool owned = false;
  for (const Owner& o : kOwners) {
    if (!full_name.starts_with(o.prefix)) continue;
    framework = o.framework;
    owned = true;
  }
  const bool config_knows = !material->framework.empty() && material->framework != "transformers";
  if (!owned && config_knows) return;
  std::string trainer = plain && name == "Seq2SeqTrainingArguments" ? "Seq2SeqTrainer" : plain ? "Trainer" : "";
  if (owned) trainer = trainer_of(name);
  if (trainer.empty() && framework == material->framework) trainer = material->trainer;
  if (trainer.empty() && framework == "llama-factory") trainer = "LLaMA-Factory trainer of an unknown stage";
  material->framework = framework;
  material->framework_source = source;
  material->trainer = std::move(trainer);
  material->trainer_source = std::move(source);
}

}  // namespace

void read_training_args(const std::string& path, Material* material) {
  auto fail = [&](std::string why) {
    material->problems.push_back(
        {path, 0, 0, "training_args.bin could not be read: " + why + "; facts from it are unknown",
         "give the training config with --config FILE, or state what it says with --assume, --world-size", false});
  };
  std::error_code ec;
  if (const auto size = std::filesystem::file_size(path, ec); !ec && size == 0) return fail("it is empty (0 bytes)");
  std::shared_ptr<PickleNode> pickle;
  std::string error;
  if (!read_torch_pickle(path, &pickle, &error)) {
    const std::string place = path + ": ";
    return fail(error.starts_with(place) ? error.substr(place.size()) : error);
  }
  if (!pickle || pickle->kind != PickleNode::Kind::kObject) return fail("it holds no TrainingArguments object");
  const Node root = ToNode().make(*pickle);
  if (!root.is_map()) return fail("the object " + pickle->text + " has no fields");
  state_class(path, pickle->text, material);
  read_rows({path, Role::kTrainingArguments, &root}, kRows, Unread::kNonEmpty, material);
}

}  // namespace moeaudit
