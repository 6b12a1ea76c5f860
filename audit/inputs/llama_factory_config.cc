// LLaMA-Factory's YAML (hiyouga/LLaMA-Factory @ff6d4d12 src/llamafactory/hparams/{model,finetuning,data}_args.py).
// Unknown keys are refused there (unless ALLOW_EXTRA_ARGS=1), so none is silently ignored; moe_aux_loss_coef is, for
// some models.
#include <algorithm>
#include <vector>

#include "audit/families/family.h"
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

/// "all": the leaf names of every class with "Linear" in its name but the head (model_utils/misc.py
/// find_all_linear_modules).
std::optional<Node> all_linear(const Node& n) {
  if (!n.is_string() || n.text != "all") return std::nullopt;
  return bool_node(true, n);
}

constexpr Row kOwnRows[] = {
    {"model_name_or_path", ""},
    {"model_revision", "base_model_revision"},
    {"stage", ""},
    {"finetuning_type", "finetuning_type"},
    {"lora_rank", "r", as_number},
    {"lora_alpha", "lora_alpha", as_number},
    {"lora_dropout", "lora_dropout", as_number},
    {"lora_target", ""},
    {"additional_target", "modules_to_save", comma_list},
    {"use_rslora", "use_rslora"},
    {"cutoff_len", "max_length", as_number},
    {"quantization_bit", ""},
    {"quantization_type", "bnb_4bit_quant_type"},
    {"pure_bf16", ""},
    {"disable_gradient_checkpointing", "gradient_checkpointing", not_bool},
    {"moe_aux_loss_coef", ""},  // after_model, since it depends on the model
    {"use_kt", ""},
    {"use_mca", ""},
};

constexpr std::string_view kMegatronKeys[] = {"tensor_model_parallel_size", "pipeline_model_parallel_size",
                                              "expert_model_parallel_size", "moe_token_dispatcher_type",
                                              "moe_grouped_gemm"};

Match recognises(const Node& root) {
  if (root.find("base_model") || !root.find("model_name_or_path")) return Match::kNo;
  constexpr std::string_view kOwn[] = {"finetuning_type", "stage",     "cutoff_len",
                                       "lora_target",     "lora_rank", "template"};
  return std::any_of(std::begin(kOwn), std::end(kOwn), [&](std::string_view k) { return root.find(k); }) ? Match::kSure
                                                                                                         : Match::kNo;
}

/// The loop that runs. "" is transformers' own (CustomSeq2SeqTrainer and CustomTrainer add nothing to the loss).
std::string_view trainer_of(const Node& root, std::string_view* key) {
  *key = "model_name_or_path";
  for (std::string_view megatron : kMegatronKeys) {
    if (!root.find(megatron)) continue;
    *key = megatron;
    return "McaTrainer";
  }
  if (is_true(root.find("use_mca"))) {
    *key = "use_mca";
    return "McaTrainer";
  }
  if (is_true(root.find("use_kt"))) {  // KTransformers replaces the experts' forward
    *key = "use_kt";
    return "KTrainer";
  }
  const Node* stage = root.find("stage");
  if (!stage || !stage->is_string()) return "";
  *key = "stage";
  if (stage->text == "dpo") return "CustomDPOTrainer";
  if (stage->text == "kto") return "CustomKTOTrainer";
  if (stage->text == "ppo") return "CustomPPOTrainer";
  if (stage->text == "rm") return "PairwiseTrainer";
  return "";
}

void read_adapter(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const Node* type = root.find("finetuning_type");
  const bool adapter = !type || (type->is_string() && (type->text == "lora" || type->text == "oft"));
  if (!adapter) {
    for (UnreadKey& key : take_back_adapter_settings(file, material)) material->unread_keys.push_back(std::move(key));
    return;
  }
  const std::string_view key = type ? "finetuning_type" : "lora_rank";  // lora is the default of the field
  if (!type && !root.find("lora_rank") && !root.find("lora_target")) return;
  const Node& place = type ? *type : root;
  add_setting(file, key, "peft_type", string_node(type && type->text == "oft" ? "OFT" : "LORA", place), material);
  state_adapter(file, key, material);
  const Node* target = root.find("lora_target");
  if (!target) return;
  if (auto all = all_linear(*target)) {
    add_setting(file, "lora_target", "lora_target_linear", std::move(*all), material);
  } else if (auto list = comma_list(*target)) {
    add_setting(file, "lora_target", "target_modules", std::move(*list), material);
  }
}

