// Internal to resolve*.cc: the steps of the resolution and what they share.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "audit/behaviours/behaviour.h"
#include "audit/families/family.h"
#include "audit/inputs/resolve.h"

namespace moeaudit {

struct Resolver {
  const Material& material;
  const RunOptions& options;
  FactSheet& facts;
  const Family* family = nullptr;  // set by resolve_model()

  /// A file says who trains: what it does not state is a default, not a gap.
  bool training_known() const { return !material.framework.empty() || !material.trainer.empty(); }

  /// The statement that wins, or nullptr.
  const Setting* last(std::string_view name) const;

  /// Applies every statement of `name`, weakest first, so that the losers stay as shadowed. `convert(const Node&)`
  /// returns optional<T>; a value that does not convert is skipped (null and "auto" mean: not said).
  template <class T, class Convert>
  void apply(Fact<T>& fact, std::string_view name, Convert convert) {
    for (const Setting& s : material.settings) {
      if (s.name != name) continue;
      if (std::optional<T> value = convert(s.value)) fact.set(std::move(*value), origin_of(s.source), s.source);
    }
  }
  /// Fills a gap from `default.<key>` of the package, if it is the same for every version the run may use.
  void apply_default(Fact<bool>& fact, std::string_view package, std::string_view key);
  void apply_default(Fact<std::int64_t>& fact, std::string_view package, std::string_view key);
  void apply_default(Fact<double>& fact, std::string_view package, std::string_view key);

  const VersionSet* versions(std::string_view package) const;
  /// Asks the behaviours of `package`; the subject always holds family, model_type, class, trainer, peft_wrapped and
  /// framework, as far as they are known.
  BehaviourAnswer ask_about(std::string_view package, std::string_view topic) const;

  static Origin origin_of(const Source& source) {
    if (source.role == Role::kBehaviourTable) return Origin::kFrameworkDefault;
    return source.role == Role::kCommandLine ? Origin::kAssumed : Origin::kStated;
  }
};

Source source_of(const BehaviourAnswer& answer);
Source derived_from(std::string_view what);

std::optional<bool> node_bool(const Node& n);             // bool; 0/1; Python's and YAML's words
std::optional<std::int64_t> node_int(const Node& n);
std::optional<double> node_double(const Node& n);         // a number, also when the dialect reads it as a string: 1e-3
std::optional<std::string> node_string(const Node& n);    // non-empty string
std::optional<std::vector<std::string>> node_strings(const Node& n);  // list of strings, or one string
std::optional<DType> dtype_from_text(std::string_view text);  // "bfloat16", "torch.bfloat16", "BF16"

void resolve_versions(Resolver& r);
void resolve_model(Resolver& r);
void resolve_training(Resolver& r);
void resolve_engine(Resolver& r);     // DeepSpeed, FSDP, what trains by pattern
void resolve_precision(Resolver& r);
void resolve_quantisation(Resolver& r);
void resolve_balance(Resolver& r);
void resolve_conflicts(Resolver& r);  // the engine's file against the trainer's
void resolve_base(Resolver& r);

}  // namespace moeaudit
