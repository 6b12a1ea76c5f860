// From statements to what the trainer would do: order of the steps, and what they share.
#include "audit/inputs/resolve.h"

#include <charconv>
#include <cstdlib>

#include "audit/inputs/resolve_parts.h"

namespace moeaudit {

const Setting* Resolver::last(std::string_view name) const {
  const Setting* found = nullptr;
  for (const Setting& s : material.settings) {
    if (s.name == name) found = &s;
  }
  return found;
}

const VersionSet* Resolver::versions(std::string_view package) const {
  const VersionSet* found = nullptr;
  visit_versions(facts, [&](std::string_view name, const Fact<VersionSet>& fact) {
    if (name == package) found = fact.get();
  });
  return found;
}

BehaviourAnswer Resolver::ask_about(std::string_view package, std::string_view topic) const {
  BehaviourQuery query{package, topic, {}};
  auto add = [&](std::string_view key, const Fact<std::string>& fact) {
    if (fact.known()) query.subject.emplace_back(key, fact.value());
  };
  add("family", facts.family);
  add("model_type", facts.model_type);
  add("class", facts.model_class);
  add("trainer", facts.trainer);
  add("framework", facts.framework);
  if (facts.has_adapter.known()) query.subject.emplace_back("peft_wrapped", facts.has_adapter.value() ? "true" : "false");
  return ask(query, versions(package));
}

namespace {

template <class T, class Parse>
void fill_default(Resolver& r, Fact<T>& fact, std::string_view package, std::string_view key, Parse parse) {
  const BehaviourAnswer answer = r.ask_about(package, "default." + std::string(key));
  if (!answer.value) {
    if (!fact.known()) fact.explain_unknown(answer.why);
    return;
  }
  Node node;
  node.kind = Node::Kind::kString;
  node.text = *answer.value;
  if (std::optional<T> value = parse(node)) {
    Source source = source_of(answer);
    source.key = std::string(key);
    fact.set_if_unknown(std::move(*value), Origin::kFrameworkDefault, std::move(source));
  }
}

}  // namespace

void Resolver::apply_default(Fact<bool>& fact, std::string_view package, std::string_view key) {
  fill_default(*this, fact, package, key, node_bool);
}
void Resolver::apply_default(Fact<std::int64_t>& fact, std::string_view package, std::string_view key) {
  fill_default(*this, fact, package, key, node_int);
}
void Resolver::apply_default(Fact<double>& fact, std::string_view package, std::string_view key) {
  fill_default(*this, fact, package, key, node_double);
}

Source source_of(const BehaviourAnswer& answer) {
  Source source;
  source.role = Role::kBehaviourTable;
  source.cite = answer.cite;
  return source;
}

Source derived_from(std::string_view what) {
  Source source;
  source.cite = std::string(what);
  return source;
}

std::optional<bool> node_bool(const Node& n) {
  if (n.kind == Node::Kind::kBool) return n.boolean;
  if (const auto v = n.as_int(); v && (*v == 0 || *v == 1)) return *v == 1;
  if (n.is_string()) {
    if (n.text == "true" || n.text == "True") return true;
    if (n.text == "false" || n.text == "False") return false;
  }
  return std::nullopt;
}

std::optional<std::int64_t> node_int(const Node& n) {
  if (const auto v = n.as_int()) return v;
  if (n.is_string()) {
    std::int64_t v = 0;
    const char* end = n.text.data() + n.text.size();
    const auto result = std::from_chars(n.text.data(), end, v);
    if (result.ec == std::errc{} && result.ptr == end) return v;
  }
  return std::nullopt;
}

std::optional<double> node_double(const Node& n) {
  if (const auto v = n.as_double()) return v;
  if (n.is_string()) {
    double v = 0;
    const char* end = n.text.data() + n.text.size();
    const auto result = std::from_chars(n.text.data(), end, v);
    if (result.ec == std::errc{} && result.ptr == end && !n.text.empty()) return v;
  }
  return std::nullopt;
}

std::optional<std::string> node_string(const Node& n) {
  if (n.is_string() && !n.text.empty()) return n.text;
  return std::nullopt;
}

std::optional<std::vector<std::string>> node_strings(const Node& n) {
  if (n.is_string()) return std::vector<std::string>{n.text};
  if (!n.is_list()) return std::nullopt;
  std::vector<std::string> out;
  for (const Node& item : n.items) {
    if (item.is_string()) out.push_back(item.text);
  }
  return out;
}

std::optional<DType> dtype_from_text(std::string_view text) {
  if (text.substr(0, 6) == "torch.") text.remove_prefix(6);
  if (text == "bfloat16" || text == "bf16" || text == "BF16") return DType::kBF16;
  if (text == "float16" || text == "fp16" || text == "half" || text == "F16") return DType::kF16;
  if (text == "float32" || text == "fp32" || text == "float" || text == "F32") return DType::kF32;
  if (text == "float64" || text == "double" || text == "F64") return DType::kF64;
  return std::nullopt;
}

void resolve_versions(Resolver& r) {
  for (const VersionStatement& s : r.material.versions) {
    visit_versions(r.facts, [&](std::string_view package, Fact<VersionSet>& fact) {
      if (package == s.package) fact.set(s.versions, Resolver::origin_of(s.source), s.source);
    });
  }
}

/// What a Megatron-LM log says of its run, where nothing else does. Its balance loss is 1 under uniform routing.
void resolve_log(Resolver& r) {
  FactSheet& f = r.facts;
  for (const Setting& s : r.material.settings) {
    if (!s.name.starts_with("log.")) continue;
    const auto count = s.value.as_int();
    const auto number = s.value.as_double();
    if (count && *count > 0) {
      if (s.name == "log.num_experts") f.num_experts.set_if_unknown(*count, Origin::kStated, s.source);
      if (s.name == "log.top_k") f.top_k.set_if_unknown(*count, Origin::kStated, s.source);
      if (s.name == "log.expert_parallel") f.expert_parallel.set_if_unknown(*count, Origin::kStated, s.source);
    }
    if (s.name == "log.recompute") f.gradient_checkpointing.set_if_unknown(s.value.text != "None", Origin::kStated, s.source);
    if (number && s.name == "log.z_coefficient") f.z_coefficient.set_if_unknown(*number, Origin::kStated, s.source);
    if (number && s.name == "log.aux_coefficient") {
      f.aux_coefficient.set_if_unknown(*number, Origin::kStated, s.source);
      f.aux_uniform_value.set_if_unknown(1.0, Origin::kFrameworkDefault, s.source);
    }
  }
}

void resolve(const Material& material, const RunOptions& options, FactSheet* facts) {
  Resolver r{material, options, *facts};
  resolve_versions(r);
  resolve_model(r);
  resolve_training(r);
  resolve_engine(r);
  resolve_precision(r);
  resolve_quantisation(r);
  resolve_balance(r);
  resolve_conflicts(r);
  resolve_base(r);
  resolve_log(r);

  if (!material.log.step.empty()) facts->log.set(material.log, Origin::kMeasured, material.log_source);
  if (material.global_step >= 0) {
    facts->optimizer_steps.set(material.global_step, Origin::kMeasured, material.log_source);
  }
  // Known even when empty: that nothing was wrong is a fact only if something was read.
  if (!material.model.empty() || !material.adapter.empty() || !material.weight_problems.empty()) {
    Source source;
    source.role = material.model.empty() ? Role::kAdapterWeights : Role::kModelWeights;
    source.file = !material.model.files().empty()     ? material.model.files().front()
                  : !material.adapter.files().empty() ? material.adapter.files().front()
                  : !material.weight_problems.empty() ? material.weight_problems.front().file
                                                      : std::string();
    facts->weight_problems.set(material.weight_problems, Origin::kMeasured, source);
  }
  // A launcher's or an engine's file alone says nothing of what a trainer would ignore.
  if (r.training_known() || !material.configs.empty() || material.adapter_seen) {
    if (material.ignored_keys.empty() && !material.keys_not_compared.empty()) {
      facts->ignored_keys.explain_unknown(material.keys_not_compared);
    } else {
      facts->ignored_keys.set(material.ignored_keys, Origin::kDerived, derived_from("keys of the files read"));
    }
    facts->unread_keys.set(material.unread_keys, Origin::kDerived, derived_from("keys of the files read"));
  }
}

}  // namespace moeaudit
