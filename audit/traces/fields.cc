#include "audit/traces/fields.h"

namespace moeaudit {
namespace {

std::string shown(const Node& n) {
  switch (n.kind) {
    case Node::Kind::kNull: return "null";
    case Node::Kind::kBool: return n.boolean ? "true" : "false";
    case Node::Kind::kNumber: return n.text.substr(0, 40);
    case Node::Kind::kString: return "\"" + n.text.substr(0, 40) + "\"";
    case Node::Kind::kList: return "a list";
    case Node::Kind::kMap: return "an object";
  }
  return "?";
}

}  // namespace

const Node* Fields::find(std::string_view key) const {
  const Node* node = map_.is_map() ? map_.find(key) : nullptr;
  return node && !node->is_null() ? node : nullptr;
}

void Fields::refuse(const Node& node, std::string_view key, std::string_view expected) {
  ok_ = false;
  problems_->push_back({file_, line_ > 0 ? line_ : node.line, node.column,
                        "\"" + std::string(key) + "\" is " + shown(node) + ", not " + std::string(expected),
                        "docs/trace.md says what the key holds; leave it out where it is not known"});
}

void Fields::text(std::string_view key, std::string* out) {
  const Node* node = find(key);
  if (!node) return;
  if (!node->is_string()) return refuse(*node, key, "a string");
  *out = node->text;
}

void Fields::flag(std::string_view key, std::optional<bool>* out) {
  const Node* node = find(key);
  if (!node) return;
  *out = node->as_bool();
  if (!*out) refuse(*node, key, "true or false");
}

void Fields::number(std::string_view key, std::optional<double>* out) {
  const Node* node = find(key);
  if (!node) return;
  *out = node->as_double();
  if (!*out) refuse(*node, key, "a number");
}

void Fields::integer(std::string_view key, std::optional<std::int64_t>* out, std::int64_t least, std::int64_t most) {
  const Node* node = find(key);
  if (!node) return;
  const std::optional<std::int64_t> value = node->as_int();
  if (!value || *value < least || *value > most) {
    std::string range = "an integer of at least " + std::to_string(least);
    if (most < std::numeric_limits<std::int64_t>::max()) range += " and at most " + std::to_string(most);
    return refuse(*node, key, range);
  }
  *out = value;
}

const Node* Fields::map(std::string_view key) {
  const Node* node = find(key);
  if (!node || node->is_map()) return node;
  refuse(*node, key, "an object");
  return nullptr;
}

const Node* Fields::list(std::string_view key) {
  const Node* node = find(key);
  if (!node || node->is_list()) return node;
  refuse(*node, key, "a list");
  return nullptr;
}

}  // namespace moeaudit
