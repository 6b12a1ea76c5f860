// Package versions out of text files: pip freeze, pip list and requirements files, the [[package]] tables of uv.lock
// and poetry.lock, and the "Framework versions" list that PEFT, TRL, Axolotl and the Trainer write into README.md.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <map>
#include <set>

#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

/// Packages on which some check depends: those with a fact of their own.
std::vector<std::string> judged() {
  std::vector<std::string> packages;
  const FactSheet blank;
  visit_versions(blank, [&](std::string_view package, const auto&) { packages.emplace_back(package); });
  return packages;
}

std::string_view trim(std::string_view s) {
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
  return s;
}

/// PEP 503: lower case, runs of "-", "_" and "." are one "-".
std::string normalised(std::string_view name) {
  std::string out;
  for (char c : name) {
    const bool separator = c == '-' || c == '_' || c == '.';
    if (separator && !out.empty() && out.back() == '-') continue;
    out += separator ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return out;
}

bool is_judged(std::string_view package) {
  const std::vector<std::string> packages = judged();
  return std::find(packages.begin(), packages.end(), package) != packages.end();
}

std::string file_name(std::string_view path) { return std::filesystem::path(path).filename().string(); }

template <class F>
void for_each_line(std::string_view text, F&& f) {
  int number = 1;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    f(trim(text.substr(0, end)), number++);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
}

std::size_t name_length(std::string_view s) {
  std::size_t n = 0;
  while (n < s.size() && (std::isalnum(static_cast<unsigned char>(s[n])) || s[n] == '-' || s[n] == '_' || s[n] == '.'))
    ++n;
  return n;
}

class Reader {
 public:
  Reader(const std::string& path, Material* material) : path_(path), material_(material) {}
  int count() const { return count_; }

  void state(std::string_view package, std::string_view constraint, int line) {
    std::string name = normalised(package);
    if (name == "pytorch") name = "torch";
    const auto set = VersionSet::parse(constraint);
    if (!set)
      return unknown(name, line, "\"" + std::string(constraint) + "\" is no version constraint moe-audit understands");
    ++count_;
    Source source;
    source.role = Role::kVersions;
    source.file = path_;
    source.line = line;
    source.key = name;
    material_->versions.push_back({std::move(name), *set, std::move(source)});
  }

  /// A package that is there, in a version that this line does not tell.
  void unknown(const std::string& package, int line, const std::string& why) {
    if (!is_judged(package)) return;
    material_->problems.push_back({path_, line, 0, "this file does not tell the version of " + package + ": " + why,
                                   "--assume " + package + "=VERSION", false});
  }
  void note(int line, std::string what, std::string remedy) {
    material_->problems.push_back({path_, line, 0, std::move(what), std::move(remedy), false});
  }

 private:
  const std::string& path_;
  Material* material_;
  int count_ = 0;
};

// ---- requirements, pip freeze, pip list ---------------------------------------------------------------------------

/// One logical line: name[extras] constraint ; marker # comment --hash=...
void read_requirement(std::string_view line, int number, Reader* out) {
  if (const std::size_t comment = line.find(" #"); comment != std::string_view::npos)
    line = trim(line.substr(0, comment));
  if (line.starts_with("-r ") || line.starts_with("--requirement")) {
    return out->note(number, "\"" + std::string(line) + "\" is not followed", "give that file too, with --env FILE");
  }
  if (line.starts_with("-e ") || line.starts_with("--editable")) {
    const std::size_t egg = line.find("#egg=");
    if (egg != std::string_view::npos) {
      const std::string_view name = line.substr(egg + 5);
      out->unknown(normalised(name.substr(0, name_length(name))), number, "it is an editable checkout");
    }
    return;
  }
  const std::size_t n = name_length(line);
  if (n == 0 || line.front() == '-') return;
  const std::string_view name = line.substr(0, n);
  std::string_view rest = trim(line.substr(n));
  if (rest.starts_with("[")) rest = trim(rest.substr(std::min(rest.find(']'), rest.size() - 1) + 1));
  if (rest.starts_with("@")) return out->unknown(normalised(name), number, "it is installed from a URL");
  for (std::string_view stop : {";", " --"}) {
    if (const std::size_t at = rest.find(stop); at != std::string_view::npos) rest = trim(rest.substr(0, at));
  }
  if (rest.starts_with("(") && rest.ends_with(")")) rest = rest.substr(1, rest.size() - 2);
  constexpr std::string_view kOperators = "=<>!~";
  if (rest.empty()) return out->unknown(normalised(name), number, "no version is written behind it");
  if (kOperators.find(rest.front()) == std::string_view::npos) return;
  out->state(name, rest, number);
}

/// `pip list` prints columns: "Package  Version", a line of dashes, then rows.
bool is_pip_list(std::string_view text) {
  bool header = false, dashes = false;
  for_each_line(text, [&](std::string_view line, int number) {
    if (number == 1) header = line.starts_with("Package") && line.find("Version") != std::string_view::npos;
    if (number == 2) dashes = line.starts_with("---");
  });
  return header && dashes;
}

void read_pip_list(std::string_view text, Reader* out) {
  for_each_line(text, [&](std::string_view line, int number) {
    const std::size_t n = name_length(line);
    if (number <= 2 || n == 0 || n >= line.size()) return;
    const std::string_view rest = trim(line.substr(n));
    out->state(line.substr(0, n), rest.substr(0, rest.find(' ')), number);
  });
}

void read_requirements(std::string_view text, Reader* out) {
  if (is_pip_list(text)) return read_pip_list(text, out);
  std::string joined;  // a line that ends in "\" goes on
  int first = 0;
  for_each_line(text, [&](std::string_view line, int number) {
    if (line.starts_with("#")) return;
    if (joined.empty()) first = number;
    const bool goes_on = line.ends_with("\\");
    joined += std::string(goes_on ? line.substr(0, line.size() - 1) : line);
    if (goes_on) return;
    read_requirement(trim(joined), first, out);
    joined.clear();
  });
}

// ---- uv.lock, poetry.lock -----------------------------------------------------------------------------------------

/// `key = "value"` at the start of a line; "" if it is another key or no plain string.
std::string_view string_value(std::string_view line, std::string_view key) {
  if (!line.starts_with(key)) return {};
  line = trim(line.substr(key.size()));
  if (!line.starts_with("=")) return {};
  line = trim(line.substr(1));
  const char quote = line.empty() ? '\0' : line.front();
  if (quote != '"' && quote != '\'') return {};
  const std::size_t end = line.find(quote, 1);
  return end == std::string_view::npos ? std::string_view() : line.substr(1, end - 1);
}

struct LockedPackage {
  std::set<std::string> versions;
  int line = 0;
};

std::map<std::string, LockedPackage> locked_packages(std::string_view text) {
  std::map<std::string, LockedPackage> packages;
  bool inside = false;
  std::string name;
  for_each_line(text, [&](std::string_view line, int number) {
    if (line.starts_with("[")) {
      inside = line == "[[package]]";
      name.clear();
    } else if (inside && name.empty()) {
      name = normalised(string_value(line, "name"));
    } else if (inside) {
      const std::string_view version = string_value(line, "version");
      if (version.empty()) return;
      LockedPackage& package = packages[name];
      package.versions.emplace(version);
      package.line = number;
    }
  });
  return packages;
}

void read_lock(std::string_view text, Reader* out) {
  for (const auto& [name, package] : locked_packages(text)) {
    if (package.versions.size() == 1) {
      out->state(name, "==" + *package.versions.begin(), package.line);
      continue;
    }
    std::string all;
    for (const std::string& v : package.versions) all += (all.empty() ? "" : ", ") + v;
    out->unknown(name, package.line, "the lock file has several for different platforms (" + all + ")");
  }
}

// ---- README.md ----------------------------------------------------------------------------------------------------

bool is_framework_heading(std::string_view line) {
  if (!line.starts_with("#")) return false;
  while (line.starts_with("#")) line.remove_prefix(1);
  return trim(line) == "Framework versions";
}

/// "- PEFT 0.14.0" (PEFT, Trainer) or "- TRL: 1.16.0" (TRL); "axolotl version: `0.9.2`" above Axolotl's own config.
void read_model_card(std::string_view text, Reader* out) {
  constexpr std::string_view kAxolotl = "axolotl version: `";
  bool inside = false;
  for_each_line(text, [&](std::string_view line, int number) {
    if (line.starts_with(kAxolotl) && line.ends_with("`")) {
      out->state("axolotl", line.substr(kAxolotl.size(), line.size() - kAxolotl.size() - 1), number);
    } else if (line.starts_with("#")) {
      inside = is_framework_heading(line);
    } else if (inside && line.starts_with("- ")) {
      const std::string_view item = trim(line.substr(2));
      const std::size_t n = name_length(item);
      std::string_view rest = trim(item.substr(n));
      if (rest.starts_with(":")) rest = trim(rest.substr(1));
      if (n > 0 && !rest.empty()) out->state(item.substr(0, n), rest, number);
    }
  });
}

/// Does most of the text look like requirements?
bool mostly_requirements(std::string_view text) {
  int lines = 0, good = 0;
  for_each_line(text, [&](std::string_view line, int) {
    if (line.empty() || line.starts_with("#")) return;
    ++lines;
    const std::size_t n = name_length(line);
    const std::string_view rest = trim(line.substr(n));
    good +=
        n > 0 && (rest.starts_with("==") || rest.starts_with(">=") || rest.starts_with("~=") || rest.starts_with("@"));
  });
  return good > 0 && good * 2 >= lines;
}

}  // namespace

