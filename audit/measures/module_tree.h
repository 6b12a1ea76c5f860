// The modules and parameters that a model has in memory under one release of transformers, built from its family and its
// numbers instead of from a running model: what PEFT walks over when it looks for targets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "audit/families/family.h"
#include "audit/tensors/tensor_store.h"

namespace moeaudit {

/// What releases of transformers make of one family.
struct MemoryLayout {
  bool router_is_linear = true;  // the router is nn.Linear; else a module with a bare weight
  bool experts_fused = false;    // routed experts are 3-D parameters of one module; else one nn.Linear each
  bool operator==(const MemoryLayout&) const = default;
};

struct ModelModule {
  /// What PEFT can do with it: LoRA dispatches on nn.Linear and nn.Embedding; every other type is refused.
  enum class Kind { kLinear, kEmbedding, kContainer, kOther };
  std::string path;
  Kind kind = Kind::kContainer;
  Part part = Part::kOther;
  int layer = -1;
  int expert = -1;
  std::int64_t in = 0, out = 0;  // 0 unknown; an embedding maps vocabulary to hidden
};

struct ModelParameter {
  std::string path;                 // "model.layers.0.mlp.experts.gate_up_proj"
  int module = -1;                  // index of the module that holds it
  std::vector<std::int64_t> shape;  // -1 unknown
};

struct ModuleTree {
  std::vector<ModelModule> modules;  // each after its parent
  std::vector<ModelParameter> parameters;
  bool has_towers = false;          // vision, audio: not among the modules
  std::vector<std::string> towers;  // the paths of their modules as the files have them; empty without files
  bool towers_listed = false;       // these are all, by their names in memory: no name of a tower is missing in the files
};

/// `store` may be empty; if not, it fills in sizes the family does not know (attention heads, vocabulary) and says which of
/// the family's alternatives (q_proj or q_a_proj) the model has. Without it all alternatives are listed.
/// Modules without parameters (activations, rotary embeddings, dropout) are not in the tree.
ModuleTree build_module_tree(const Family& family, const FamilyShape& shape, const MemoryLayout& layout,
                             const TensorStore& store);

}  // namespace moeaudit