void read_quantisation(const ConfigFile& file, Material* material) {
  const Node* bits = file.root->find("quantization_bit");
  const auto n = bits ? bits->as_int() : std::nullopt;
  if (n == 4) add_setting(file, "quantization_bit", "load_in_4bit", bool_node(true, *bits), material);
  if (n == 8) add_setting(file, "quantization_bit", "load_in_8bit", bool_node(true, *bits), material);
}

void read(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::span<const Row> shared = training_arguments_rows();
  std::vector<Row> rows(shared.begin(), shared.end());
  rows.insert(rows.end(), std::begin(kOwnRows), std::end(kOwnRows));
  read_rows(file, rows, Unread::kAll, material);
  read_adapter(file, material);
  read_quantisation(file, material);
  if (is_true(root.find("pure_bf16"))) {
    add_setting(file, "pure_bf16", "torch_dtype", string_node("bfloat16", *root.find("pure_bf16")), material);
  }
  state_base_model(file, "model_name_or_path", material);
  std::string_view key;
  const std::string_view trainer = trainer_of(root, &key);
  state_framework(file, "llama-factory", trainer, key, material);
}

bool one_of(std::string_view word, std::span<const std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// model_utils/moe.py configure_moe() @ff6d4d12: the models whose config it touches, by model_type.
constexpr std::string_view kFlagAndCoefficient[] = {"ernie4_5_moe", "granitemoe", "jamba",     "llama4",   "mixtral",
                                                    "olmoe",        "phimoe",     "qwen2_moe", "qwen3_moe"};
constexpr std::string_view kFlagOnly[] = {"dbrx", "glm4v_moe_text"};

/// A coefficient of zero touches nothing (the test is truthiness), so it cannot switch off what the checkpoint has on.
void read_moe_aux_loss_coef(const ConfigFile& file, Material* material) {
  const Node* written = file.root->find("moe_aux_loss_coef");
  if (!written || written->is_null()) return;
  const auto value = as_number(*written)->as_double();
  const std::string type = model_type_of(*material).empty() && family_of(*material)
                               ? std::string(family_of(*material)->model_types[0])
                               : model_type_of(*material);
  const Source place = place_of(file, *file.root, "moe_aux_loss_coef", "moe_aux_loss_coef");
  if (!value || type.empty()) {
    material->unread_keys.push_back({file.path, place.line, place.key});
    return;
  }
  IgnoredKey ignored{file.path, place.line, place.key, with_version(*material, "llamafactory"), true, "", ""};
  if (*value == 0.0) {
    ignored.why =
        "LLaMA-Factory acts on a non-zero value only: 0 leaves the flag and the coefficient of the model's config as "
        "they are";
    material->ignored_keys.push_back(std::move(ignored));
    return;
  }
  const bool both = one_of(type, kFlagAndCoefficient);
  if (both || one_of(type, kFlagOnly)) {
    add_setting(file, place.key, "model_config.output_router_logits", bool_node(true, *written), material);
    if (both) add_setting(file, place.key, "model_config.router_aux_loss_coef", *as_number(*written), material);
    return;
  }
  const VersionSet* versions = version_of(*material, "llamafactory");
  const VersionWindow read_here{Version::parse("0.9.0"), Version::parse("0.9.6")};
  if (!versions || !versions->inside(read_here)) {  // another release may know this model
    material->unread_keys.push_back({file.path, place.line, place.key});
    return;
  }
  ignored.why = "LLaMA-Factory's configure_moe() does nothing for model_type " + type;
  material->ignored_keys.push_back(std::move(ignored));
}

}  // namespace

extern const ConfigReader config_reader_llama_factory_config;
const ConfigReader config_reader_llama_factory_config{
    "llama-factory", "LLaMA-Factory config", recognises, read, "", read_moe_aux_loss_coef};

}  // namespace moeaudit
