#include "audit/measures/module_tree.h"

#include <algorithm>
#include <set>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace moeaudit {
namespace {

std::string_view parent_of(std::string_view path) {
  const std::size_t dot = path.rfind('.');
  return dot == std::string_view::npos ? std::string_view() : path.substr(0, dot);
}
std::string_view leaf_of(std::string_view path) { return path.substr(path.rfind('.') + 1); }  // npos + 1 == 0
bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

class Builder {
 public:
  explicit Builder(ModuleTree& tree) : tree_(tree) {}

  /// Index of the module, created with its parents if needed.
  int module(std::string_view path) {
    if (const auto known = index_.find(std::string(path)); known != index_.end()) return known->second;
    if (const std::string_view parent = parent_of(path); !parent.empty()) module(parent);
    const int index = static_cast<int>(tree_.modules.size());
    tree_.modules.push_back({});
    tree_.modules.back().path = std::string(path);
    index_.emplace(path, index);
    return index;
  }

 private:
  ModuleTree& tree_;
  std::unordered_map<std::string, int> index_;
};

/// MXFP4 blocks are unpacked before training (Mxfp4Config(dequantize=True)); in memory there is the plain stack.
bool is_packed(std::string_view name) { return ends_with(name, "_blocks") || ends_with(name, "_scales"); }

bool is_present(const ExpandedTensor& t, const TensorStore& store) {
  if (is_packed(t.name)) return false;
  if (t.alternatives.empty() || store.empty() || store.find(t.name) != nullptr) return true;
  return std::all_of(t.alternatives.begin(), t.alternatives.end(),
                     [&](const std::string& other) { return is_packed(other) || store.find(other) == nullptr; });
}

/// Tensors that some layers do without (biases, an indexer, n-gram embeddings), where the file has the names of memory and not these.
std::unordered_set<std::string> left_out(const std::vector<ExpandedTensor>& tensors, const std::vector<ExpandedTensor>& hub, const TensorStore& store) {
  std::unordered_set<std::string> out;
  const auto in_a_layer = [&](const ExpandedTensor& t, bool optional) { return t.layer >= 0 && t.optional == optional && t.alternatives.empty(); };
  if (std::none_of(tensors.begin(), tensors.end(), [&](const auto& t) { return in_a_layer(t, false) && store.find(t.name) != nullptr; })) return out;
  for (const ExpandedTensor& t : hub) {
    if (in_a_layer(t, true) && store.find(t.name) == nullptr) out.insert(t.name);
  }
  return out;
}

std::vector<std::int64_t> shape_of(const ExpandedTensor& t, const TensorStore& store) {
  const bool complete = std::find(t.shape.begin(), t.shape.end(), -1) == t.shape.end();
  if (complete) return t.shape;
  const TensorView* view = store.find(t.name);
  if (view && (view->dtype == DType::kU8 || view->dtype == DType::kI8 || view->dtype == DType::kI32)) return t.shape;  // packed
  if (!view || view->shape.size() != t.shape.size()) return t.shape;
  return {view->shape.begin(), view->shape.end()};
}

/// `second_set`: what is of no part is a second router or its experts, of the classes of the first.
void describe(ModelModule& m, const ExpandedTensor& t, const std::vector<std::int64_t>& shape, const MemoryLayout& layout, bool second_set) {
  m.part = t.part;
  m.layer = t.layer;
  m.expert = t.expert;
  m.kind = ModelModule::Kind::kOther;
  if (leaf_of(t.name) != "weight" || shape.size() != 2 || t.part == Part::kNorm) return;
  const bool router = t.part == Part::kRouter || (second_set && t.part == Part::kOther);
  if (router && !layout.router_is_linear) return;
  m.kind = t.part == Part::kEmbedding ? ModelModule::Kind::kEmbedding : ModelModule::Kind::kLinear;
  const bool embedding = m.kind == ModelModule::Kind::kEmbedding;  // its weight is [vocabulary, hidden]
  m.in = std::max<std::int64_t>(0, shape[embedding ? 0 : 1]);
  m.out = std::max<std::int64_t>(0, shape[embedding ? 1 : 0]);
}

/// Files and memory may name a tower differently; then the family has both names, and files one of them.
void list_towers(const Family& family, const TensorStore& store, ModuleTree* tree) {
  tree->has_towers = tree->towers_listed = !family.towers.empty();
  std::set<std::string> paths;
  for (const std::string_view pattern : family.towers) {
    bool found = false;
    for (std::size_t i = 0; i < store.size(); ++i) {
      if (!matches_glob(pattern, store[i].name)) continue;
      paths.emplace(parent_of(store[i].name));
      found = true;
    }
    tree->towers_listed &= found;
  }
  tree->towers.assign(paths.begin(), paths.end());
}

}  // namespace

ModuleTree build_module_tree(const Family& family, const FamilyShape& shape, const MemoryLayout& layout,
                             const TensorStore& store) {
  ModuleTree tree;
  Builder builder(tree);
  // Hub names are the module names of transformers 4; a family whose experts are one stack there too has no others.
  // Where they are a stack on the hub as well, memory took other names, if at all, in the release that replaced the router
  // (granitemoe, 5.13).
  const bool stacked_on_hub = std::none_of(family.tensors.begin(), family.tensors.end(), [](const FamilyTensor& t) {
    return t.name.find("{e}") != std::string_view::npos;
  });
  const bool memory_names = layout.experts_fused && !(stacked_on_hub && layout.router_is_linear);
  const auto where = memory_names ? FamilyTensor::Where::kMemory : FamilyTensor::Where::kHub;
  const std::vector<ExpandedTensor> tensors = expand(family, shape, where);
  const std::unordered_set<std::string> absent = left_out(tensors, expand(family, shape, FamilyTensor::Where::kHub), store);
  for (const ExpandedTensor& t : tensors) {
    if (!is_present(t, store) || absent.count(t.name)) continue;
    const std::vector<std::int64_t> dims = shape_of(t, store);
    const int index = builder.module(parent_of(t.name));
    if (ModelModule& m = tree.modules[index]; m.kind == ModelModule::Kind::kContainer || leaf_of(t.name) == "weight") {
      describe(m, t, dims, layout, has_second_set(family));
    }
    // Buffers are not parameters: PEFT does not see them, and neither does the optimizer.
    if (leaf_of(t.name) != "e_score_correction_bias" && leaf_of(t.name) != "tid2eid") tree.parameters.push_back({t.name, index, dims});
  }
  list_towers(family, store, &tree);
  return tree;
}

}  // namespace moeaudit
