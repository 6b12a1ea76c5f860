// Words that several rules share: numbers, places, and settings to paste in the spelling of the framework at hand.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit::say {

std::string number(double v);       // at most six significant digits: "0.016", "6.25e-05"
std::string count(std::int64_t v);  // "32,832"
std::string percent(double share);  // 0.0123 -> "1.23 %"
std::string plural(std::int64_t n, std::string_view one, std::string_view many);  // "1 router", "4 routers"

/// A float that PyYAML, JSON and Python all read as this float. PyYAML takes "1e-05" for a string: YAML 1.1 wants a
/// dot.
std::string literal(double v);

/// " (axolotl.yml:4)"; "" if nothing is known of the place.
std::string at(const Source& source);

/// The same; where no file says so, " (a default)" if it is one.
std::string whence(Origin origin, const Source& source);

/// The first `most` items, then "and 9 more".
std::string some(const std::vector<std::string>& items, std::size_t most = 3);

template <class T>
Evidence evidence(const Fact<T>& fact) {
  return {std::string(fact.info().name), fact.known() ? to_text(fact.value()) : "unknown", location_of(fact.source())};
}

/// Sources of a finding, without the empty ones.
std::vector<std::string> sources(std::vector<std::string> all);

/// Key and value as YAML writes them: {"output_router_logits", "true"}.
using Settings = std::vector<std::pair<std::string, std::string>>;

/// Lines to paste, indented by four blanks, each block under a line that says where it goes.
std::string model_config(Facts& f, const Settings& settings);  // keys of config.json
std::string training(Facts& f, const Settings& settings);      // keys of TrainingArguments
std::string lora(Facts& f, const Settings& settings);          // keys of PEFT's LoraConfig
std::string quantisation_skip(Facts& f, const std::vector<std::string>& modules);

std::string list_literal(const std::vector<std::string>& items);  // ["q_proj", "v_proj"]: YAML, JSON and Python

/// Name by which the framework's config files call a PEFT key: "target_modules" -> "lora_target_modules".
std::string lora_key(Facts& f, std::string_view key);

/// "gate" of "model.layers.{L}.mlp.gate.weight"; "gate" if the family is not known.
std::string router_leaf(Facts& f);

/// The user's own training side said so, in so many words: not a default, nor a value that came with the base model.
bool chosen_for_training(Origin origin, const Source& source);

}  // namespace moeaudit::say
