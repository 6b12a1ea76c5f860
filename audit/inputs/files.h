// Paths and folders as the readers need them: shown as the user wrote them, looked at without ever opening a device, a
// pipe or a symbolic link that leads nowhere.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit {

enum class PathKind { kMissing, kFile, kFolder, kOther };

/// What is at `path`; `problem` gets why it is none of file and folder (loop of links, no permission, a device).
PathKind path_kind(const std::string& path, std::string* problem);

/// "dir/" + "name" -> "dir/name"; "." + "name" -> "name"; "./" and "a/.." are folded where that names the same file.
std::string join_path(std::string_view folder, std::string_view name);
std::string without_slash(std::string path);
std::string file_name_of(std::string_view path);
std::string folder_of(std::string_view path);  // "." where there is none
bool has_ending(std::string_view path, std::string_view ending);

/// What one folder holds, by the names of its files. Empty strings: not there.
struct Folder {
  std::string path;
  std::string config, weights, adapter_config, adapter_weights, trainer_state, training_args, model_card;
  std::string metrics;  // a log of training by its name, of whatever run
  std::vector<std::string> version_files;
  std::vector<std::string> maybe_configs;  // .yml, .yaml, .json of at most 1 MiB that are none of the above
  std::vector<std::string> other_weights;  // formats that are not read
  std::vector<std::pair<std::int64_t, std::string>> checkpoints;  // checkpoint-N folders, by N
  std::vector<InputProblem> problems;

  bool trained() const { return !trainer_state.empty() || !training_args.empty(); }
  bool has_adapter() const { return !adapter_config.empty() || !adapter_weights.empty(); }
  bool has_model() const { return !config.empty() || !weights.empty(); }
};
Folder look_into(const std::string& path);

/// N of "checkpoint-N".
std::optional<std::int64_t> checkpoint_number(std::string_view name);

}  // namespace moeaudit
