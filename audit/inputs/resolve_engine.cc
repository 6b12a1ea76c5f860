// The engine under the trainer: DeepSpeed, FSDP, recomputation; and where the engine's own file contradicts the trainer's.
#include <algorithm>

#include "audit/inputs/resolve_parts.h"

namespace moeaudit {
namespace {

std::optional<bool> in_use(const Node& n) {
  switch (n.kind) {
    case Node::Kind::kNull: return std::nullopt;
    case Node::Kind::kBool: return n.boolean;
    case Node::Kind::kString: return !n.text.empty();
    case Node::Kind::kList:
    case Node::Kind::kMap: return !n.items.empty();
    case Node::Kind::kNumber: break;
  }
  return std::nullopt;
}

std::string not_here(const Setting& s) {
  return "the DeepSpeed config " + s.value.text + ", which " + to_text(s.source) + " names, is not here";
}

void resolve_zero_stage(Resolver& r) {
  FactSheet& f = r.facts;
  r.apply(f.zero_stage, "deepspeed.zero_optimization.stage", [](const Node& n) -> std::optional<std::int64_t> {
    const auto stage = node_int(n);
    return stage && *stage >= 0 && *stage <= 3 ? stage : std::nullopt;
  });
  if (f.zero_stage.known()) return;
  if (const Setting* missing = r.last("deepspeed.not_found")) {
    f.zero_stage.explain_unknown(not_here(*missing));
  } else if (r.last("deepspeed.read") && !r.last("deepspeed.zero_optimization.stage")) {
    r.apply_default(f.zero_stage, "deepspeed", "zero_stage");
  }
}

/// "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock" or the class's name alone.
bool names_class(const std::vector<std::string>& entries, std::string_view name) {
  return std::any_of(entries.begin(), entries.end(), [&](std::string_view e) {
    return e == name || (e.size() > name.size() && e.ends_with(name) && e[e.size() - name.size() - 1] == '.');
  });
}

std::vector<std::string> strings_of(const Resolver& r, std::string_view name) {
  const Setting* s = r.last(name);
  return s ? node_strings(s->value).value_or(std::vector<std::string>()) : std::vector<std::string>();
}

/// ZeRO-3 gathers a leaf module whole. Otherwise it gathers each expert when it is first used, and ranks that use
/// different experts wait for each other.
void resolve_leaf_modules(Resolver& r) {
  FactSheet& f = r.facts;
  const std::vector<std::string> classes = strings_of(r, "deepspeed.leaf_module.classes");
  const std::vector<std::string> names = strings_of(r, "deepspeed.leaf_module.names");
  const std::vector<std::string> suffixes = strings_of(r, "deepspeed.leaf_module.name_suffixes");
  std::vector<std::string> all = classes;
  all.insert(all.end(), names.begin(), names.end());
  all.insert(all.end(), suffixes.begin(), suffixes.end());
  for (const char* key : {"deepspeed.leaf_module.name_suffixes", "deepspeed.leaf_module.names", "deepspeed.leaf_module.classes"}) {
    if (const Setting* s = r.last(key)) f.zero3_leaf_modules.set(all, Origin::kStated, s->source);
  }
  if (!f.zero_stage.known() || f.zero_stage.value() != 3) return;

  std::string why;
  const BehaviourAnswer block = r.ask_about("transformers", "moe_block_class");
  const Setting* launcher = r.last("accelerate.moe_layer_cls_names");
  if (block.value && launcher && names_class(strings_of(r, launcher->name), *block.value)) {
    return f.moe_block_is_leaf.set(true, Origin::kStated, launcher->source);
  }
  if (launcher && !block.value) why = block.why;

  const std::string package = r.material.framework == "llama-factory" ? "llamafactory" : r.material.framework;
  if (package == "axolotl" || package == "llamafactory" || package == "ms-swift") {
    const BehaviourAnswer list = r.ask_about(package, "zero3_leaf");
    if (list.value == "true") return f.moe_block_is_leaf.set(true, Origin::kFrameworkDefault, source_of(list));
    if (!list.value) why = list.why;
  } else if (package != "transformers" && package != "trl") {
    why = "whether " + (package.empty() ? std::string("the framework") : package) + " names leaf modules itself is not known";
  }

  if (!all.empty()) {
    const BehaviourAnswer read = r.ask_about("deepspeed", "leaf_module_in_json");
    if (!read.value) {
      why = read.why;
    } else if (*read.value == "true") {
      if (block.value && names_class(classes, *block.value))
        return f.moe_block_is_leaf.set(true, Origin::kStated, f.zero3_leaf_modules.source());
      if (!block.value) why = block.why;
      if (!names.empty() || !suffixes.empty()) why = "leaf modules are named by module names, which are not resolved here";
    }
  }
  if (classes.empty()) {  // a list of one's own replaces DeepSpeed's
    const BehaviourAnswer own = r.ask_about("deepspeed", "zero3_leaf");
    if (own.value == "true") return f.moe_block_is_leaf.set(true, Origin::kFrameworkDefault, source_of(own));
    if (!own.value) why = own.why;
  }
  if (why.empty())
    f.moe_block_is_leaf.set(false, Origin::kDerived, f.zero_stage.source());
  else
    f.moe_block_is_leaf.explain_unknown(why);
}

void resolve_fsdp(Resolver& r) {
  FactSheet& f = r.facts;
  r.apply(f.fsdp, "fsdp", in_use);
  if (!f.fsdp.known() && r.training_known()) f.fsdp.set(false, Origin::kAbsent, r.material.framework_source);
  if (!f.fsdp.known() || !f.fsdp.value()) return;
  r.apply(f.fsdp_version, "fsdp_version", [](const Node& n) -> std::optional<std::int64_t> {
    const auto version = node_int(n);
    return version == 1 || version == 2 ? version : std::nullopt;
  });
}

void resolve_recomputation(Resolver& r) {
  FactSheet& f = r.facts;
  const Setting* stated = r.last("gradient_checkpointing");
  const Setting* offload = r.last("activation_offloading");
  const bool by_arguments = stated && stated->source.role == Role::kTrainingArguments;
  if (offload && !offload->value.is_null() && node_bool(offload->value) != false && !by_arguments) {
    // Axolotl's offloader takes the place of checkpointing under an adapter and wraps the layers itself without one
    // (core/builders/base.py, loaders/model.py @067b021c); earlier releases patched torch's function.
    f.gradient_checkpointing.explain_unknown("activation_offloading (" + to_text(offload->source) + ") decides how layers are checkpointed, by release");
    f.checkpointing_reentrant.explain_unknown(f.gradient_checkpointing.why_unknown());
    return;
  }
  r.apply(f.gradient_checkpointing, "gradient_checkpointing", node_bool);
  r.apply(f.checkpointing_reentrant, "checkpointing_reentrant", node_bool);
  r.apply(f.checkpointing_reentrant, "gradient_checkpointing_kwargs", [](const Node& n) -> std::optional<bool> {
    const Node* reentrant = n.is_map() ? n.find("use_reentrant") : nullptr;
    return reentrant ? node_bool(*reentrant) : std::nullopt;
  });
  const std::string& framework = r.material.framework;
  if (framework == "llama-factory") {
    r.apply_default(f.gradient_checkpointing, "llamafactory", "gradient_checkpointing");
    r.apply_default(f.checkpointing_reentrant, "llamafactory", "use_reentrant_gc");
  } else if (framework == "trl" || framework == "axolotl" || framework == "transformers") {
    const Setting* said = r.last("gradient_checkpointing");  // Axolotl has words for it, too: "offload"
    if (!said || said->value.is_null()) r.apply_default(f.gradient_checkpointing, framework, "gradient_checkpointing");
    const Setting* unfrozen = r.last("unfrozen_parameters");
    if (framework == "axolotl" && unfrozen && !unfrozen->value.is_null()) {
      f.checkpointing_reentrant.set_if_unknown(false, Origin::kFrameworkDefault, unfrozen->source);
      return;
    }
    BehaviourAnswer form = r.ask_about(framework, "default.use_reentrant");
    if (form.value && *form.value == "transformers") form = r.ask_about("transformers", "default.use_reentrant");
    if (form.value) {
      Source source = source_of(form);
      source.key = "use_reentrant";
      f.checkpointing_reentrant.set_if_unknown(*form.value == "true", Origin::kFrameworkDefault, std::move(source));
    } else if (!f.checkpointing_reentrant.known()) {
      f.checkpointing_reentrant.explain_unknown(form.why);
    }
  }
}

// ---- the engine's file against the trainer's -----------------------------------------------------------------------

class Conflicts {
 public:
  explicit Conflicts(const Resolver& r) : r_(r) {}

