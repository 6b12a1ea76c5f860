// parse_yaml(): the graph of yaml_parser.h into the tree of text.h, as PyYAML's SafeConstructor would build it: merge
// keys expanded, types resolved, equal keys merged. Sizes are bounded, since aliases can make a small file very large.
#include <algorithm>
#include <cstring>

#include "audit/text/map_keys.h"
#include "audit/text/text.h"
#include "audit/text/yaml_parser.h"
#include "audit/text/yaml_scalar.h"

namespace moeaudit {
namespace {

constexpr std::size_t kMaxYamlBytes = std::size_t{64} << 20;

class TreeBuilder {
 public:
  TreeBuilder(YamlGraph graph, std::vector<DuplicateKey>* duplicates, const TextLimits& limits)
      : nodes_(std::move(graph.nodes)),
        open_(nodes_.size()),
        listed_(nodes_.size()),
        merged_(nodes_.size()),
        duplicates_(duplicates),
        limits_(limits),
        nodes_left_(limits.max_nodes),
        bytes_left_(limits.max_bytes) {}

  void build(std::size_t position, Node* out) {
    const YamlNode& from = nodes_[position];
    out->line = from.mark.line + 1;
    out->column = from.mark.column();
    if (open_[position]) fail(from, "an alias to something that it is part of");
    if (path_.size() > static_cast<std::size_t>(limits_.max_depth)) {
      fail(from, "nested deeper than " + std::to_string(limits_.max_depth) + " levels");
    }
    if (nodes_left_-- == 0) {
      nodes_left_ = 0;
      fail(from, "more than " + std::to_string(limits_.max_nodes) + " values after its aliases are expanded");
    }
    open_[position] = 1;
    switch (from.kind) {
      case YamlNode::Kind::kScalar: scalar(from, out); break;
      case YamlNode::Kind::kSequence: sequence(position, out); break;
      case YamlNode::Kind::kMapping: mapping(position, out); break;
    }
    open_[position] = 0;
  }

 private:
  [[noreturn]] static void fail(const YamlNode& node, std::string what) {
    throw YamlFault{{node.mark.line + 1, node.mark.column(), std::move(what)}};
  }

  /// The word of a core tag, or the type that the looks of the scalar give.
  static std::string_view type_of(const YamlNode& node) {
    if (node.kind == YamlNode::Kind::kScalar && node.tag.empty())
      return node.implicit ? yaml_implicit_type(node.text) : "str";
    if (node.tag.empty()) return node.kind == YamlNode::Kind::kSequence ? "seq" : "map";
    if (!node.tag.starts_with(kYamlTagPrefix))
      fail(node, "the tag " + node.tag + " is not read here: only YAML's own types are");
    return std::string_view(node.tag).substr(kYamlTagPrefix.size());
  }

  void scalar(const YamlNode& from, Node* out) {
    if (from.text.size() > bytes_left_)
      fail(from, "more text than " + std::to_string(limits_.max_bytes) + " bytes after its aliases are expanded");
    bytes_left_ -= from.text.size();
    std::string error;
    if (!yaml_construct_scalar(type_of(from), from.text, from.tag.empty(), out, &error)) fail(from, error);
  }

  void sequence(std::size_t position, Node* out) {
    if (type_of(nodes_[position]) != "seq") fail(nodes_[position], "a list with the tag " + nodes_[position].tag);
    out->kind = Node::Kind::kList;
    const std::size_t n = nodes_[position].children.size();
    for (std::size_t i = 0; i < n; ++i) {
      path_.push_back("[" + std::to_string(i) + "]");
      build(nodes_[position].children[i], &out->items.emplace_back());
      path_.pop_back();
    }
  }

  void mapping(std::size_t position, Node* out) {
    if (type_of(nodes_[position]) != "map") fail(nodes_[position], "a mapping with the tag " + nodes_[position].tag);
    flatten(position, 0);
    out->kind = Node::Kind::kMap;
    std::vector<std::string> identity;
    const std::vector<std::size_t>& pairs = nodes_[position].children;  // build() adds no nodes
    for (std::size_t i = 0; i < pairs.size(); i += 2) {
      const YamlNode& key = nodes_[pairs[i]];
      identity.push_back(add_key(key, out));
      path_.push_back(out->keys.back());
      build(pairs[i + 1], &out->items.emplace_back());
      path_.pop_back();
    }
    const EqualKeys groups = equal_keys(identity);
    list_duplicates(position, groups, *out);
    merge_equal_keys(groups, out);
  }

  /// Appends the text of a key, and says which keys it equals in Python: 1, 1.0 and true are one key, "1" is another.
  std::string add_key(const YamlNode& key, Node* out) {
    if (key.kind != YamlNode::Kind::kScalar) fail(key, "a list or a mapping as a key");
    std::string_view type = type_of(key);
    if (type == "value") type = "str";
    Node value;
    std::string error;
    if (!yaml_construct_scalar(type, key.text, key.tag.empty(), &value, &error)) fail(key, error);
    out->key_lines.push_back(key.mark.line + 1);
    switch (value.kind) {
      case Node::Kind::kNull: out->keys.emplace_back("null"); return "null";
      case Node::Kind::kBool:
        out->keys.emplace_back(value.boolean ? "true" : "false");
        return value.boolean ? "i1" : "i0";
      case Node::Kind::kNumber: break;
      default: out->keys.push_back(value.text); return "s" + value.text;
    }
    const std::optional<std::int64_t> whole = value.as_int();
    const bool is_int = yaml_implicit_type(value.text) == "int";
    out->keys.push_back(whole && is_int ? std::to_string(*whole) : value.text);
    if (whole) return "i" + std::to_string(*whole);
    const double real = value.as_double().value_or(0);
    std::uint64_t bits;
    std::memcpy(&bits, &real, sizeof bits);
    return real == real ? "f" + std::to_string(bits) : "nan" + std::to_string(out->keys.size());
  }

