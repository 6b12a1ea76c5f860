// The readers of files that are no training config: what each takes, and what it leaves in Material. None of them
// throws; what could not be read is a problem in Material, with place and remedy.
#pragma once

#include <string>
#include <string_view>

#include "audit/inputs/material.h"
#include "audit/inputs/reader.h"

namespace moeaudit {

/// A text file parsed as JSON or YAML (by its ending; others by their first character). False with a problem listed:
/// missing, not a regular file, empty, not parseable (line and column). Duplicate keys are listed as a non-fatal
/// problem.
bool read_tree(const std::string& path, Node* out, Material* material);

/// Comments "# moe-audit: ignore[RULE, ...] reason" (the same line, or the next line that is no comment) and
/// "# moe-audit: ignore-file[RULE, ...] reason" of a YAML, requirements or lock file. One without a reason, or that is
/// no such comment, suppresses nothing and is a non-fatal problem.
void read_suppressions(const std::string& path, std::string_view text, Material* material);

/// config.json of a model. Adds to configs, states the quantisation, and for a config that the run itself wrote
/// (`states_version`) the transformers release. A root that is no map, or has neither model_type nor architectures, is
/// a problem.
void read_model_config(const std::string& path, Role role, bool states_version, Material* material);
/// The same for a config that stands inside another file.
void read_model_config(const std::string& path, Node root, Role role, Material* material);
/// Keys of the model configs that speak of experts or routers and that the family's class does not have: ignored, where
/// it is known that no class reads them; unread, where moe-audit does not know.
void check_model_configs(Material* material);

/// adapter_config.json.
void read_adapter_config(const std::string& path, Material* material);
/// The same as it stands in a trace.
void read_adapter_of_trace(const std::string& path, const Node& adapter, Material* material);

/// trainer_state.json: log, step, max_steps.
void read_trainer_state(const std::string& path, Material* material);

/// JSON lines, CSV, or the text of Megatron-LM, by ending and content; a log by step goes to material->log. Not readable: a
/// fatal problem.
/// Significant digits of a number as it is written: 7 in "1.000000E+00", 3 in "0.100".
int significant_digits(std::string_view number);
bool is_training_log(const std::string& path);
void read_training_log(const std::string& path, Material* material);

/// A recorded trace: opens it, and states what it says of the run. Not readable: a fatal problem.
void read_trace(const std::string& path, Material* material);
/// The experts that an inference engine chose for the tokens of that trace, which is read before.
void read_rollout(const std::string& path, Material* material);
/// What only the trace knows; without one (nullptr) that there is none, unless one was given and could not be read.
void resolve_trace(const Trace* trace, const std::string& path, const std::string& rollout, FactSheet* facts);

/// training_args.bin, by the inert pickle reader. Not readable: a non-fatal problem.
void read_training_args(const std::string& path, Material* material);

/// What a text file that states package versions is, by its name and content.
enum class VersionFile { kNone, kRequirements, kLock, kModelCard };
VersionFile recognise_versions(std::string_view path, std::string_view text);
/// Appends what it states; `material->problems` gets what could not be used. False if it states no version at all.
bool read_versions(const std::string& path, Material* material);
/// --assume PACKAGE=VERSION, as the command line splits it.
void read_assumption(const std::string& package, const std::string& version, Material* material);

/// The folder of a model in the local Hugging Face cache that has a config.json, or "" ("org/name"; refs/main unless a
/// revision is named). Looks only; never the network. `note` says which snapshot was taken.
std::string find_in_hub_cache(std::string_view id, std::string_view revision, std::string* note);
bool looks_like_hub_id(std::string_view text);

}  // namespace moeaudit
