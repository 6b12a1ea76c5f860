// From the arena of the pickle machine to a tree of shared nodes: a cycle is seen before it could leak, and what the
// stream made and dropped costs nothing.
#include "audit/inputs/pickle.h"

#include <algorithm>

#include "audit/inputs/pickle_machine.h"
#include "audit/tensors/zip.h"

namespace moeaudit {
namespace {

using Kind = PickleNode::Kind;

constexpr std::size_t kMaxFileBytes = std::size_t{16} << 20;
constexpr std::size_t kMaxTreeNodes = 1'000'000;
constexpr int kMaxDepth = 100;

/// Arena to tree: cycles are refused, shared nodes stay shared, depth and the size as a tree are bounded.
class TreeMaker {
 public:
  explicit TreeMaker(std::vector<PickleCell>* arena)
      : arena_(arena), done_(arena->size()), size_(arena->size()), height_(arena->size()), open_(arena->size()) {}

  std::shared_ptr<PickleNode> make(PicklePosition p, int depth) {
    if (done_[p]) return done_[p];
    if (open_[p]) throw PickleRefused{"an object that contains itself"};
    if (depth > kMaxDepth) throw PickleRefused{"objects nested deeper than " + std::to_string(kMaxDepth) + " levels"};
    open_[p] = 1;
    PickleCell& cell = (*arena_)[p];
    auto node = std::make_shared<PickleNode>();
    node->kind = cell.kind;
    node->boolean = cell.boolean;
    node->integer = cell.integer;
    node->real = cell.real;
    node->text = std::move(cell.text);
    std::size_t size = 1;
    const auto child = [&](PicklePosition c) {
      std::shared_ptr<PickleNode> made = make(c, depth + 1);
      size += size_[c];
      height_[p] = std::max(height_[p], height_[c] + 1);
      if (height_[p] > kMaxDepth)
        throw PickleRefused{"objects nested deeper than " + std::to_string(kMaxDepth) + " levels"};
      if (size > kMaxTreeNodes)
        throw PickleRefused{"more than " + std::to_string(kMaxTreeNodes) +
                            " values where shared ones are counted each time"};
      return made;
    };
    for (const PicklePosition c : cell.items) node->items.push_back(child(c));
    for (const auto& [key, value] : cell.entries) {
      std::shared_ptr<PickleNode> k = child(key);
      node->entries.emplace_back(std::move(k), child(value));
    }
    size_[p] = size;
    open_[p] = 0;
    return done_[p] = node;
  }

 private:
  std::vector<PickleCell>* arena_;
  std::vector<std::shared_ptr<PickleNode>> done_;
  std::vector<std::size_t> size_;
  std::vector<int> height_;
  std::vector<char> open_;
};

/// One pickle; `used` is where it ends.
bool read_one(std::string_view bytes, std::shared_ptr<PickleNode>* out, std::size_t* used, std::string* error) {
  PickleMachine machine(bytes);
  try {
    const PicklePosition root = machine.run();
    *used = machine.end();
    *out = TreeMaker(machine.arena()).make(root, 0);
    return true;
  } catch (const PickleRefused& refused) {
    *error = refused.what + " (byte " + std::to_string(machine.opcode_at()) + " of the pickle)";
    return false;
  }
}

/// torch.save before 1.6 wrote no zip, but pickles one after another: a magic number, a version, system information,
/// the object (torch/serialization.py, _legacy_save).
constexpr std::string_view kLegacyMagic = "119547037146038801333356";

}  // namespace

const PickleNode* PickleNode::find(std::string_view key) const {
  for (std::size_t i = entries.size(); i-- > 0;) {  // the last one wins, as in a dict
    if (entries[i].first->kind == Kind::kString && entries[i].first->text == key) return entries[i].second.get();
  }
  return nullptr;
}

bool read_pickle(std::string_view bytes, std::shared_ptr<PickleNode>* out, std::string* error) {
  std::size_t used = 0;
  if (!read_one(bytes, out, &used, error)) return false;
  if ((*out)->kind != Kind::kString || (*out)->text != kLegacyMagic) return true;
  for (int i = 0; i < 3; ++i) {
    bytes.remove_prefix(used);
    if (!read_one(bytes, out, &used, error)) return false;
  }
  return true;
}

bool read_torch_pickle(const std::string& path, std::shared_ptr<PickleNode>* out, std::string* error) {
  std::string bytes, why;
  if (!read_file(path, &bytes, error, kMaxFileBytes)) return false;
  std::string_view pickle = bytes;
  if (looks_like_zip(bytes) && !find_zip_entry(bytes, "data.pkl", &pickle, &why)) {
    *error = path + ": " + why;
    return false;
  }
  if (read_pickle(pickle, out, &why)) return true;
  *error = path + ": " + why;
  return false;
}

}  // namespace moeaudit