  void list_duplicates(std::size_t position, const EqualKeys& groups, const Node& map) {
    if (!duplicates_ || listed_[position]) return;
    listed_[position] = 1;
    std::string path;
    for (const std::string& part : path_) path.append(path.empty() || part[0] == '[' ? "" : ".").append(part);
    std::vector<DuplicateKey> found;
    for (const std::vector<std::size_t>& group : groups) {
      // What a merge key brought in is meant to be overridden.
      const auto own = std::find_if(group.begin(), group.end(), [&](std::size_t i) { return i >= merged_[position]; });
      for (auto again = own; again != group.end(); ++again) {
        if (again == own) continue;
        const std::string full = path + (path.empty() ? "" : ".") + map.keys[*again];
        found.push_back({full, map.key_lines[*again], map.key_lines[*own]});
      }
    }
    std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.line < b.line; });
    duplicates_->insert(duplicates_->end(), found.begin(), found.end());
  }

  /// Removes the pairs whose key is `<<` and returns their values.
  std::vector<std::size_t> take_merge_values(std::size_t position) {
    std::vector<std::size_t>& pairs = nodes_[position].children;
    std::vector<std::size_t> values;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < pairs.size(); i += 2) {
      const YamlNode& key = nodes_[pairs[i]];
      if (key.kind == YamlNode::Kind::kScalar && type_of(key) == "merge") {
        values.push_back(pairs[i + 1]);
      } else {
        pairs[kept++] = pairs[i];
        pairs[kept++] = pairs[i + 1];
      }
    }
    pairs.resize(kept);
    return values;
  }

  /// Replaces `<<: mapping` and `<<: [mappings]` by their pairs, in front: what the mapping says itself wins, and of a
  /// list the first.
  void flatten(std::size_t position, int depth) {
    if (depth > limits_.max_depth) fail(nodes_[position], "merge keys nested too deeply");
    std::vector<std::size_t> merged;
    const auto append = [&](const std::vector<std::size_t>& pairs) {
      if (merged.size() + pairs.size() > 2 * limits_.max_nodes || pairs_left_ < pairs.size()) {
        fail(nodes_[position], "merge keys that expand to too many pairs");
      }
      pairs_left_ -= pairs.size();
      merged.insert(merged.end(), pairs.begin(), pairs.end());
    };
    for (const std::size_t value : take_merge_values(position)) {
      if (nodes_[value].kind == YamlNode::Kind::kMapping) {
        flatten(value, depth + 1);
        append(nodes_[value].children);
        continue;
      }
      if (nodes_[value].kind != YamlNode::Kind::kSequence)
        fail(nodes_[value], "'<<' wants a mapping or a list of mappings");
      const std::vector<std::size_t> items = nodes_[value].children;
      for (const std::size_t item : items) {
        if (nodes_[item].kind != YamlNode::Kind::kMapping)
          fail(nodes_[item], "'<<' wants a mapping or a list of mappings");
        flatten(item, depth + 1);
      }
      for (std::size_t j = items.size(); j-- > 0;) append(nodes_[items[j]].children);
    }
    if (merged.empty()) return;
    std::vector<std::size_t>& pairs = nodes_[position].children;
    pairs.insert(pairs.begin(), merged.begin(), merged.end());
    merged_[position] = merged.size() / 2;
  }

  std::vector<YamlNode> nodes_;
  std::vector<char> open_;           // is being built: a second visit is a cycle
  std::vector<char> listed_;         // its duplicate keys are listed (an alias is built again)
  std::vector<std::size_t> merged_;  // pairs in front that a merge key brought
  std::vector<std::string> path_;
  std::vector<DuplicateKey>* duplicates_;
  TextLimits limits_;
  std::size_t nodes_left_, bytes_left_, pairs_left_ = 2'000'000;
};

}  // namespace

bool parse_yaml(std::string_view text, Node* out, std::vector<DuplicateKey>* duplicates, TextError* error,
                const TextLimits& limits) {
  *out = Node();
  const std::size_t most = std::min(limits.max_bytes, kMaxYamlBytes);
  if (text.size() > most) {
    *error = {0, 0, "larger than " + std::to_string(most) + " bytes"};
    return false;
  }
  try {
    YamlGraph graph = parse_yaml_graph(text, limits);
    if (graph.empty) return true;
    const std::size_t root = graph.root;
    TreeBuilder(std::move(graph), duplicates, limits).build(root, out);
    return true;
  } catch (YamlFault& fault) {
    *out = Node();
    *error = std::move(fault.error);
    return false;
  }
}

}  // namespace moeaudit
