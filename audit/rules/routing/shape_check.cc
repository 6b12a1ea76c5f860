#include "audit/rules/routing/shape_check.h"

#include <algorithm>

#include "audit/rules/say.h"

namespace moeaudit::routing {
namespace {

bool plain_float(DType t) {
  return t == DType::kF64 || t == DType::kF32 || t == DType::kBF16 || t == DType::kF16 || t == DType::kF8E4M3 ||
         t == DType::kF8E5M2;
}

template <class T>
const T* from_config(Facts& f, const Fact<T>& fact) {
  const T* value = f.want(fact);
  return value && fact.source().role != Role::kModelWeights ? value : nullptr;
}

std::string leaf_key(const Source& source, const char* otherwise) {
  const std::size_t dot = source.key.rfind('.');
  if (source.key.empty()) return otherwise;
  return dot == std::string::npos ? source.key : source.key.substr(dot + 1);
}

struct Comparison {
  const Fact<std::int64_t>* fact;
  const char* key;
  std::int64_t found;
  const char* what;
};

Disagreement describe(const Comparison& c, const RouterTable& t, std::size_t i) {
  Disagreement d;
  d.what = std::string(c.fact->info().name) + " is " + std::to_string(c.fact->value()) + say::at(c.fact->source()) +
           ", " + t.tensor[i] + " of layer " + std::to_string(t.layer[i]) + " " + c.what + " " +
           std::to_string(c.found);
  d.key = leaf_key(c.fact->source(), c.key);
  d.value = std::to_string(c.found);
  d.config = say::evidence(*c.fact);
  d.tensor = {"in the tensors", std::to_string(c.found), {t.file[i], 0, "", t.tensor[i]}};
  return d;
}

void compare_sizes(Facts& f, const RouterTable& t, std::vector<Disagreement>* out) {
  const std::int64_t* experts = from_config(f, f->num_experts);
  const std::int64_t* hidden = from_config(f, f->hidden_size);
  const std::int64_t* extra = f.want(f->extra_rows);
  bool experts_told = !experts, hidden_told = !hidden;
  for (std::size_t i = 0; i < t.layer.size(); ++i) {
    const bool readable = plain_float(t.dtype[i]);  // packed 4-bit weights do not have the shape of the matrix
    // Fewer experts than the router has rows are missing tensors (CK003); more than the config says are not.
    if (!experts_told && readable && t.experts[i] != *experts + (extra ? *extra : 0)) {
      out->push_back(describe({&f->num_experts, "num_experts", t.experts[i] - (extra ? *extra : 0), "has rows for"}, t, i));
      experts_told = true;
    } else if (!experts_told && t.expert_count[i] > *experts) {
      out->push_back(
          describe({&f->num_experts, "num_experts", t.expert_count[i], "stands beside experts numbering"}, t, i));
      experts_told = true;
    }
    if (!hidden_told && readable && t.hidden[i] >= 0 && t.hidden[i] != *hidden) {
      out->push_back(describe({&f->hidden_size, "hidden_size", t.hidden[i], "has columns for"}, t, i));
      hidden_told = true;
    } else if (!hidden_told && t.expert_hidden[i] >= 0 && t.expert_hidden[i] != *hidden) {
      out->push_back(
          describe({&f->hidden_size, "hidden_size", t.expert_hidden[i], "stands beside experts of width"}, t, i));
      hidden_told = true;
    }
  }
}

bool in_layer(const std::string& tensor, std::int64_t layer) {
  return tensor.find("layers." + std::to_string(layer) + ".") != std::string::npos;
}

/// Layers where the config has experts, the files have no router, and the files have another MLP there: not merely
/// missing.
std::vector<std::int64_t> dense_in_files(Facts& f, const std::vector<std::int64_t>& moe_layers, const RouterTable& t) {
  std::vector<std::int64_t> dense;
  const TensorDiff* diff = f.want(f->tensor_diff);
  if (!diff) return dense;
  for (std::int64_t layer : moe_layers) {
    if (std::find(t.layer.begin(), t.layer.end(), static_cast<int>(layer)) != t.layer.end()) continue;
    const bool other = std::any_of(diff->unexpected.begin(), diff->unexpected.end(), [&](const std::string& name) {
      return in_layer(name, layer) && name.find("mlp") != std::string::npos;
    });
    if (other) dense.push_back(layer);
  }
  return dense;
}

void compare_layers(Facts& f, const RouterTable& t, std::vector<Disagreement>* out) {
  const std::vector<std::int64_t>* moe_layers = from_config(f, f->moe_layers);
  if (!moe_layers) return;
  std::vector<std::int64_t> only_tensors;
  for (int layer : t.layer) {
    if (std::find(moe_layers->begin(), moe_layers->end(), layer) == moe_layers->end()) only_tensors.push_back(layer);
  }
  const std::vector<std::int64_t> only_config = dense_in_files(f, *moe_layers, t);
  if (only_tensors.empty() && only_config.empty()) return;
  Disagreement d;
  d.what = "the config puts experts in layers " + to_text(*moe_layers) + say::at(f->moe_layers.source()) +
           (only_tensors.empty() ? "" : ", the files also in " + to_text(only_tensors)) +
           (only_config.empty() ? "" : ", and the files have a dense MLP in " + to_text(only_config));
  d.config = say::evidence(f->moe_layers);
  d.tensor = {
      "layers with a router in the tensors", to_text(std::vector<std::int64_t>(t.layer.begin(), t.layer.end())), {}};
  out->push_back(std::move(d));
}

}  // namespace

std::vector<Disagreement> disagreements(Facts& f) {
  std::vector<Disagreement> found;
  const RouterTable* table = f.require(f->routers);
  if (!table || table->layer.empty()) return found;
  compare_sizes(f, *table, &found);
  compare_layers(f, *table, &found);
  return found;
}

}  // namespace moeaudit::routing
