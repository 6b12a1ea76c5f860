// The modules of an adapter_model.safetensors: pairs of LoRA matrices and modules that were saved whole.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "audit/facts/fact_sheet.h"
#include "audit/families/family.h"
#include "audit/tensors/tensor_store.h"

namespace moeaudit {

/// One adapted module or parameter. For a stack of experts (PEFT's ParamWrapper, tuners/lora/layer.py) A is [copies * rank,
/// in] with the expert as the slow index of its rows, B is [out, rank * copies] with the expert as the fast index of its
/// columns.
struct AdapterFileModule {
  std::string path;             // in memory: "model.layers.0.mlp.experts.gate_up_proj"
  NamedPart part;
  const TensorView* a = nullptr;
  const TensorView* b = nullptr;
  bool embedding = false;       // B A is [hidden, vocabulary]: the weight gets its transpose
  std::int64_t rank = 0;        // 0: saved whole (modules_to_save)
  std::int64_t in = 0, out = 0;
  std::int64_t copies = 1;      // experts of a stack
  std::int64_t parameters = 0;  // of everything the file holds for it
  bool is_parameter = false;    // a stack: reached through target_parameters
};

struct AdapterFile {
  std::vector<AdapterFileModule> modules;  // by layer, then path
  std::vector<std::pair<std::string, const TensorView*>> whole;  // tensors that are no LoRA matrices, by their name in memory
  bool magnitudes = false;                 // of DoRA
  std::vector<AdapterFileModule> incomplete;  // A or B missing, or of ranks that do not agree; in the order of their names
};

/// What adapter_config.json says: it goes with the file, whatever a config written for another run says.
template <class T>
const T* of_adapter_config(const Fact<T>& fact) {
  if (!fact.known() || fact.source().role == Role::kAdapterConfig) return fact.get();
  for (auto s = fact.shadowed().rbegin(); s != fact.shadowed().rend(); ++s) {
    if (s->source.role == Role::kAdapterConfig) return &s->value;
  }
  return fact.get();
}

/// `family` may be null. `facts` gives the shape that tells the wrappers of one expert module apart, and modules_to_save,
/// without which a whole embedding or head in the file is taken for a copy that PEFT saves along, not for a trained one.
AdapterFile read_adapter_file(const TensorStore& adapter, const Family* family, const FactSheet& facts);

}  // namespace moeaudit
