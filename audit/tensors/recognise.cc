#include "audit/tensors/recognise.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <set>
#include <string_view>

namespace moeaudit {
namespace {

/// A tensor name cut at its first number (the layer) and at a number behind "...expert..." (the expert).
struct Place {
  std::string_view layer_path;  // "model.layers.3"
  std::string_view rest;        // "mlp.experts.5.up_proj.weight"
  int layer = -1;
  int expert = -1;
};

bool contains(std::string_view text, std::string_view word) { return text.find(word) != std::string_view::npos; }

Place place_of(std::string_view name) {
  Place place;
  std::string_view previous;
  for (std::size_t from = 0; from < name.size();) {
    const std::size_t dot = std::min(name.find('.', from), name.size());
    const std::string_view part = name.substr(from, dot - from);
    int number = -1;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    const bool is_number = error == std::errc() && end == part.data() + part.size() && number >= 0;
    if (is_number && place.layer < 0) {
      place.layer = number;
      place.layer_path = name.substr(0, dot);
      place.rest = name.substr(std::min(dot + 1, name.size()));
    } else if (is_number && place.expert < 0 && contains(previous, "expert") && !contains(previous, "shared")) {
      place.expert = number;
    }
    previous = part;
    from = dot + 1;
  }
  return place;
}

struct Layer {
  int index = -1;
  std::set<int> experts;
  std::vector<const TensorView*> expert_tensors;  // of expert 0, or the stacks
  std::vector<const TensorView*> stacks;          // every 3-D tensor
  std::vector<const TensorView*> matrices;        // what may be a router
};

bool is_router_name(std::string_view name) {
  return contains(name, "router") || contains(name, ".gate.") || contains(name, "gating") || contains(name, ".wg.");
}

bool has_dimension(const std::vector<const TensorView*>& tensors, std::int64_t d) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [&](const TensorView* t) { return std::find(t->shape.begin(), t->shape.end(), d) != t->shape.end(); });
}

/// [E, d] with d among the experts' dimensions; one whose name says so wins.
const TensorView* find_router(const Layer& layer, std::int64_t experts, const std::vector<const TensorView*>& of) {
  const TensorView* found = nullptr;
  for (const TensorView* m : layer.matrices) {
    if (m->shape[0] != experts || !has_dimension(of, m->shape[1])) continue;
    if (!found || (is_router_name(m->name) && !is_router_name(found->name))) found = m;
  }
  return found;
}

const TensorView* find_bias(const TensorStore& model, const TensorView& router, std::int64_t experts) {
  const std::string_view module = router.name.substr(0, router.name.rfind('.'));
  for (const char* leaf : {".e_score_correction_bias", ".expert_bias"}) {
    const TensorView* bias = model.find(std::string(module) + leaf);
    if (bias && bias->elements() == experts) return bias;
  }
  return nullptr;
}

void add_row(const TensorStore& model, const Layer& layer, std::int64_t experts, const TensorView& router, bool fused, Recognised* out) {
  const TensorView* bias = find_bias(model, router, experts);
  RouterTable& t = out->table;
  t.layer.push_back(layer.index);
  t.tensor.emplace_back(router.name);
  t.file.push_back(model.files()[router.file]);
  t.dtype.push_back(router.dtype);
  t.experts.push_back(router.shape[0]);
  t.hidden.push_back(router.shape[1]);
  t.expert_count.push_back(experts);
  t.expert_hidden.push_back(router.shape[1]);
  t.fused.push_back(fused);
  t.bias.emplace_back(bias ? bias->name : std::string_view());
  out->moe_layers.push_back(layer.index);
}

void judge(const TensorStore& model, const Layer& layer, Recognised* out) {
  const std::int64_t count = static_cast<std::int64_t>(layer.experts.size());
  const bool complete = count >= 2 && *layer.experts.begin() == 0 && *layer.experts.rbegin() == count - 1;
  if (complete) {
    if (const TensorView* router = find_router(layer, count, layer.expert_tensors)) {
      add_row(model, layer, count, *router, false, out);
      return;
    }
  }
  for (const TensorView* stack : layer.stacks) {
    const std::int64_t experts = stack->shape[0];
    if (experts < 2) continue;
    const TensorView* router = find_router(layer, experts, {stack});
    if (!router || !(contains(stack->name, "expert") || is_router_name(router->name))) continue;
    add_row(model, layer, experts, *router, true, out);
    return;
  }
}

}  // namespace

Recognised recognise_moe(const TensorStore& model) {
  std::map<std::pair<int, std::string_view>, Layer> layers;  // several towers may have a layer 3
  for (std::size_t i = 0; i < model.size(); ++i) {
    const TensorView& t = model[i];
    const Place place = place_of(t.name);
    if (place.layer < 0) continue;
    Layer& layer = layers[{place.layer, place.layer_path}];
    layer.index = place.layer;
    if (place.expert >= 0) {
      layer.experts.insert(place.expert);
      if (place.expert == 0) layer.expert_tensors.push_back(&t);
    } else if (t.shape.size() == 3) {
      layer.stacks.push_back(&t);
    } else if (t.shape.size() == 2) {
      layer.matrices.push_back(&t);
    }
  }
  Recognised out;
  for (const auto& [key, layer] : layers) judge(model, layer, &out);
  out.moe_layers.erase(std::unique(out.moe_layers.begin(), out.moe_layers.end()), out.moe_layers.end());
  out.layers = static_cast<int>(out.moe_layers.size());
  if (out.layers > 0) {
    out.experts = out.table.experts.front();
    out.hidden = out.table.hidden.front();
    out.router_tensor = out.table.tensor.front();
  }
  return out;
}

}  // namespace moeaudit
