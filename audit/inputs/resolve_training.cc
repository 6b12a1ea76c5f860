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

bool known_training(const Resolver& r) { return !r.material.framework.empty() || !r.material.trainer.empty(); }

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
std::optional<std::vector<std::string>> node_rank_pattern(const Node& n) {
  if (!n.is_map()) return std::nullopt;
  std::vector<std::string> out;
  for (std::size_t i = 0; i < n.keys.size(); ++i) {
    if (const auto rank = node_int(n.items[i])) out.push_back(n.keys[i] + "=" + std::to_string(*rank));
  }
  return out;
}

void resolve_adapter(Resolver& r) {
  FactSheet& f = r.facts;
  const Setting* kind = r.last("peft_type");
  if (r.material.adapter_seen) {
    f.has_adapter.set(true, Origin::kStated, r.material.adapter_source);
  } else if (known_training(r)) {
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
  r.apply(f.rank_pattern, "rank_pattern", node_rank_pattern);
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
    // Its own defaults (hparams/finetuning_args.py): alpha is 2 x rank, rank 8; PEFT's would be wrong.
    Source source = r.material.framework_source;
    source.cite = "LLaMA-Factory src/llamafactory/hparams/finetuning_args.py@ff6d4d12";
    f.adapter_rank.set_if_unknown(8, Origin::kFrameworkDefault, source);
    f.adapter_alpha.set_if_unknown(2.0 * static_cast<double>(f.adapter_rank.value()), Origin::kFrameworkDefault, source);
  }
  r.apply_default(f.adapter_rank, "peft", "r");
  r.apply_default(f.adapter_alpha, "peft", "lora_alpha");
  r.apply_default(f.adapter_dropout, "peft", "lora_dropout");
  r.apply_default(f.adapter_rslora, "peft", "use_rslora");
  const bool lora = !kind || !kind->value.is_string() || kind->value.text == "LORA" || kind->value.text == "lora" ||
                    kind->value.text == "qlora";
  if (!lora) f.method.set(Method::kOtherAdapter, Origin::kStated, kind->source);
}

