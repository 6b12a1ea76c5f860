// A hub id -> the folder of its snapshot in the local Hugging Face cache. Layout: models--ORG--NAME/refs/REVISION holds
// a commit, snapshots/COMMIT/ the files (huggingface_hub, "Understand caching"; constants.py for the environment
// variables).
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "audit/inputs/readers.h"

namespace moeaudit {
namespace fs = std::filesystem;
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

fs::path expand_home(const std::string& text) {
  const std::string home = environment("HOME");
  if (text == "~") return home;
  if (text.starts_with("~/")) return fs::path(home) / text.substr(2);
  return text;
}

/// In the order in which huggingface_hub looks at them.
fs::path cache_folder() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const std::string v = environment(name); !v.empty()) return expand_home(v);
  }
  if (const std::string v = environment("HF_HOME"); !v.empty()) return expand_home(v) / "hub";
  if (const std::string v = environment("XDG_CACHE_HOME"); !v.empty()) return expand_home(v) / "huggingface" / "hub";
  if (const std::string v = environment("HOME"); !v.empty()) return fs::path(v) / ".cache" / "huggingface" / "hub";
  return {};
}

bool is_commit(std::string_view text) {
  return !text.empty() && text.size() <= 64 &&
         std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

std::string trimmed(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' ')) text.pop_back();
  return text;
}

bool is_name(std::string_view part) {
  if (part.empty() || part.size() > 96 || part.front() == '.' || part.front() == '-') return false;
  return std::all_of(part.begin(), part.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_' || c == '.'; });
}

bool has_config(const fs::path& folder) {
  std::error_code error;
  return fs::is_regular_file(folder / "config.json", error);
}

}  // namespace

bool looks_like_hub_id(std::string_view text) {
  const std::size_t slash = text.find('/');
  if (slash == std::string_view::npos || text.find('/', slash + 1) != std::string_view::npos) return false;
  return is_name(text.substr(0, slash)) && is_name(text.substr(slash + 1)) && text.find("..") == std::string_view::npos;
}

std::string find_in_hub_cache(std::string_view id, std::string_view revision, std::string* note) {
  const fs::path cache = cache_folder();
  if (cache.empty() || !looks_like_hub_id(id)) return {};
  const std::size_t slash = id.find('/');
  const fs::path model =
      cache / ("models--" + std::string(id.substr(0, slash)) + "--" + std::string(id.substr(slash + 1)));
  const std::string wanted = revision.empty() ? "main" : std::string(revision);
  if (wanted.find("..") != std::string::npos || wanted.front() == '/') return {};

  std::string commit, error;
  std::error_code ec;
  if (fs::is_regular_file(model / "refs" / wanted, ec) &&
      read_file((model / "refs" / wanted).string(), &commit, &error, 4096)) {
    commit = trimmed(commit);
  } else if (is_commit(wanted)) {
    commit = wanted;
  }
  if (is_commit(commit) && has_config(model / "snapshots" / commit)) {
    *note = "from the local Hugging Face cache, snapshot " + commit;
    return (model / "snapshots" / commit).string();
  }
  if (!revision.empty()) return {};
  // No refs/main (a download of a pinned commit): unambiguous only if there is a single snapshot.
  std::vector<fs::path> snapshots;
  for (fs::directory_iterator it(model / "snapshots", ec), end; !ec && it != end && snapshots.size() < 3;
       it.increment(ec)) {
    if (has_config(it->path())) snapshots.push_back(it->path());
  }
  if (snapshots.size() != 1) return {};
  *note = "from the local Hugging Face cache, its only snapshot " + snapshots.front().filename().string();
  return snapshots.front().string();
}

}  // namespace moeaudit
