// What the versions of a package do, as data: one YAML a package in this folder, compiled into the table below at build
// time. Each row is one cited statement with the window of versions it holds for. Schema: docs/add_a_behaviour.md.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/fact_sheet.h"

namespace moeaudit {

/// One condition of a row: the subject's `key` equals one of `values`. Rows with several conditions need all of them.
struct BehaviourCondition {
  std::string_view key;                      // "class", "model_type", "trainer", "peft_wrapped", "family", ...
  std::span<const std::string_view> values;
};

struct BehaviourRow {
  std::string_view package;    // "transformers"
  std::string_view topic;      // "default.gradient_accumulation_steps", "aux_flag_effect", "loss_factor", "router_is_linear"
  std::span<const BehaviourCondition> when;
  std::string_view from;       // first version with this behaviour; "" from the beginning
  std::string_view until;      // first version without it; "" still so
  std::string_view value;      // text: number, word, or a formula of a closed set: "GA", "GA*W", "W", "1", "1/GA"
  bool measured;               // true: fixtures/oracle ran it; false: read from source or documentation
  std::string_view cite;       // file at a commit : line, issue, or fixtures/oracle row
};

extern const BehaviourRow kBehaviours[];
extern const int kNumBehaviours;

/// What is asked: the package's versions and the subject ("class" -> "MixtralForCausalLM", ...).
struct BehaviourQuery {
  std::string_view package;
  std::string_view topic;
  std::vector<std::pair<std::string_view, std::string>> subject;
};

/// The answer for a whole set of versions. `value` only if every row that applies to some version of the set agrees AND
/// the rows cover the whole set; otherwise `why` says what differs ("transformers 4.46.0 gives GA, 4.48.1 gives 1").
struct BehaviourAnswer {
  std::optional<std::string> value;
  bool measured = false;        // every row that was used was measured
  std::string cite;             // of the row(s) used
  std::string why;              // when there is no value
  std::vector<const BehaviourRow*> rows;
};
/// `versions` may be null (unknown): then the set of all versions is meant.
BehaviourAnswer ask(const BehaviourQuery& query, const VersionSet* versions);

/// Config keys a framework's version knows, for CF001: topic "known_key", value = key. True if the table has a key list
/// for this package at these versions.
bool has_key_list(std::string_view package, std::string_view list, const VersionSet* versions);
/// Unknown under every version of the set?
bool key_unknown(std::string_view package, std::string_view list, std::string_view key, const VersionSet* versions);

}  // namespace moeaudit