  /// transformers compares what is not "auto" with TrainingArguments and refuses to start at a difference
  /// (integrations/deepspeed.py HfTrainerDeepSpeedConfig.fill_match, trainer_config_finalize).
  template <class T>
  void compare(std::string_view key, std::string_view other, const Fact<T>& fact) {
    const Setting* s = engine(key);
    if (!s || !fact.known()) return;
    const auto stated = node_double(s->value);
    if (!stated || *stated == static_cast<double>(fact.value())) return;
    add(key, *s, other, to_text(fact.value()), fact.source());
  }
  void compare_flag(std::string_view key, std::string_view flag) {
    const Setting* s = engine(key);
    const auto stated = s ? node_bool(s->value) : std::nullopt;
    const Setting* trainer = r_.last(flag);
    const Setting* full_eval = r_.last(std::string(flag) + "_full_eval");
    if (!stated || (full_eval && node_bool(full_eval->value).value_or(true))) return;
    const auto value = trainer ? node_bool(trainer->value) : std::optional<bool>(false);
    const bool false_by_default = r_.material.framework == "transformers" || r_.material.framework == "llama-factory";
    if (!value || *value == *stated || (!trainer && !false_by_default)) return;
    add(key, *s, flag, *value ? "true" : "false", trainer ? trainer->source : Source());
  }
  std::vector<SettingConflict> take() { return std::move(found_); }

