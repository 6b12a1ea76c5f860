// LLaMA-Factory's YAML or JSON (hiyouga/LLaMA-Factory src/llamafactory/hparams/{model,finetuning,data}_args.py, read at
// 0.7.1 to 0.9.5). What its loader then does to the model depends on the release: audit/behaviours/llama_factory.yaml.
// Unknown keys are refused there (ValueError of HfArgumentParser.parse_dict), or ignored under ALLOW_EXTRA_ARGS=1.
#include <algorithm>
#include <vector>

#include "audit/behaviours/behaviour.h"
#include "audit/families/family.h"
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

constexpr Row kOwnRows[] = {
    {"model_name_or_path", ""},
    {"model_revision", "base_model_revision"},
    {"trust_remote_code", "trust_remote_code"},
    {"packing", "packing"},
    {"neat_packing", ""},
    {"flash_attn", ""},
    {"stage", ""},
    {"finetuning_type", "finetuning_type"},
    {"lora_rank", "r", as_number},
    {"lora_alpha", "lora_alpha", as_number},
    {"lora_dropout", "lora_dropout", as_number},
    {"lora_target", ""},
    {"freeze_trainable_layers", "freeze_trainable_layers", as_number},
    {"freeze_trainable_modules", "freeze_trainable_modules", comma_list},
    {"freeze_extra_modules", "freeze_extra_modules", comma_list},
    {"use_llama_pro", "use_llama_pro"},
    {"additional_target", "modules_to_save", comma_list},
    {"use_rslora", "use_rslora"},
    {"cutoff_len", "max_length", as_number},
    {"quantization_bit", ""},
    {"quantization_method", ""},
    {"quantization_type", "bnb_4bit_quant_type"},
    {"infer_dtype", ""},  // of the loaded weights outside training
    {"pure_bf16", ""},
    {"disable_gradient_checkpointing", "gradient_checkpointing", not_bool},
    {"use_reentrant_gc", "checkpointing_reentrant"},
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

/// The loop that runs. "" is transformers' own (CustomSeq2SeqTrainer and CustomTrainer add nothing to the loss, unless a
/// loss function of their own replaces the model's).
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
  constexpr std::string_view kLosses[] = {"use_dft_loss", "use_eaft_loss", "use_asft_loss"};
  for (std::string_view loss : kLosses) {  // train/sft/trainer.py: compute_loss_func takes the logits alone
    if (!is_true(root.find(loss))) continue;
    *key = loss;
    return "CustomSeq2SeqTrainer with a loss of its own";
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
  // lora is the default of finetuning_type, and all of lora_target.
  const std::string_view key = type ? "finetuning_type" : root.find("lora_rank") ? "lora_rank" : "lora_target";
  if (!type && !root.find(key)) return;
  const Node& place = *root.find(key);
  const bool oft = type && type->text == "oft";
  add_setting(file, key, "peft_type", string_node(oft ? "OFT" : "LORA", place), material);
  state_adapter(file, key, material);
  const Node* target = root.find(oft ? "oft_target" : "lora_target");
  const auto list = target ? comma_list(*target) : std::nullopt;
  if (!target || (list && list->items.size() == 1 && list->items[0].is_string() && list->items[0].text == "all")) {
    add_setting(file, target ? "lora_target" : key, "lora_target_linear", bool_node(true, target ? *target : place), material);
    material->settings.back().source.key = "lora_target";  // by default, where the key is not there
  } else if (list) {
    add_setting(file, "lora_target", "target_modules", *list, material);
  }
}

/// Quantised on the fly. A base that is quantised already keeps its own, whatever these keys say
/// (model_utils/quantization.py), and only adapters train on either.
void read_quantisation(const ConfigFile& file, Material* material) {
  const Node* bits = file.root->find("quantization_bit");
  const auto n = bits ? as_number(*bits)->as_int() : std::nullopt;
  if (!n || *n < 1) return;
  const Node* method = file.root->find("quantization_method");
  const std::string_view name = method && method->is_string() ? std::string_view(method->text) : "bnb";
  if (name == "bnb" || name == "bitsandbytes") {
    if (*n == 4) add_setting(file, "quantization_bit", "load_in_4bit", bool_node(true, *bits), material);
    if (*n == 8) add_setting(file, "quantization_bit", "load_in_8bit", bool_node(true, *bits), material);
    if (*n == 4 && !file.root->find("quantization_type"))
      add_setting(file, "quantization_bit", "bnb_4bit_quant_type", string_node("nf4", *bits), material);
  } else if (name == "hqq" || name == "eetq") {
    add_setting(file, "quantization_method", "quant_method", *method, material);
    add_setting(file, "quantization_bit", "quant_bits", *as_number(*bits), material);
  }
}

constexpr std::string_view kKeyList = "llamafactory";  // audit/behaviours/llamafactory_keys.yaml

/// HfArgumentParser.parse_dict() raises ValueError at a key that no dataclass has.
void sort_out_unknown(const ConfigFile& file, std::size_t first_unread, Material* material) {
  const VersionSet* versions = version_of(*material, "llamafactory");
  const bool megatron = file.root->find("use_mca") ||
                        std::any_of(std::begin(kMegatronKeys), std::end(kMegatronKeys),
                                    [&](std::string_view k) { return file.root->find(k); });
  if (megatron || !has_key_list("llamafactory", kKeyList, versions)) return;  // mcore_adapter brings keys of its own
  auto& unread = material->unread_keys;
  for (std::size_t i = first_unread; i < unread.size();) {
    const UnreadKey& key = unread[i];
    if (key.key.find('.') != std::string::npos || !key_unknown("llamafactory", kKeyList, key.key, versions)) {
      ++i;
      continue;
    }
    IgnoredKey ignored{file.path, key.line, key.key, with_version(*material, "llamafactory"), is_moe_key(key.key), "", ""};
    ignored.why = "none of its arguments has this name: it refuses to start, and under ALLOW_EXTRA_ARGS=1 does nothing with it";
    const Node* value = file.root->find(key.key);
    if (foreign_moe_key(key.key) == ForeignKey::kBalanceLoss || key.key == "router_aux_loss_coef") {
      ignored.instead = "moe_aux_loss_coef: " + (value && value->is_number() ? value->text : std::string("0.001"));
    }
    material->ignored_keys.push_back(std::move(ignored));
    unread.erase(unread.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

/// data_args.py: neat_packing packs, too; collator.py then builds a 4-D mask unless the attention is FlashAttention-2.
void read_packing(const ConfigFile& file, Material* material) {
  const Node* neat = file.root->find("neat_packing");
  const Node* attention = file.root->find("flash_attn");
  const std::string_view key = neat ? "neat_packing" : "model_name_or_path";
  const Node& place = *file.root->find(key);
  const bool packs = is_true(neat);
  if (packs) add_setting(file, key, "packing", bool_node(true, place), material);
  const bool fa2 = attention && attention->is_string() && attention->text == "fa2";
  add_setting(file, key, "block_diagonal_mask", bool_node(packs && !fa2, place), material);
}

void read(const ConfigFile& file, Material* material) {
  const Node& root = *file.root;
  const std::span<const Row> shared = training_arguments_rows();
  std::vector<Row> rows(shared.begin(), shared.end());
  rows.insert(rows.end(), std::begin(kOwnRows), std::end(kOwnRows));
  const std::size_t first_unread = material->unread_keys.size();
  read_rows(file, rows, Unread::kAll, material);
  sort_out_unknown(file, first_unread, material);
  read_adapter(file, material);
  read_quantisation(file, material);
  read_packing(file, material);
  if (is_true(root.find("pure_bf16"))) {
    add_setting(file, "pure_bf16", "torch_dtype", string_node("bfloat16", *root.find("pure_bf16")), material);
  }
  state_base_model(file, "model_name_or_path", material);
  std::string_view key;
  const std::string_view trainer = trainer_of(root, &key);
  state_framework(file, "llama-factory", trainer, key, material);
}

/// model_utils/moe.py configure_moe(): what it does to the config of this model, at the releases this run may use.
void configure_moe(const ConfigFile& file, Material* material) {
  const bool nested = !material->configs.empty() && material->configs.back().text;
  std::string type = model_type_of(*material);
  if (type.empty() && family_of(*material)) type = family_of(*material)->model_types[0];
  const VersionSet* versions = version_of(*material, "llamafactory");
  auto answer = [&](std::string_view topic) {
    BehaviourQuery query{"llamafactory", topic, {{"nested", nested ? "true" : "false"}}};
    if (!type.empty()) query.subject.emplace_back("model_type", type);
    return ask(query, versions);
  };
  const BehaviourAnswer unasked = answer("switches_router_logits_on");
  if (unasked.value == "true") {
    Source source;
    source.role = Role::kBehaviourTable;
    source.cite = unasked.cite;
    material->settings.push_back({"model_config.output_router_logits", bool_node(true, *file.root), std::move(source)});
  }
  const Node* written = file.root->find("moe_aux_loss_coef");
  if (!written || written->is_null()) return;
  const Source place = place_of(file, *file.root, "moe_aux_loss_coef", "moe_aux_loss_coef");
  const auto number = as_number(*written);
  const auto value = number->as_double();
  const BehaviourAnswer effect = answer("moe_aux_loss_coef");
  const BehaviourAnswer zero = answer("moe_aux_loss_coef_zero");
  if (!value || !effect.value || (*value == 0.0 && !zero.value)) {
    material->unread_keys.push_back({file.path, place.line, place.key});
    return;
  }
  IgnoredKey ignored{file.path, place.line, place.key, with_version(*material, "llamafactory"), true, "", ""};
  if (*effect.value == "none") {
    ignored.why = "its configure_moe() does nothing for " + std::string(nested ? "a text_config of " : "") + "model_type " + type;
    material->ignored_keys.push_back(std::move(ignored));
  } else if (*value == 0.0 && *zero.value == "ignored") {
    ignored.why = "it acts on a value other than zero only: 0 leaves flag and coefficient of the model's config as they are";
    material->ignored_keys.push_back(std::move(ignored));
  } else {
    if (*value != 0.0) add_setting(file, place.key, "model_config.output_router_logits", bool_node(true, *written), material);
    if (*effect.value == "flag and coefficient")
      add_setting(file, place.key, "model_config.router_aux_loss_coef", *number, material);
  }
}

}  // namespace

extern const ConfigReader config_reader_llama_factory_config;
const ConfigReader config_reader_llama_factory_config{
    "llama-factory", "LLaMA-Factory config", recognises, read, "", configure_moe};

}  // namespace moeaudit