void resolve_batches(Resolver& r) {
  FactSheet& f = r.facts;
  r.apply(f.accumulation, "gradient_accumulation_steps", node_int);
  r.apply(f.micro_batch, "per_device_train_batch_size", node_int);
  r.apply(f.sequence_length, "max_length", node_int);
  r.apply(f.world_size, "world_size", node_int);
  r.apply(f.average_tokens, "average_tokens_across_devices", node_bool);
  r.apply(f.label_smoothing, "label_smoothing_factor", node_double);
  r.apply(f.deepspeed, "deepspeed", [](const Node& n) -> std::optional<bool> {
    if (n.is_null()) return false;
    return !(n.is_string() && n.text.empty());
  });
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
  if (known_training(r)) {
    const std::string_view package = r.material.framework == "axolotl" ? "axolotl" : "transformers";
    r.apply_default(f.accumulation, package, "gradient_accumulation_steps");
    r.apply_default(f.micro_batch, package, package == "axolotl" ? "micro_batch_size" : "per_device_train_batch_size");
    const BehaviourAnswer forced = r.material.framework == "axolotl"
                                       ? r.ask_about("axolotl", "average_tokens_across_devices")
                                       : BehaviourAnswer{};
    if (forced.value) f.average_tokens.set(*forced.value == "true", Origin::kFrameworkDefault, source_of(forced));
    r.apply_default(f.average_tokens, "transformers", "average_tokens_across_devices");
    r.apply_default(f.label_smoothing, "transformers", "label_smoothing_factor");
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

void resolve_method(Resolver& r) {
  FactSheet& f = r.facts;
  if (f.method.known() || !f.has_adapter.known()) return;
  if (!f.has_adapter.value()) {
    f.method.set(Method::kFull, Origin::kDerived, f.has_adapter.source());
    const Setting* unfrozen = r.last("unfrozen_parameters");  // Axolotl: everything else is frozen
    const Setting* type = r.last("finetuning_type");          // LLaMA-Factory: "freeze" trains some layers only
    const bool partly = (unfrozen && unfrozen->value.is_list() && !unfrozen->value.items.empty()) ||
                        (type && type->value.is_string() && type->value.text == "freeze");
    r.apply(f.unfrozen_patterns, "unfrozen_parameters", node_strings);
    if (partly) {
      const char* why = "only some parameters are trained, and what the patterns reach is not known yet";
      f.router_trains.explain_unknown(why);
      f.experts_train.explain_unknown(why);
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

  const Setting* bf16 = r.last("bf16");
  const Setting* fp16 = r.last("fp16");
  const auto b = bf16 ? node_bool(bf16->value) : std::nullopt;
  const auto h = fp16 ? node_bool(fp16->value) : std::nullopt;
  if (b.value_or(false)) {
    f.precision.set(Precision::kAutocastBf16, Origin::kStated, bf16->source);
  } else if (h.value_or(false)) {
    f.precision.set(Precision::kAutocastFp16, Origin::kStated, fp16->source);
  } else if ((bf16 && bf16->value.is_string() && bf16->value.text == "auto") ||
             (!bf16 && !fp16 && r.material.framework == "axolotl")) {  // Axolotl's default is auto
    f.precision.explain_unknown("bf16: auto is decided on the training machine: bf16 where the GPU has it, else fp16");
  } else if (known_training(r) && f.load_dtype.known()) {
    // No autocast: everything runs in the dtype of the weights.
    const DType d = f.load_dtype.value();
    const Precision p = d == DType::kBF16 ? Precision::kPureBf16 : d == DType::kF16 ? Precision::kPureFp16 : Precision::kFp32;
    f.precision.set(p, Origin::kDerived, f.load_dtype.source());
  } else if (known_training(r)) {
    f.precision.explain_unknown("no mixed precision is configured, and no file says in which dtype the weights are loaded");
  }

  r.apply(f.fp8, "fp8", node_bool);
  if (!f.fp8.known() && known_training(r)) f.fp8.set(false, Origin::kAbsent, r.material.framework_source);
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
  const DType written = r.family->routing.logits_dtype;  // kUnknown: the dtype of the activations
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
    f.quant_method.set(method->value.text, Origin::kStated, method->source);
  } else if (known_training(r) || !r.material.configs.empty()) {
    f.quant_bits.set(0, Origin::kAbsent, derived_from("no quantisation in the files read"));
  }
  r.apply(f.quant_skip, "llm_int8_skip_modules", node_strings);
  resolve_method(r);

  if (!r.family || !f.quant_bits.known()) return;
  const Source why = f.quant_bits.source();
  if (f.quant_bits.value() == 0) {
    f.router_quantised.set(false, Origin::kDerived, why);
    return;
  }
  // transformers' bitsandbytes integration skips a module if an entry is its full name, or a part of its path.
  bool skipped = false;
  if (f.quant_skip.known()) {
    for (const std::string& entry : f.quant_skip.value()) {
      const std::string leaf = entry.substr(entry.rfind('.') == std::string::npos ? 0 : entry.rfind('.') + 1);
      const auto& names = r.family->router_names;
      skipped |= std::find(names.begin(), names.end(), leaf) != names.end();
    }
    f.router_quant_claimed_skipped.set(skipped, Origin::kDerived, f.quant_skip.source());
  } else {
    f.router_quant_claimed_skipped.set(false, Origin::kAbsent, why);
  }
  if (skipped) {
    f.router_quantised.set(false, Origin::kDerived, f.quant_skip.source());
  } else if (f.router_is_linear.known()) {
    // bitsandbytes replaces nn.Linear modules only; a bare parameter stays as it is.
    f.router_quantised.set(f.router_is_linear.value(), Origin::kDerived, why);
  } else {
    f.router_quantised.explain_unknown(f.router_is_linear.why_unknown());
  }
}

}  // namespace moeaudit
