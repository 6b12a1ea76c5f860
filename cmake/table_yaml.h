// Reading the YAML of audit/families and audit/behaviours strictly, and writing constant arrays: what compile_tables.cc
// needs.
#pragma once

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tables {

using Words = std::map<std::string, std::string>;  // word in YAML -> C++ enumerator

[[noreturn]] inline void fail(const std::string& file, const YAML::Mark& mark, const std::string& what) {
  throw std::runtime_error(file + ":" + std::to_string(mark.line + 1) + ": error: " + what);
}

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    c == '\n' ? out += "\\n" : out += c;
  }
  return out + "\"";
}

inline std::string joined(const std::vector<std::string>& words, const std::string& separator) {
  std::string out;
  for (const std::string& w : words) out += (out.empty() ? "" : separator) + w;
  return out;
}

/// One mapping of a file, read key by key. done() refuses whatever nobody asked for: a misspelt key is never ignored.
class Map {
 public:
  Map(std::string file, const YAML::Node& node) : file_(std::move(file)), node_(node) {
    if (!node.IsMap()) fail(file_, node.Mark(), "expected a mapping");
    for (const auto& entry : node) {
      if (!keys_.emplace(entry.first.Scalar(), entry.first.Mark()).second) {
        fail(file_, entry.first.Mark(), "key '" + entry.first.Scalar() + "' is written twice");
      }
    }
  }
  const std::string& file() const { return file_; }
  YAML::Mark mark() const { return node_.Mark(); }
  bool has(const std::string& key) {
    asked_.insert(key);
    return keys_.count(key) != 0;
  }
  YAML::Node node(const std::string& key) {
    if (!has(key)) fail(file_, mark(), "missing key '" + key + "'");
    return node_[key];
  }
  std::string text(const std::string& key) {
    const YAML::Node n = node(key);
    if (!n.IsScalar() || n.Scalar().empty())
      fail(file_, n.Mark(), "'" + key + "' must be a word or a number, and not empty");
    return n.Scalar();
  }
  std::string text_or(const std::string& key, const std::string& fallback) { return has(key) ? text(key) : fallback; }
  bool flag(const std::string& key, bool fallback) {
    if (!has(key)) return fallback;
    const std::string t = text(key);
    if (t != "true" && t != "false")
      fail(file_, node(key).Mark(), "'" + key + "' must be true or false, not '" + t + "'");
    return t == "true";
  }
  std::string number(const std::string& key, const std::string& fallback) {
    if (!has(key)) return fallback;
    const YAML::Node n = node(key);
    double value = 0;
    if (!YAML::convert<double>::decode(n, value)) fail(file_, n.Mark(), "'" + key + "' must be a number");
    return n.Scalar();
  }
  std::string word(const std::string& key, const Words& words) {
    const std::string t = text(key);
    const auto found = words.find(t);
    if (found == words.end()) {
      std::vector<std::string> known;
      for (const auto& w : words) known.push_back(w.first);
      fail(file_, node(key).Mark(), "'" + t + "' is no value of '" + key + "'; write one of: " + joined(known, ", "));
    }
    return found->second;
  }
  std::vector<std::string> list(const std::string& key, bool required) {
    std::vector<std::string> out;
    if (!required && !has(key)) return out;
    const YAML::Node n = node(key);
    if (!n.IsSequence()) fail(file_, n.Mark(), "'" + key + "' must be a list");
    for (const auto& item : n) {
      if (!item.IsScalar() || item.Scalar().empty())
        fail(file_, item.Mark(), "'" + key + "': every entry must be one word");
      out.push_back(item.Scalar());
    }
    return out;
  }
  /// A word, or a list of words; none if the key is not there.
  std::vector<std::string> words(const std::string& key) {
    return has(key) && node(key).IsScalar() ? std::vector<std::string>{text(key)} : list(key, false);
  }
  void done() const {
    for (const auto& [key, where] : keys_) {
      if (!asked_.count(key)) {
        fail(file_, where, "unknown key '" + key + "'; known here: " + joined({asked_.begin(), asked_.end()}, ", "));
      }
    }
  }

 private:
  std::string file_;
  YAML::Node node_;
  std::map<std::string, YAML::Mark> keys_;
  std::set<std::string> asked_;
};

/// `sources:` gives long citations short names: "code:96" becomes "<what code stands for>:96".
class Sources {
 public:
  explicit Sources(Map& top) : file_(top.file()) {
    if (!top.has("sources")) return;
    Map map(file_, top.node("sources"));
    for (const auto& entry : top.node("sources")) text_[entry.first.Scalar()] = map.text(entry.first.Scalar());
    map.done();
  }
  /// "code:96", "code@v4.57.6:96, config:3", or free text without a known short name in front (an issue, a fixtures/oracle
  /// row).
  std::string expand(const std::string& cite, const YAML::Mark& mark) const {
    std::vector<std::string> parts;
    std::stringstream stream(cite);
    for (std::string part; std::getline(stream, part, ',');) {
      part.erase(0, part.find_first_not_of(' '));
      const std::size_t end = std::min(part.find_first_of(":@ "), part.size());
      const std::string head = part.substr(0, end);
      const auto found = text_.find(head);
      const bool bare_word = head.find_first_of("/.#") == std::string::npos && part.compare(end, 1, " ") != 0;
      if (found != text_.end())
        part = found->second + part.substr(end);
      else if (bare_word)
        fail(file_, mark, "cite '" + part + "': '" + head + "' is not in sources:");
      parts.push_back(part);
    }
    return joined(parts, "; ");
  }
  std::string cite(Map& map) const { return expand(map.text("cite"), map.node("cite").Mark()); }

 private:
  std::string file_;
  std::map<std::string, std::string> text_;
};

/// Writes constexpr arrays and hands back the expression that names them.
class Writer {
 public:
  std::string strings(const std::vector<std::string>& items) {
    if (items.empty()) return "{}";
    std::vector<std::string> q;
    for (const std::string& i : items) q.push_back(quoted(i));
    return array("std::string_view", q);
  }
  std::string array(const std::string& type, const std::vector<std::string>& items) {
    if (items.empty()) return "{}";
    const std::string text = "constexpr " + type + " ";
    const std::string body = "[] = {" + joined(items, ",\n    ") + "};\n";
    const auto [found, added] = names_.emplace(text + body, "k" + std::to_string(names_.size()));
    if (added) arrays_ << text << found->second << body;
    return found->second;
  }
  std::string text() const { return arrays_.str(); }

 private:
  std::map<std::string, std::string> names_;  // equal arrays are written once
  std::ostringstream arrays_;
};

inline YAML::Node load(const std::filesystem::path& path) {
  try {
    return YAML::LoadFile(path.string());
  } catch (const YAML::Exception& e) {
    fail(path.string(), e.mark, e.msg);
  }
}

/// In the order of their names, so that the tables do not depend on the file system.
inline std::vector<std::filesystem::path> yaml_files(const std::filesystem::path& dir) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.path().extension() == ".yaml") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

/// The sources of the three tables. Throw std::runtime_error("file:line: error: ...") at the first mistake.
std::string families_source(const std::filesystem::path& dir);    // family_tables.cc
std::string behaviours_source(const std::filesystem::path& dir);  // behaviour_tables.cc
std::string advisories_source(const std::filesystem::path& dir);  // advisory_tables.cc

}  // namespace tables