 private:
  const Setting* engine(std::string_view key) const { return r_.last("deepspeed." + std::string(key)); }
  void add(std::string_view key, const Setting& s, std::string_view other, std::string value, const Source& source) {
    const std::string text = s.value.kind == Node::Kind::kBool ? (s.value.boolean ? "true" : "false") : s.value.text;
    found_.push_back({std::string(key), text, s.source.file, s.source.line, std::string(other), std::move(value),
                      source.file, source.line});
  }
  const Resolver& r_;
  std::vector<SettingConflict> found_;
};

}  // namespace

void resolve_engine(Resolver& r) {
  FactSheet& f = r.facts;
  if (f.deepspeed.known() && f.deepspeed.value()) {
    resolve_zero_stage(r);
    resolve_leaf_modules(r);
  }
  resolve_fsdp(r);
  resolve_recomputation(r);
  r.apply(f.max_grad_norm, "max_grad_norm", node_double);
  if (r.training_known()) r.apply_default(f.max_grad_norm, "transformers", "max_grad_norm");
}

void resolve_conflicts(Resolver& r) {
  FactSheet& f = r.facts;
  if (!f.deepspeed.known() || !r.training_known()) return;
  if (const Setting* missing = r.last("deepspeed.not_found"); missing && f.deepspeed.value()) {
    return f.setting_conflicts.explain_unknown(not_here(*missing));
  }
  Conflicts conflicts(r);
  if (f.deepspeed.value()) {
    conflicts.compare("gradient_accumulation_steps", "gradient_accumulation_steps", f.accumulation);
    conflicts.compare("train_micro_batch_size_per_gpu", "per_device_train_batch_size", f.micro_batch);
    conflicts.compare("gradient_clipping", "max_grad_norm", f.max_grad_norm);
    conflicts.compare_flag("bf16.enabled", "bf16");
    conflicts.compare_flag("fp16.enabled", "fp16");
  }
  f.setting_conflicts.set(conflicts.take(), Origin::kDerived, f.deepspeed.source());
}

}  // namespace moeaudit
