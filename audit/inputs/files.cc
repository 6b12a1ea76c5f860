// Looking at paths and folders.
#include "audit/inputs/files.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <span>

namespace moeaudit {
namespace fs = std::filesystem;
namespace {

constexpr std::uintmax_t kMaxConfigBytes = std::uintmax_t{1} << 20;
constexpr std::size_t kMaxEntries = 100'000;

// Files of tokenizers, generation and results that lie in every checkpoint and are no training config.
constexpr std::string_view kNotConfigs[] = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "merges.json",
    "quantize_config.json",
};
constexpr std::string_view kTrainerOwn[] = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt",
                                            "scaler.pt",         "scheduler.bin", "scaler.bin"};

bool one_of(std::string_view name, std::span<const std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

bool is_version_file(std::string_view name) {
  if (name == "uv.lock" || name == "poetry.lock") return true;
  if (!has_ending(name, ".txt")) return false;
  return name.find("requirements") != std::string_view::npos || name.find("freeze") != std::string_view::npos;
}

bool is_unread_weights(std::string_view name) {
  if (one_of(name, kTrainerOwn) || name.starts_with("rng_state")) return false;
  return has_ending(name, ".bin") || has_ending(name, ".pt") || has_ending(name, ".pth") || has_ending(name, ".gguf") ||
         has_ending(name, ".ckpt") || has_ending(name, ".distcp");
}

class Looking {
 public:
  explicit Looking(const std::string& path) { folder_.path = path; }

  Folder look() {
    std::vector<fs::directory_entry> entries;
    std::error_code ec;
    for (fs::directory_iterator it(folder_.path, ec), end; !ec && it != end; it.increment(ec)) {
      entries.push_back(*it);
      if (entries.size() > kMaxEntries) {
        problem(folder_.path, "more than 100,000 entries: only the first ones were looked at", false);
        break;
      }
    }
    if (ec) problem(folder_.path, "the folder cannot be listed: " + ec.message(), true);
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.path() < b.path(); });
    for (const fs::directory_entry& entry : entries) take(entry);
    choose_weights();
    std::sort(folder_.checkpoints.begin(), folder_.checkpoints.end());
    return std::move(folder_);
  }

 private:
  void problem(const std::string& file, std::string what, bool fatal) {
    folder_.problems.push_back(
        {file, 0, 0, std::move(what), "give the file itself, or a folder that can be read", fatal});
  }

  std::string* slot_of(std::string_view name) {
    if (name == "config.json") return &folder_.config;
    if (name == "adapter_config.json") return &folder_.adapter_config;
    if (name == "adapter_model.safetensors") return &folder_.adapter_weights;
    if (name == "trainer_state.json") return &folder_.trainer_state;
    if (name == "training_args.bin") return &folder_.training_args;
    if (name == "README.md") return &folder_.model_card;
    // Loops of one's own; ms-swift; LLaMA-Factory.
    if (name == "metrics.jsonl" || name == "logging.jsonl" || name == "trainer_log.jsonl") return &folder_.metrics;
    return nullptr;
  }

  void take(const fs::directory_entry& entry) {
    const std::string name = entry.path().filename().string();
    const std::string path = join_path(folder_.path, name);
    std::string why;
    const PathKind kind = path_kind(path, &why);
    std::string* slot = slot_of(name);
    if (kind == PathKind::kFolder) {
      if (slot) problem(path, "is a folder, not a file", true);
      if (const auto n = checkpoint_number(name)) folder_.checkpoints.emplace_back(*n, path);
      return;
    }
    if (kind != PathKind::kFile) {
      if (slot || has_ending(name, ".safetensors")) problem(path, why.empty() ? "cannot be read" : why, true);
      return;
    }
    if (slot) {
      *slot = path;
    } else if (name == "model.safetensors.index.json") {
      index_ = path;
    } else if (has_ending(name, ".safetensors")) {
      (name == "model.safetensors" ? single_ : others_).push_back(path);
    } else if (is_version_file(name)) {
      folder_.version_files.push_back(path);
    } else if (is_unread_weights(name)) {
      folder_.other_weights.push_back(path);
    } else if ((has_ending(name, ".yml") || has_ending(name, ".yaml") || has_ending(name, ".json")) &&
               !one_of(name, kNotConfigs)) {
      std::error_code ec;
      if (fs::file_size(path, ec) <= kMaxConfigBytes && !ec) folder_.maybe_configs.push_back(path);
    }
  }

  void choose_weights() {
    if (!index_.empty() || !single_.empty()) {
      folder_.weights = folder_.path;  // the tensor store finds either
    } else if (others_.size() == 1) {
      folder_.weights = others_.front();
    } else if (others_.size() > 1) {
      folder_.problems.push_back(
          {folder_.path, 0, 0,
           std::to_string(others_.size()) + " .safetensors files and no model.safetensors.index.json: "
                                            "which of them make up the model is not written anywhere; none was read",
           "restore model.safetensors.index.json (the hub has it), or give one file by its path", false});
    }
  }

  Folder folder_;
  std::string index_;
  std::vector<std::string> single_, others_;
};

}  // namespace

PathKind path_kind(const std::string& path, std::string* problem) {
  std::error_code ec;
  const fs::file_status status = fs::status(path, ec);
  if (status.type() == fs::file_type::not_found) {
    if (fs::is_symlink(fs::symlink_status(path, ec))) *problem = "is a symbolic link to something that does not exist";
    return PathKind::kMissing;
  }
  if (ec) {
    *problem = ec == std::errc::too_many_symbolic_link_levels ? "is a loop of symbolic links"
                                                              : "cannot be read: " + ec.message();
    return PathKind::kOther;
  }
  if (status.type() == fs::file_type::regular) return PathKind::kFile;
  if (status.type() == fs::file_type::directory) return PathKind::kFolder;
  *problem = "is neither a file nor a folder (a device, pipe or socket)";
  return PathKind::kOther;
}

std::string join_path(std::string_view folder, std::string_view name) {
  const fs::path raw = fs::path(name).is_absolute()      ? fs::path(name)
                       : folder.empty() || folder == "." ? fs::path(name)
                                                         : fs::path(folder) / name;
  const fs::path folded = raw.lexically_normal();
  std::error_code ec;
  // "link/../x" and "x" may differ where "link" is a symbolic link.
  const bool same = raw.string().find("..") == std::string::npos || fs::equivalent(raw, folded, ec);
  return without_slash(same ? folded.string() : raw.string());
}

std::string without_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

std::string file_name_of(std::string_view path) {
  const std::size_t slash = path.rfind('/');
  return std::string(slash == std::string_view::npos ? path : path.substr(slash + 1));
}

std::string folder_of(std::string_view path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string_view::npos) return ".";
  return slash == 0 ? "/" : std::string(path.substr(0, slash));
}

bool has_ending(std::string_view path, std::string_view ending) { return path.ends_with(ending); }

std::optional<std::int64_t> checkpoint_number(std::string_view name) {
  constexpr std::string_view kPrefix = "checkpoint-";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  std::int64_t n = 0;
  const auto result = std::from_chars(name.data(), name.data() + name.size(), n);
  if (name.empty() || result.ec != std::errc{} || result.ptr != name.data() + name.size() || n < 0) return std::nullopt;
  return n;
}

Folder look_into(const std::string& path) { return Looking(path).look(); }

}  // namespace moeaudit