VersionFile recognise_versions(std::string_view path, std::string_view text) {
  const std::string name = file_name(path);
  if (name.ends_with(".lock"))
    return text.find("[[package]]") != std::string_view::npos ? VersionFile::kLock : VersionFile::kNone;
  if (name.ends_with(".md")) {
    bool card = false;
    for_each_line(text, [&](std::string_view line, int) {
      card |= is_framework_heading(line) || line.starts_with("axolotl version: `");
    });
    return card ? VersionFile::kModelCard : VersionFile::kNone;
  }
  if (name.ends_with(".yml") || name.ends_with(".yaml") || name.ends_with(".json") || name.ends_with(".toml"))
    return VersionFile::kNone;
  const bool named_so = name.find("requirements") != std::string::npos || name.find("freeze") != std::string::npos;
  return named_so || is_pip_list(text) || mostly_requirements(text) ? VersionFile::kRequirements : VersionFile::kNone;
}

bool read_versions(const std::string& path, Material* material) {
  std::string text, error;
  if (!read_file(path, &text, &error, std::size_t{64} << 20)) {
    material->problems.push_back({path, 0, 0, error, "give a readable requirements or lock file with --env FILE"});
    return false;
  }
  Reader reader(path, material);
  switch (recognise_versions(path, text)) {
    case VersionFile::kNone: return false;
    case VersionFile::kRequirements:
      read_requirements(text, &reader);
      read_suppressions(path, text, material);
      break;
    case VersionFile::kLock:
      read_lock(text, &reader);
      read_suppressions(path, text, material);
      break;
    case VersionFile::kModelCard: read_model_card(text, &reader); break;
  }
  return reader.count() > 0;
}

void read_assumption(const std::string& package, const std::string& version, Material* material) {
  const std::string name = normalised(package);
  const auto set = VersionSet::parse(version);
  Source source;
  source.role = Role::kCommandLine;
  source.key = "--assume " + name;
  if (!set) {
    material->problems.push_back(
        {"", 0, 0, "--assume " + package + "=" + version + ": \"" + version + "\" is no version moe-audit understands",
         "write a release or a constraint, for example --assume transformers=4.57.1"});
    return;
  }
  if (!is_judged(name)) {
    std::string packages;
    for (const std::string& p : judged()) packages += (packages.empty() ? "" : ", ") + p;
    material->problems.push_back({"", 0, 0, "--assume " + package + ": no check depends on this package",
                                  "packages that count: " + packages});
    return;
  }
  material->versions.push_back({name, *set, std::move(source)});
}

}  // namespace moeaudit
