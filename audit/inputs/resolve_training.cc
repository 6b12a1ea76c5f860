// The training: who trains, what is trained, batch and accumulation, precision, quantisation, adapter configuration.
#include <algorithm>
#include <cmath>

#include "audit/inputs/resolve_parts.h"

namespace moeaudit {
namespace {

void resolve_trainer(Resolver& r) {
  FactSheet& f = r.facts;
  const Material& m = r.material;
  if (!m.framework.empty()) f.framework.set(m.framework, Origin::kStated, m.framework_source);
  if (!m.trainer.empty()) {
    f.trainer.set(m.trainer, Origin::kStated, m.trainer_source);
  } else if (m.framework == "axolotl" || m.framework == "transformers" || m.framework == "llama-factory") {
    // Axolotl and LLaMA-Factory run their own Trainer subclasses for SFT; the loop and the loss are Trainer's.
    f.trainer.set("Trainer", Origin::kDerived, m.framework_source);
  }
}

/// PEFT takes one layer or a list of them.
std::optional<std::vector<std::int64_t>> node_ints(const Node& n) {
  if (const auto one = node_int(n)) return std::vector<std::int64_t>{*one};
  if (!n.is_list()) return std::nullopt;
  std::vector<std::int64_t> out;
  for (const Node& item : n.items) {
    if (const auto v = node_int(item)) out.push_back(*v);
  }
  return out;
}

/// {"w1": 4} -> "w1=4", in the order of the file: the first pattern that matches counts.
template <auto convert>
std::optional<std::vector<std::string>> node_pattern(const Node& n) {
  if (!n.is_map()) return std::nullopt;
  std::vector<std::string> out;
  for (std::size_t i = 0; i < n.keys.size(); ++i) {
    if (const auto v = convert(n.items[i])) out.push_back(n.keys[i] + "=" + to_text(*v));
  }
  return out;
}

/// What makes base + scale B A the wrong sum: DoRA rescales it, and these initialisations change the base weights themselves.
void resolve_variant(Resolver& r) {
  const Setting* dora = r.last("use_dora");
  const Setting* init = r.last("init_lora_weights");
  const Setting* stated = dora ? dora : init;
  if (!stated) return;
  std::string variant = "lora";
  if (init && init->value.is_string() && init->value.text != "gaussian" && init->value.text != "orthogonal" && init->value.text != "eva") {
    variant = init->value.text;
    stated = init;
  }
  if (dora && node_bool(dora->value).value_or(false)) variant = "dora";
  r.facts.adapter_variant.set(std::move(variant), Origin::kStated, stated->source);
}

void resolve_adapter(Resolver& r) {
  FactSheet& f = r.facts;
  const Setting* kind = r.last("peft_type");
  if (r.material.adapter_seen) {
    f.has_adapter.set(true, Origin::kStated, r.material.adapter_source);
  } else if (r.training_known()) {
    // A trainer's own files or config were read and none of them speaks of an adapter.
    f.has_adapter.set(false, Origin::kAbsent, r.material.framework_source);
  }
  r.apply(f.adapter_rank, "r", node_int);
  r.apply(f.adapter_alpha, "lora_alpha", node_double);
  r.apply(f.adapter_rslora, "use_rslora", node_bool);
  r.apply(f.adapter_dropout, "lora_dropout", node_double);
  r.apply(f.target_modules, "target_modules", node_strings);
  r.apply(f.target_parameters, "target_parameters", node_strings);
  r.apply(f.exclude_modules, "exclude_modules", node_strings);
  r.apply(f.modules_to_save, "modules_to_save", node_strings);
  r.apply(f.exclude_modules_is_pattern, "exclude_modules", [](const Node& n) -> std::optional<bool> {
    if (n.is_null()) return std::nullopt;
    return n.is_string();
  });
  r.apply(f.layers_to_transform, "layers_to_transform", node_ints);
  r.apply(f.rank_pattern, "rank_pattern", node_pattern<node_int>);
  r.apply(f.alpha_pattern, "alpha_pattern", node_pattern<node_double>);
  resolve_variant(r);
  r.apply(f.target_modules_is_pattern, "target_modules", [](const Node& n) -> std::optional<bool> {
    if (n.is_null()) return std::nullopt;
    return n.is_string();
  });
  // Axolotl collects the leaf names of every class with "Linear" in its name (loaders/adapter.py find_all_linear_names).
  const Setting* linear = r.last("lora_target_linear");
  const bool modules_said = f.target_modules.known() && !f.target_modules.value().empty();
  if (linear && node_bool(linear->value).value_or(false) && !modules_said) {
    f.target_modules.set({"all-linear"}, Origin::kStated, linear->source);
    f.target_modules_is_pattern.set(true, Origin::kStated, linear->source);
  }
  if (!f.has_adapter.known() || !f.has_adapter.value()) return;
  if (r.material.framework == "llama-factory") {
    r.apply_default(f.adapter_rank, "llamafactory", "lora_rank");
    if (f.adapter_rank.known()) {  // alpha is 2 x rank where it is not given; PEFT's default would be wrong
      Source source = r.material.framework_source;
      source.cite = "LLaMA-Factory src/llamafactory/hparams/finetuning_args.py@v0.9.5:568";
      f.adapter_alpha.set_if_unknown(2.0 * static_cast<double>(f.adapter_rank.value()), Origin::kFrameworkDefault, source);
    }
  }
  if (r.material.framework == "ms-swift") {
    r.apply_default(f.adapter_rank, "ms-swift", "lora_rank");
    r.apply_default(f.adapter_alpha, "ms-swift", "lora_alpha");
    r.apply_default(f.adapter_dropout, "ms-swift", "lora_dropout");
  }
  r.apply_default(f.adapter_rank, "peft", "r");
  r.apply_default(f.adapter_alpha, "peft", "lora_alpha");
  r.apply_default(f.adapter_dropout, "peft", "lora_dropout");
  r.apply_default(f.adapter_rslora, "peft", "use_rslora");
  const bool lora = !kind || !kind->value.is_string() || kind->value.text == "LORA" || kind->value.text == "lora" ||
                    kind->value.text == "qlora";
  if (!lora) f.method.set(Method::kOtherAdapter, Origin::kStated, kind->source);
}

/// Sleep mode acts in colocate mode only, which is the default since TRL 1.0 (server before).
void resolve_vllm(Resolver& r) {
  Fact<bool>& sleeps = r.facts.vllm_sleeps;
  const Setting *sleep = r.last("vllm_enable_sleep_mode"), *use = r.last("use_vllm"), *mode = r.last("vllm_mode");
  const bool asked = sleep && node_bool(sleep->value) == true;
  if (!asked || !use || node_bool(use->value) != true) {
    if (sleep) sleeps.set(false, Origin::kStated, sleep->source);
    else if (r.material.framework == "trl") sleeps.set(false, Origin::kAbsent, r.material.framework_source);
  } else if (mode) {
    sleeps.set(node_string(mode->value) == "colocate", Origin::kStated, sleep->source);
  } else {
    sleeps.explain_unknown("vllm_mode is not stated: colocate is the default since TRL 1.0, server before");
  }
}

void resolve_batches(Resolver& r) {
  FactSheet& f = r.facts;
  r.apply(f.accumulation, "gradient_accumulation_steps", node_int);
  r.apply(f.micro_batch, "per_device_train_batch_size", node_int);
  r.apply(f.sequence_length, "max_length", node_int);
  r.apply(f.world_size, "world_size", node_int);
  r.apply(f.average_tokens, "average_tokens_across_devices", node_bool);
  r.apply(f.label_smoothing, "label_smoothing_factor", node_double);
  r.apply(f.packing, "packing", node_bool);
  r.apply(f.block_diagonal_mask, "block_diagonal_mask", node_bool);
  r.apply(f.use_liger_kernel, "use_liger_kernel", node_bool);
  r.apply(f.loss_type, "loss_type", node_string);
  resolve_vllm(r);
  r.apply(f.trust_remote_code, "trust_remote_code", node_bool);
  r.apply(f.deepspeed, "deepspeed", [](const Node& n) -> std::optional<bool> {
    if (n.is_null()) return false;
    if (n.kind == Node::Kind::kBool) return n.boolean;
    return !(n.is_string() && n.text.empty());
  });
  if (!f.deepspeed.known()) r.apply(f.deepspeed, "deepspeed.read", node_bool);  // its JSON was given beside the config
  Source cli;
  cli.role = Role::kCommandLine;
  if (r.options.world_size > 0) {
    cli.key = "--world-size";
    f.world_size.set(r.options.world_size, Origin::kAssumed, cli);
  }
  if (r.options.sequence_length > 0) {
    cli.key = "--sequence-length";
    f.sequence_length.set(r.options.sequence_length, Origin::kAssumed, cli);
  }
  if (r.training_known()) {
    const std::string_view package = r.material.framework == "axolotl" ? "axolotl" : "transformers";
    r.apply_default(f.accumulation, package, "gradient_accumulation_steps");
    r.apply_default(f.micro_batch, package, package == "axolotl" ? "micro_batch_size" : "per_device_train_batch_size");
    const BehaviourAnswer forced = r.material.framework == "axolotl"
                                       ? r.ask_about("axolotl", "average_tokens_across_devices")
                                       : BehaviourAnswer{};
    if (forced.value) f.average_tokens.set(*forced.value == "true", Origin::kFrameworkDefault, source_of(forced));
    r.apply_default(f.average_tokens, "transformers", "average_tokens_across_devices");
    r.apply_default(f.label_smoothing, "transformers", "label_smoothing_factor");
    if (r.material.framework == "trl") r.apply_default(f.packing, "trl", "packing");
    if (package == "axolotl") r.apply_default(f.packing, "axolotl", "sample_packing");
    if (package == "transformers") r.apply_default(f.use_liger_kernel, "transformers", "use_liger_kernel");
    if (!f.deepspeed.known()) f.deepspeed.set(false, Origin::kAbsent, r.material.framework_source);
  }
  r.apply(f.warmup_steps, "warmup_steps", node_int);
  const Setting* ratio = r.last("warmup_ratio");
  const Setting* steps = r.last("max_steps");
  const double share = ratio ? node_double(ratio->value).value_or(-1) : -1;
  const std::int64_t total = steps ? node_int(steps->value).value_or(-1) : -1;
  const bool zero = !f.warmup_steps.known() || f.warmup_steps.value() == 0;
  if (zero && total > 0 && share >= 0 && share <= 1) {
    f.warmup_steps.set(static_cast<std::int64_t>(std::ceil(share * static_cast<double>(total))), Origin::kDerived, ratio->source);
  }
}

/// LLaMA-Factory's freeze trains every parameter whose name contains ".<layer>.<module>" for a layer at the end (at the
/// beginning, if the number is negative) and one of the modules; "all" is the empty name (model/adapter.py
/// _setup_freeze_tuning).
bool resolve_freeze(Resolver& r, const Setting& type) {
  FactSheet& f = r.facts;
  const Setting* layers = r.last("freeze_trainable_layers");
  const Setting* modules = r.last("freeze_trainable_modules");
  const Setting* extra = r.last("freeze_extra_modules");
  const Setting* pro = r.last("use_llama_pro");  // other layers, spread over the model
  std::int64_t n = layers ? node_int(layers->value).value_or(0) : 2;
  const std::vector<std::string> names =
      modules ? node_strings(modules->value).value_or(std::vector<std::string>()) : std::vector<std::string>{"all"};
  if (n == 0 || names.empty() || (pro && node_bool(pro->value).value_or(true)) || !f.num_layers.known()) return true;
  const std::int64_t depth = f.num_layers.value();
  if (depth < 1 || depth > 100000) return true;
  n = std::clamp(n, -depth, depth);
  const std::int64_t first = n > 0 ? depth - n : 0;
  const std::int64_t end = n > 0 ? depth : -n;
  std::vector<std::string> patterns;
  for (const std::string& name : names) {
    for (std::int64_t layer = first; layer < end; ++layer)
      patterns.push_back("." + std::to_string(layer) + "." + (name == "all" ? std::string() : name));
  }
  if (extra) {
    for (const std::string& name : node_strings(extra->value).value_or(std::vector<std::string>())) patterns.push_back(name);
  }
  const Source& source = modules ? modules->source : layers ? layers->source : type.source;
  f.unfrozen_patterns.set(std::move(patterns), Origin::kStated, source);
  const bool all = std::find(names.begin(), names.end(), "all") != names.end();
  if (!all || !f.moe_layers.known()) return true;
  const auto& moe = f.moe_layers.value();
  const bool reached = std::any_of(moe.begin(), moe.end(), [&](std::int64_t l) { return l >= first && l < end; });
  // ".46." is in "layers.3.mlp.experts.46.up_proj.weight" too, so that experts may train where their layer does not.
  f.router_trains.set(reached, Origin::kDerived, source);
  if (reached) f.experts_train.set(true, Origin::kDerived, source);
  return true;
}

/// Does only a part of the model train, chosen by patterns?
bool resolve_unfrozen(Resolver& r) {
  const Setting* unfrozen = r.last("unfrozen_parameters");  // Axolotl: everything else is frozen
  if (unfrozen && unfrozen->value.is_list() && !unfrozen->value.items.empty()) {
    r.apply(r.facts.unfrozen_patterns, "unfrozen_parameters", node_strings);
    return true;
  }
  const Setting* type = r.last("finetuning_type");
  return type && type->value.is_string() && type->value.text == "freeze" && resolve_freeze(r, *type);
}

void resolve_method(Resolver& r) {
  FactSheet& f = r.facts;
  if (f.method.known() || !f.has_adapter.known()) return;
  if (!f.has_adapter.value()) {
    f.method.set(Method::kFull, Origin::kDerived, f.has_adapter.source());
    const bool partly = resolve_unfrozen(r);
    if (partly) {
      const char* why = "only some parameters are trained, and what the patterns reach is not known yet";
      if (!f.router_trains.known()) f.router_trains.explain_unknown(why);
      if (!f.experts_train.known()) f.experts_train.explain_unknown(why);
    } else {
      f.router_trains.set(true, Origin::kDerived, f.has_adapter.source());
      f.experts_train.set(true, Origin::kDerived, f.has_adapter.source());
    }
    return;
  }
  const bool quantised = f.quant_bits.known() && f.quant_bits.value() > 0;
  f.method.set(quantised ? Method::kQlora : Method::kLora, Origin::kDerived, f.has_adapter.source());
}

/// Upper bounds: the last batch may be short, and sequences shorter than the limit. Never a finding, only a measure.
void resolve_tokens(FactSheet& f) {
  if (!f.micro_batch.known() || !f.accumulation.known() || !f.sequence_length.known()) return;
  if (!f.world_size.known()) {
    f.tokens_per_step.explain_unknown(f.world_size.why_unknown().empty() ? "the number of processes is unknown" : f.world_size.why_unknown());
    return;
  }
  std::int64_t tokens = f.micro_batch.value();
  for (const std::int64_t factor : {f.accumulation.value(), f.world_size.value(), f.sequence_length.value()}) {
    if (tokens < 1 || factor < 1 || __builtin_mul_overflow(tokens, factor, &tokens)) return;
  }
  f.tokens_per_step.set(tokens, Origin::kDerived, f.sequence_length.source());
  if (!f.top_k.known() || !f.num_experts.known() || f.num_experts.value() < 1) return;
  f.tokens_per_expert.set(static_cast<double>(tokens) * static_cast<double>(f.top_k.value()) / static_cast<double>(f.num_experts.value()),
                          Origin::kDerived, f.num_experts.source());
}

/// A mode that one file switches on: TrainingArguments, or the launcher where TrainingArguments says nothing (its bf16 and
/// fp16 outrank ACCELERATE_MIXED_PRECISION, transformers training_args.py).
struct Mode {
  bool on = false;
  const Setting* by = nullptr;
};

Mode mode_of(const Resolver& r, std::string_view name) {
  const Setting* own = r.last(name);
  if (own && node_bool(own->value).value_or(false)) return {true, own};
  for (std::string_view flag : {"bf16", "fp16"}) {
    const Setting* s = r.last(flag);
    if (s && (node_bool(s->value).value_or(false) || s->value.is_string())) return {};
  }
  const Setting* launcher = r.last("accelerate.mixed_precision");
  if (launcher && launcher->value.is_string() && launcher->value.text == name) return {true, launcher};
  return {};
}

/// DeepSpeed casts the model to the dtype of its JSON and Accelerate starts no autocast under it (accelerator.py,
/// runtime/engine.py _configure_distributed_model). What its JSON leaves to "auto" comes from TrainingArguments.
bool resolve_engine_precision(Resolver& r) {
  FactSheet& f = r.facts;
  if (!f.deepspeed.known() || !f.deepspeed.value()) return false;
  const Setting* autocast = r.last("deepspeed.torch_autocast.enabled");
  if (autocast && node_bool(autocast->value).value_or(true)) {
    const Setting* dtype = r.last("deepspeed.torch_autocast.dtype");
    const auto d = dtype && dtype->value.is_string() ? dtype_from_text(dtype->value.text) : std::nullopt;
    if (d == DType::kBF16 || d == DType::kF16)
      f.precision.set(d == DType::kBF16 ? Precision::kAutocastBf16 : Precision::kAutocastFp16, Origin::kStated, dtype->source);
    else
      f.precision.explain_unknown("DeepSpeed's torch_autocast is on, and its dtype is not stated");
    return true;
  }
  for (const auto& [name, mode] : {std::pair{"bf16", Precision::kPureBf16}, {"fp16", Precision::kPureFp16}}) {
    const Setting* json = r.last("deepspeed." + std::string(name) + ".enabled");
    const auto stated = json ? node_bool(json->value) : std::nullopt;
    const Mode trainer = mode_of(r, name);
    if (stated.value_or(false)) {
      f.precision.set(mode, Origin::kStated, json->source);
      return true;
    }
    if (!stated && trainer.on) {
      f.precision.set(mode, Origin::kDerived, trainer.by->source);
      return true;
    }
  }
  return false;
}

void resolve_mixed_precision(Resolver& r) {
  FactSheet& f = r.facts;
  if (resolve_engine_precision(r)) return;
  const Setting* bf16 = r.last("bf16");
  const Setting* fp16 = r.last("fp16");
  const Setting* launcher = r.last("accelerate.mixed_precision");
  const bool automatic = (bf16 && bf16->value.is_string() && bf16->value.text == "auto") ||
                         (!bf16 && !fp16 && r.material.framework == "axolotl");  // Axolotl's default is auto
  if (const Mode b = mode_of(r, "bf16"); b.on) {
    f.precision.set(Precision::kAutocastBf16, Origin::kStated, b.by->source);
  } else if (const Mode h = mode_of(r, "fp16"); h.on) {
    f.precision.set(Precision::kAutocastFp16, Origin::kStated, h.by->source);
  } else if (automatic) {
    f.precision.explain_unknown("bf16: auto is decided on the training machine: bf16 where the GPU has it, else fp16");
  } else if (launcher && launcher->value.is_string() && launcher->value.text == "fp8") {
    f.precision.explain_unknown("the launcher asks for fp8, and which layers it converts is not modelled");
  } else if (r.training_known() && f.load_dtype.known()) {
    // No autocast: everything runs in the dtype of the weights.
    const DType d = f.load_dtype.value();
    const Precision p = d == DType::kBF16 ? Precision::kPureBf16 : d == DType::kF16 ? Precision::kPureFp16 : Precision::kFp32;
    f.precision.set(p, Origin::kDerived, f.load_dtype.source());
  } else if (r.training_known()) {
    f.precision.explain_unknown("no mixed precision is configured, and no file says in which dtype the weights are loaded");
  }
}

}  // namespace

void resolve_training(Resolver& r) {
  resolve_trainer(r);
  resolve_adapter(r);
  resolve_batches(r);
  resolve_tokens(r.facts);
}

void resolve_precision(Resolver& r) {
  FactSheet& f = r.facts;
  auto dtype = [](const Node& n) { return n.is_string() ? dtype_from_text(n.text) : std::optional<DType>{}; };
  r.apply(f.load_dtype, "torch_dtype", dtype);
  // A full fine-tune saves the dtype it trained in; the config that the run itself wrote is evidence of it.
  if (!f.load_dtype.known() && f.weights_dtype.known() && f.weights_dtype.source().role == Role::kCheckpointConfig) {
    f.load_dtype.set(f.weights_dtype.value(), Origin::kDerived, f.weights_dtype.source());
  }

  resolve_mixed_precision(r);

  r.apply(f.fp8, "fp8", node_bool);
  if (const Setting* launcher = r.last("accelerate.mixed_precision"); launcher && launcher->value.is_string() && launcher->value.text == "fp8") {
    f.fp8.set(true, Origin::kStated, launcher->source);
  }
  if (!f.fp8.known() && r.training_known()) f.fp8.set(false, Origin::kAbsent, r.material.framework_source);
  if (r.material.framework == "axolotl") {
    const BehaviourAnswer skips = r.ask_about("axolotl", "fp8_skips_router");
    if (skips.value) f.fp8_skips_router.set(*skips.value == "true", Origin::kFrameworkDefault, source_of(skips));
    else f.fp8_skips_router.explain_unknown(skips.why);
  } else if (f.fp8.known()) {
    Source source = f.fp8.source();
    source.cite = "accelerate src/accelerate/utils/ao.py@v1.15.0 (filter_linear_layers)";
    f.fp8_skips_router.set(false, Origin::kFrameworkDefault, source);
  }

  if (!r.family) return;
  if (f.trainer.known() && f.trainer.value() == "KTrainer") {  // LLaMA-Factory's use_kt
    f.router_dtype.explain_unknown("KTransformers puts its own MoE block in the place of the family's");
    f.router_undone.explain_unknown(f.router_dtype.why_unknown());
    return;
  }
  DType written = r.family->routing.logits_dtype;  // kUnknown: the dtype of the activations
  if (r.family->logits_dtype_by_version) {
    const BehaviourAnswer answer = r.ask_about("transformers", "router_logits_dtype");
    if (!answer.value) {
      f.router_dtype_written.explain_unknown(answer.why);
      f.router_dtype.explain_unknown(answer.why);
      f.router_undone.explain_unknown(answer.why);
      return;
    }
    written = dtype_from_text(*answer.value).value_or(DType::kUnknown);
  }
  if (written != DType::kUnknown) f.router_dtype_written.set(written, Origin::kFamily, f.family.source());
  if (!f.precision.known()) {
    f.router_dtype.explain_unknown(f.precision.why_unknown());
    return;
  }
  const Precision p = f.precision.value();
  const bool autocast = p == Precision::kAutocastBf16 || p == Precision::kAutocastFp16;
  const DType low = p == Precision::kAutocastBf16 || p == Precision::kPureBf16 ? DType::kBF16 : DType::kF16;
  if (p == Precision::kFp32) {
    f.router_dtype.set(DType::kF32, Origin::kDerived, f.precision.source());
    f.router_undone.set(false, Origin::kDerived, f.precision.source());
  } else if (!autocast) {
    f.router_dtype.set(written == DType::kF32 ? DType::kF32 : low, Origin::kDerived, f.precision.source());
    f.router_undone.set(false, Origin::kDerived, f.precision.source());
  } else {
    const BehaviourAnswer answer = r.ask_about("transformers", "autocast_lowers_router");
    if (!answer.value) {
      f.router_dtype.explain_unknown(answer.why);
      f.router_undone.explain_unknown(answer.why);
      return;
    }
    const bool lowers = *answer.value == "true";
    f.router_dtype.set(lowers ? low : DType::kF32, Origin::kDerived, source_of(answer));
    f.router_undone.set(lowers && written == DType::kF32, Origin::kDerived, source_of(answer));
    f.router_undone_measured.set(answer.measured && low == DType::kBF16, Origin::kDerived, source_of(answer));
  }
}

namespace {

/// Bits of a method that has one width only; 0: its config states them.
std::int64_t bits_of(std::string_view method) {
  if (method == "fp8" || method == "fbgemm_fp8" || method == "eetq") return 8;
  if (method == "mxfp4") return 4;
  return 0;
}

/// Some trainers load a quantised checkpoint in full precision.
bool dequantised(Resolver& r, const Setting& method) {
  FactSheet& f = r.facts;
  if (const Setting* s = r.last("quant_dequantize"); s && node_bool(s->value).value_or(false)) {
    f.quant_bits.set(0, Origin::kStated, s->source);
    return true;
  }
  if (r.material.framework != "llama-factory") return false;
  const BehaviourAnswer answer = ask({"llamafactory", "dequantises", {{"method", method.value.text}}}, f.llamafactory.get());
  if (answer.value == "true") f.quant_bits.set(0, Origin::kFrameworkDefault, source_of(answer));
  if (!answer.value) f.quant_bits.explain_unknown(answer.why);
  return answer.value != "false";
}

void resolve_stored_quantisation(Resolver& r, const Setting& method) {
  FactSheet& f = r.facts;
  const std::string& name = method.value.text;
  f.quant_method.set(name, Origin::kStated, method.source);
  const bool can_be = name == "mxfp4" || name == "fp8";
  if (can_be && dequantised(r, method)) return;
  const Setting* bits = r.last("quant_bits");
  const auto stated = bits ? node_int(bits->value) : std::nullopt;
  if (stated && *stated >= 1 && *stated <= 16) {
    f.quant_bits.set(*stated, Origin::kStated, bits->source);
  } else if (bits_of(name) > 0) {
    f.quant_bits.set(bits_of(name), Origin::kDerived, method.source);
  } else {
    f.quant_bits.explain_unknown("the quantization_config of " + name + " states no bits that are read here");
  }
  if (const Setting* other = r.last("quant_targets_other")) {
    const std::string why = "its config_groups name other targets than Linear (" + to_text(other->source) + ")";
    f.router_quantised.explain_unknown(why);
    f.experts_quantised.explain_unknown(why);
  }
}

/// "gate" of "model.layers.0.mlp.gate", "mlp.gate" and "re:.*mlp\\.gate$".
std::string_view last_name(std::string_view entry) {
  if (entry.ends_with('$')) entry.remove_suffix(1);
  return entry.substr(entry.find_last_of(".*\\") + 1);
}

}  // namespace

void resolve_quantisation(Resolver& r) {
  FactSheet& f = r.facts;
  const Setting* four = r.last("load_in_4bit");
  const Setting* eight = r.last("load_in_8bit");
  const Setting* type = r.last("bnb_4bit_quant_type");
  const Setting* method = r.last("quant_method");
  if (four && node_bool(four->value).value_or(false)) {
    f.quant_bits.set(4, Origin::kStated, four->source);
    f.quant_method.set("bitsandbytes " + (type && type->value.is_string() ? type->value.text : std::string("4-bit")),
                       Origin::kStated, type ? type->source : four->source);
  } else if (eight && node_bool(eight->value).value_or(false)) {
    f.quant_bits.set(8, Origin::kStated, eight->source);
    f.quant_method.set("bitsandbytes int8", Origin::kStated, eight->source);
  } else if (method && method->value.is_string()) {
    resolve_stored_quantisation(r, *method);
  } else if (r.training_known() || !r.material.configs.empty()) {
    f.quant_bits.set(0, Origin::kAbsent, derived_from("no quantisation in the files read"));
  }
  r.apply(f.quant_skip, "llm_int8_skip_modules", node_strings);
  resolve_method(r);

  if (!r.family || !f.quant_bits.known()) return;
  const Source why = f.quant_bits.source();
  if (f.quant_bits.value() == 0) {
    f.router_quantised.set(false, Origin::kDerived, why);
    f.experts_quantised.set(false, Origin::kDerived, why);
    return;
  }
  if (const Setting* stacks = r.last("quantize_moe_experts"); stacks && node_bool(stacks->value).value_or(false)) {
    f.experts_quantised.set(true, Origin::kStated, stacks->source);  // Axolotl rounds the 3-D parameters itself
  }
  // What the list really spares is for the measure quantised_parts to say.
  const auto& names = r.family->router_names;
  const bool claimed = f.quant_skip.known() &&
                       std::any_of(f.quant_skip.value().begin(), f.quant_skip.value().end(), [&](const std::string& entry) {
                         return std::find(names.begin(), names.end(), last_name(entry)) != names.end();
                       });
  f.router_quant_claimed_skipped.set(claimed, f.quant_skip.known() ? Origin::kDerived : Origin::kAbsent,
                                     f.quant_skip.known() ? f.quant_skip.source() : why);
}

}  // namespace moeaudit
