// One tree for JSON and YAML: every value knows its line and column, duplicates are seen, depth and size are bounded.
// Scalars keep their text; what the text means is decided by the dialect that the framework which reads the file uses.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moeaudit {

/// Where reading stopped, and why. Lines and columns count from 1 (columns in bytes).
struct TextError {
  int line = 0;
  int column = 0;
  std::string what;
};

/// A value. Nodes are owned by their Document; pointers to them stay valid while it lives.
struct Node {
  enum class Kind : std::uint8_t { kNull, kBool, kNumber, kString, kList, kMap };
  Kind kind = Kind::kNull;
  int line = 0;
  int column = 0;
  bool boolean = false;
  std::string text;               // kString: the string; kNumber: as written ("1e-3", "NaN", "-Infinity")
  std::vector<std::string> keys;  // kMap, in order
  std::vector<int> key_lines;     // kMap, line of each key
  std::vector<Node> items;        // kList, kMap (aligned with keys)

  bool is_null() const { return kind == Kind::kNull; }
  bool is_map() const { return kind == Kind::kMap; }
  bool is_list() const { return kind == Kind::kList; }
  bool is_string() const { return kind == Kind::kString; }
  bool is_number() const { return kind == Kind::kNumber; }
  /// Last value of `key` (as Python's json and PyYAML do), or nullptr. Only for maps.
  const Node* find(std::string_view key) const;
  /// "a.b.c" through nested maps.
  const Node* find_path(std::string_view dotted) const;
  std::optional<bool> as_bool() const;
  std::optional<std::int64_t> as_int() const;  // exact integers only: 8, 8.0; not 8.5
  std::optional<double> as_double() const;     // numbers; NaN, Infinity, -Infinity
  const std::string* as_string() const { return kind == Kind::kString ? &text : nullptr; }
};

struct DuplicateKey {
  std::string path;
  int line = 0;  // of the second one
  int first_line = 0;
};

struct TextLimits {
  std::size_t max_bytes = std::size_t{256} << 20;
  int max_depth = 64;
  std::size_t max_nodes = 5'000'000;  // some 150 bytes each
};

/// JSON as Python's json module reads it: NaN, Infinity, -Infinity accepted; BOM refused by name; duplicate keys listed
/// and merged as a dict does (the first one's place, the last one's value). Stricter than Python in two things: the
/// text must be UTF-8, and half a surrogate pair (\ud800) is refused, since it is no text. False with `error` set.
bool parse_json(std::string_view text, Node* out, std::vector<DuplicateKey>* duplicates, TextError* error,
                const TextLimits& limits = {});

/// YAML as PyYAML's safe_load reads it (YAML 1.1): `1e-3` is a string, `1.0e-3` a float, `1_000` an int, yes/no/on/off
/// booleans, octal 010, sexagesimal 1:30, `<<` merged, anchors and aliases (expansion bounded), last duplicate wins and
/// is listed (a value that a merge key brought in is no duplicate). A second document is an error, as it is there; tags
/// other than null, bool, int, float, str, seq, map, timestamp are refused by name; a timestamp stays a string. Keys
/// that are not strings get the text that json.dumps would give them: true, null, 10 (so `on: x` is the key "true").
bool parse_yaml(std::string_view text, Node* out, std::vector<DuplicateKey>* duplicates, TextError* error,
                const TextLimits& limits = {});

/// Whole file into memory, with a size limit. False with a message (file missing, too large, not readable).
bool read_file(const std::string& path, std::string* out, std::string* error,
               std::size_t max_bytes = std::size_t{256} << 20);

}  // namespace moeaudit
