// parse_json(): the tree of text.h on top of the pull parser.
#include <algorithm>

#include "audit/text/json_pull.h"
#include "audit/text/map_keys.h"
#include "audit/text/text.h"

namespace moeaudit {
namespace {

using Token = JsonPull::Token;

class TreeBuilder {
 public:
  TreeBuilder(std::string_view text, std::vector<DuplicateKey>* duplicates, const TextLimits& limits)
      : pull_(text, limits.max_depth), duplicates_(duplicates), nodes_left_(limits.max_nodes), limits_(limits) {}

  bool build(Node* out, TextError* error) {
    *out = Node();
    const bool ok = value(pull_.next(), out) && pull_.next() == Token::kEnd;
    if (!ok) *error = too_many_ ? too_many() : pull_.error();
    return ok;
  }

 private:
  bool value(Token token, Node* node) {
    if (token == Token::kError) return false;
    if (nodes_left_ == 0) {
      too_many_ = true;
      return false;
    }
    --nodes_left_;
    node->line = pull_.line();
    node->column = pull_.column();
    switch (token) {
      case Token::kString: node->kind = Node::Kind::kString; break;
      case Token::kNumber: node->kind = Node::Kind::kNumber; break;
      case Token::kTrue:
      case Token::kFalse:
        node->kind = Node::Kind::kBool;
        node->boolean = token == Token::kTrue;
        return true;
      case Token::kNull: return true;
      case Token::kArrayBegin: return list(node);
      case Token::kObjectBegin: return map(node);
      default: return false;  // not possible where a value was expected
    }
    node->text = pull_.text();
    return true;
  }

  bool list(Node* node) {
    node->kind = Node::Kind::kList;
    open_.push_back(node);
    for (;;) {
      const Token token = pull_.next();
      if (token == Token::kArrayEnd) break;
      if (!value(token, &node->items.emplace_back())) return false;
    }
    open_.pop_back();
    return true;
  }

  bool map(Node* node) {
    node->kind = Node::Kind::kMap;
    open_.push_back(node);
    for (;;) {
      const Token token = pull_.next();
      if (token == Token::kObjectEnd) break;
      if (token != Token::kKey) return false;
      node->keys.emplace_back(pull_.text());
      node->key_lines.push_back(pull_.line());
      if (!value(pull_.next(), &node->items.emplace_back())) return false;
    }
    merge_duplicates(node);
    open_.pop_back();
    return true;
  }

  void merge_duplicates(Node* node) {
    const EqualKeys groups = equal_keys(node->keys);
    std::vector<DuplicateKey> found;
    for (const std::vector<std::size_t>& group : groups) {
      const std::string path = path_to(node->keys[group.front()]);
      for (std::size_t i = 1; i < group.size(); ++i) {
        found.push_back({path, node->key_lines[group[i]], node->key_lines[group.front()]});
      }
    }
    std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.line < b.line; });
    if (duplicates_) duplicates_->insert(duplicates_->end(), found.begin(), found.end());
    merge_equal_keys(groups, node);
  }

  /// open_ ends with the map that is being closed; what is open in each of the others is its last item.
  std::string path_to(const std::string& key) const {
    std::string path;
    for (std::size_t i = 0; i + 1 < open_.size(); ++i) {
      const Node& node = *open_[i];
      if (node.kind == Node::Kind::kMap) {
        path.append(path.empty() ? "" : ".").append(node.keys.back());
      } else {
        path.append("[").append(std::to_string(node.items.size() - 1)).append("]");
      }
    }
    return path.append(path.empty() ? "" : ".").append(key);
  }

  TextError too_many() const {
    return {pull_.line(), pull_.column(), "more than " + std::to_string(limits_.max_nodes) + " values"};
  }

  JsonPull pull_;
  std::vector<DuplicateKey>* duplicates_;
  std::size_t nodes_left_;
  TextLimits limits_;
  bool too_many_ = false;
  std::vector<const Node*> open_;
};

}  // namespace

bool parse_json(std::string_view text, Node* out, std::vector<DuplicateKey>* duplicates, TextError* error,
                const TextLimits& limits) {
  if (text.size() > limits.max_bytes) {
    *error = {0, 0, "larger than " + std::to_string(limits.max_bytes) + " bytes"};
    return false;
  }
  return TreeBuilder(text, duplicates, limits).build(out, error);
}

}  // namespace moeaudit
