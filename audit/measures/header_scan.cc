// Names and shapes in the weight files against the family: routers with their experts, missing and unknown tensors, shapes
// that differ, and the dtypes in which the routed experts are stored.
#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>

#include "audit/behaviours/behaviour.h"
#include "audit/measures/measure.h"
#include "audit/measures/model_shape.h"
#include "audit/measures/tensor_name.h"
#include "audit/tensors/recognise.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 4> kSupplies = {"weights.routers", "weights.tensor_diff", "weights.shapes",
                                                       "weights.expert_storage"};

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// ---- what quantisers add and replace -------------------------------------------------------------------------------

// They stand in for "weight" (GPTQ, AWQ: qweight; compressed-tensors: weight_packed).
constexpr std::array<std::string_view, 2> kPackedLeaves = {"qweight", "weight_packed"};
// They come along with a quantised weight: float8 scales (DeepSeek-V3, compressed-tensors, ModelOpt), bitsandbytes 4-bit and
// int8 statistics, GPTQ/AWQ zeros and groups; and buffers of old savers, which loading ignores.
constexpr std::array<std::string_view, 25> kSideTensors = {
    "weight_scale_inv", "weight_scale", "weight_scale_2", "input_scale", "input_activation_scale", "output_scale", "k_scale", "v_scale",
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4", "SCB", "weight_format", "qzeros", "scales", "g_idx", "weight_shape", "weight_zero_point",
    "weight_g_idx", "weight_global_scale", "input_global_scale", "rotary_emb.inv_freq"};

std::string_view leaf_of(std::string_view name) { return name.substr(name.rfind('.') + 1); }  // npos + 1 == 0

bool is_side_tensor(std::string_view name) {
  return std::any_of(kSideTensors.begin(), kSideTensors.end(), [&](std::string_view leaf) {
    return ends_with(name, leaf) && name.size() > leaf.size() && name[name.size() - leaf.size() - 1] == '.';
  });
}

/// "X.qweight" -> "X.weight"; other names unchanged.
std::string unpacked_name(std::string_view name) {
  for (std::string_view leaf : kPackedLeaves) {
    if (ends_with(name, leaf) && name.size() > leaf.size() && name[name.size() - leaf.size() - 1] == '.') {
      return std::string(name.substr(0, name.size() - leaf.size())) + "weight";
    }
  }
  return std::string(name);
}

/// The tensor, or a quantised one in its place.
bool is_there(const TensorStore& model, const std::string& name) {
  if (model.find(name)) return true;
  if (!ends_with(name, ".weight")) return false;
  const std::string module = name.substr(0, name.size() - 6);
  return std::any_of(kPackedLeaves.begin(), kPackedLeaves.end(), [&](std::string_view leaf) { return model.find(module + std::string(leaf)); });
}

// ---- shapes of the family ------------------------------------------------------------------------------------------

/// Position of a symbol in a family's shape, "E,2*I,H"; -1 if it is not there alone.
int axis_of(std::string_view shape, std::string_view symbol) {
  int axis = 0;
  for (std::size_t from = 0; from <= shape.size(); ++axis) {
    const std::size_t comma = std::min(shape.find(',', from), shape.size());
    if (shape.substr(from, comma - from) == symbol) return axis;
    from = comma + 1;
  }
  return -1;
}

bool is_float(DType d) {
  return d == DType::kF64 || d == DType::kF32 || d == DType::kBF16 || d == DType::kF16 || d == DType::kF8E4M3 || d == DType::kF8E5M2;
}

bool same_shape(const std::vector<std::int64_t>& expected, std::span<const std::int64_t> found) {
  return std::equal(expected.begin(), expected.end(), found.begin(), found.end(),
                    [](std::int64_t e, std::int64_t n) { return e < 0 || e == n; });
}

/// Tensors of the files, and those that have the family's shape.
std::pair<std::size_t, std::size_t> count_found(const TensorStore& model, const std::vector<ExpandedTensor>& expected) {
  std::pair<std::size_t, std::size_t> n;
  for (const ExpandedTensor& t : expected) {
    const TensorView* view = model.find(t.name);
    n.first += view || is_there(model, t.name);
    n.second += view && same_shape(t.shape, view->shape);
  }
  return n;
}

/// The layout, per expert or fused, that the files have: by their names, and where these are the same by their shapes.
struct Layout {
  FamilyTensor::Where where = FamilyTensor::Where::kHub;
  std::vector<ExpandedTensor> expected;
};
Layout layout_of(const TensorStore& model, const Family& family, const FamilyShape& shape, bool reads_older) {
  using Where = FamilyTensor::Where;
  Layout best{Where::kHub, expand(family, shape, Where::kHub)};
  auto most = count_found(model, best.expected);
  for (const Where where : {Where::kMemory, Where::kReleased, Where::kOlder}) {
    if (where == Where::kOlder && !reads_older) continue;
    std::vector<ExpandedTensor> expected = expand(family, shape, where);
    const auto found = count_found(model, expected);
    if (found > most) best = {where, std::move(expected)}, most = found;
  }
  return best;
}

// ---- routers -------------------------------------------------------------------------------------------------------

struct LayerRow {
  const TensorView* router = nullptr;
  bool input_major = false;          // it is [hidden, experts]
  bool of_hidden = true;             // its columns are the hidden size's: not those of the last matrix of an MLP
  const TensorView* bias = nullptr;  // correction bias
  std::set<int> experts;
  std::int64_t stacked = 0;
  std::int64_t expert_hidden = -1;
  bool hidden_agrees = true;  // or one of them is mis-shaped
};

/// A multi-token-prediction layer behind the last one: transformers does not load it, no trainer trains it.
std::set<int> prediction_layers(const TensorStore& model, const FactSheet& f) {
  std::set<int> layers;
  for (std::size_t i = 0; i < model.size(); ++i) {
    if (!ends_with(model[i].name, ".eh_proj.weight")) continue;
    const int layer = pattern_of(model[i].name).layer;
    if (!f.num_layers.known() || layer >= f.num_layers.value()) layers.insert(layer);
  }
  return layers;
}

void add_expert(const TensorView& t, const FamilyTensor& row, const PatternMatch& name, LayerRow* layer) {
  const int experts = axis_of(row.shape, "E"), hidden = axis_of(row.shape, "H");
  if (name.expert >= 0 && !row.beyond) layer->experts.insert(name.expert);
  if (name.expert < 0 && experts >= 0 && experts < static_cast<int>(t.shape.size())) layer->stacked = std::max(layer->stacked, t.shape[experts]);
  // Packed bytes have another shape than the matrix they stand for; MXFP4 blocks keep their outer dimensions.
  const bool shaped = is_float(t.dtype) || ends_with(t.name, "_blocks") || ends_with(t.name, "_scales");
  if (!shaped || hidden < 0 || hidden >= static_cast<int>(t.shape.size())) return;
  if (layer->expert_hidden < 0) layer->expert_hidden = t.shape[hidden];
  layer->hidden_agrees &= layer->expert_hidden == t.shape[hidden];
}

/// A quantiser's side tensors and the experts' linear biases are no weights.
void add_storage(const TensorView& t, ExpertStorage* out) {
  if (ends_with(t.name, "_scales") || ends_with(t.name, "bias")) return;
  std::size_t row = 0;
  while (row < out->dtype.size() && out->dtype[row] != t.dtype) ++row;
  if (row == out->dtype.size()) {
    out->dtype.push_back(t.dtype);
    out->tensors.push_back(0);
    out->elements.push_back(0);
    out->bytes.push_back(0);
    out->example.emplace_back(t.name);
  }
  ++out->tensors[row];
  out->elements[row] += t.elements();
  out->bytes[row] += static_cast<std::int64_t>(t.bytes.size());
}

/// What a name and its pattern have in common: every number and every placeholder is a '#'.
std::string without_numbers(std::string_view name) {
  std::string out;
  for (std::size_t i = 0; i < name.size(); ++i) {
    const bool digit = name[i] >= '0' && name[i] <= '9', placeholder = name[i] == '{';
    if (!digit && !placeholder) {
      out += name[i];
      continue;
    }
    if (placeholder) i = std::min(name.find('}', i), name.size());
    if (out.empty() || out.back() != '#') out += '#';
  }
  return out;
}

/// Rows of `layout` stand before those of the same name in the other one: a stack may be stored either way round. `first_set`: the
/// experts in front of a second set; 0 where there is none.
RouterTable find_routers(const TensorStore& model, const Family& family, FamilyTensor::Where layout, const std::set<int>& skipped,
                         std::int64_t encoder_layers, std::int64_t first_set, ExpertStorage* storage) {
  std::unordered_multimap<std::string, const FamilyTensor*> patterns;
  const auto in_layout = [&](const FamilyTensor& row) {
    return std::any_of(family.tensors.begin(), family.tensors.end(),
                       [&](const FamilyTensor& t) { return t.where == layout && t.name == row.name; });
  };
  for (const FamilyTensor& row : family.tensors) {
    if (row.part != Part::kRouter && row.part != Part::kRoutedExpert) continue;
    if (row.where == layout || !in_layout(row)) patterns.emplace(without_numbers(row.name), &row);
  }
  const std::string_view correction = leaf_of(family.routing.correction_bias_tensor);
  std::map<int, LayerRow> layers;
  for (std::size_t i = 0; i < model.size(); ++i) {
    const TensorView& t = model[i];
    const std::string name = unpacked_name(t.name);
    const auto [first, last] = patterns.equal_range(without_numbers(name));
    for (auto it = first; it != last; ++it) {
      const FamilyTensor& row = *it->second;
      const std::optional<PatternMatch> match = match_pattern(row.name, name, encoder_layers);
      if (!match || match->layer < 0 || skipped.count(match->layer)) continue;
      if (first_set > 0 && match->expert >= first_set) break;
      LayerRow& layer = layers[match->layer];
      if (row.part == Part::kRoutedExpert) {
        add_expert(t, row, *match, &layer);
        add_storage(t, storage);
      } else if (row.shape == "E,H" || row.shape == "H,E" || row.shape == "E+X,H" || row.shape == "E+X,?") {
        layer.router = &t;
        layer.input_major = row.shape == "H,E";
        layer.of_hidden = row.shape.find('H') != std::string_view::npos;
      } else if (!correction.empty() && (leaf_of(row.name) == correction || leaf_of(row.name) == "e_score_correction_bias")) {
        layer.bias = &t;
      }
      break;
    }
  }
  RouterTable out;
  for (const auto& [index, row] : layers) {
    if (!row.router) continue;  // the missing router is in weights.tensor_diff
    const TensorView& router = *row.router;
    const bool plain = is_float(router.dtype) && router.shape.size() == 2;
    out.layer.push_back(index);
    out.tensor.emplace_back(router.name);
    out.file.push_back(model.files()[router.file]);
    out.dtype.push_back(router.dtype);
    out.experts.push_back(plain ? router.shape[row.input_major] : -1);
    out.hidden.push_back(plain && row.of_hidden ? router.shape[!row.input_major] : -1);
    out.input_major.push_back(row.input_major);
    out.expert_count.push_back(row.stacked > 0 ? row.stacked : static_cast<std::int64_t>(row.experts.size()));
    out.expert_hidden.push_back(row.hidden_agrees ? row.expert_hidden : -1);
    out.fused.push_back(row.stacked > 0);
    out.bias.emplace_back(row.bias ? row.bias->name : std::string_view());
  }
  return out;
}

// ---- missing and unexpected ----------------------------------------------------------------------------------------

TensorDiff compare(const TensorStore& model, const Family& family, const std::vector<ExpandedTensor>& expected,
                   const std::set<int>& skipped) {
  std::unordered_map<std::string_view, std::string_view> shard;
  for (const auto& [name, file] : model.missing_in_index()) shard.emplace(name, file);
  TensorDiff diff;
  std::unordered_set<std::string_view> known;
  for (const ExpandedTensor& t : expected) {
    known.insert(t.name);
    const bool excused = t.alternatives.empty() ? t.optional
                                                : std::any_of(t.alternatives.begin(), t.alternatives.end(),
                                                              [&](const std::string& other) { return is_there(model, other); });
    const auto where = shard.find(t.name);
    if (where == shard.end() && (excused || is_there(model, t.name))) continue;
    diff.missing.push_back(t.name);
    diff.missing_shard.emplace_back(where == shard.end() ? std::string_view() : where->second);
  }
  for (const auto& [name, file] : model.missing_in_index()) {
    if (known.count(name)) continue;
    diff.missing.push_back(name);
    diff.missing_shard.push_back(file);
  }
  for (std::size_t i = 0; i < model.size(); ++i) {
    const std::string_view name = model[i].name;
    if (known.count(name) || is_side_tensor(name) || is_known_extra(family, name)) continue;
    if (const std::string plain = unpacked_name(name); plain != name && known.count(plain)) continue;
    if (skipped.count(pattern_of(name).layer)) continue;
    diff.unexpected.emplace_back(name);
  }
  return diff;
}

// ---- shapes --------------------------------------------------------------------------------------------------------

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (std::int64_t n : sizes) text += (text.empty() ? "" : ", ") + (n < 0 ? std::string("?") : std::to_string(n));
  return "[" + text + "]";
}

/// The one axis where they differ; -1 if there is none or several, or if they have not the same number of axes.
int only_difference(const std::vector<std::int64_t>& expected, std::span<const std::int64_t> found) {
  if (expected.size() != found.size()) return -1;
  int axis = -1;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (expected[i] < 0 || expected[i] == found[i]) continue;
    if (axis >= 0) return -1;
    axis = static_cast<int>(i);
  }
  return axis;
}

bool same_sizes_in_another_order(const std::vector<std::int64_t>& expected, std::span<const std::int64_t> found) {
  std::vector<std::int64_t> a = expected, b(found.begin(), found.end());
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
  return a == b;
}

/// The number that all matrices of routed experts are divided by along one axis: the files of one rank of a model that
/// was split over ranks. 0 if there is none.
std::int64_t common_divisor(const ShapeTable& table, const std::vector<std::int64_t>& divisors, std::int64_t experts_judged) {
  std::int64_t divisor = 0, experts = 0;
  for (std::size_t i = 0; i < divisors.size(); ++i) {
    if (divisors[i] < 2 || (divisor != 0 && divisors[i] != divisor)) return 0;
    divisor = divisors[i];
    experts += table.part[i] == Part::kRoutedExpert;
  }
  return experts > 0 && experts == experts_judged ? divisor : 0;
}

ShapeTable compare_shapes(const TensorStore& model, const std::vector<ExpandedTensor>& expected) {
  ShapeTable table;
  std::vector<std::int64_t> divisors;
  std::int64_t experts_judged = 0;
  for (const ExpandedTensor& t : expected) {
    const TensorView* view = model.find(t.name);
    if (!view || !is_float(view->dtype) || t.shape.empty()) continue;
    ++table.judged;
    experts_judged += t.part == Part::kRoutedExpert;
    if (same_shape(t.shape, view->shape)) continue;
    const int axis = only_difference(t.shape, view->shape);
    const std::int64_t found = axis >= 0 ? view->shape[axis] : 0;
    divisors.push_back(found > 0 && t.shape[axis] % found == 0 ? t.shape[axis] / found : 0);
    table.tensor.push_back(t.name);
    table.file.push_back(model.files()[view->file]);
    table.pattern.push_back(pattern_of(t.name).text);
    table.part.push_back(t.part);
    table.expected.push_back(shape_text(t.shape));
    table.found.push_back(shape_text(view->shape));
    table.fault.push_back(same_sizes_in_another_order(t.shape, view->shape) ? ShapeFault::kTransposed : ShapeFault::kOther);
  }
  table.divisor = common_divisor(table, divisors, experts_judged);
  if (table.divisor > 0) table.fault.assign(table.tensor.size(), ShapeFault::kSharded);
  return table;
}

// ---- the measure ---------------------------------------------------------------------------------------------------

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  const TensorStore& model = context.model;
  if (model.empty()) {
    const char* why = "no weights of the model are among the inputs";
    f.routers.explain_unknown(why);
    f.tensor_diff.explain_unknown(why);
    f.weight_shapes.explain_unknown(why);
    f.expert_storage.explain_unknown(why);
    return;
  }
  Source source;
  source.role = Role::kModelWeights;
  source.file = model.files().front();
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  std::set<int> skipped;
  if (family) skipped = prediction_layers(model, f);
  ExpertStorage storage;
  const std::int64_t encoder_layers = f.encoder_layers.known() ? f.encoder_layers.value() : 0;
  FamilyShape shape;
  std::string why = "the family of this model is not known";
  const bool shaped = family && model_shape(f, &shape, &why);
  // What older releases wrote counts as complete where no release that the run may use is known to have stopped reading it.
  const bool reads_older = !family || ask({"transformers", "older_names_read", {{"family", std::string(family->name)}}}, f.transformers.get()).value != "false";
  const Layout layout = shaped ? layout_of(model, *family, shape, reads_older) : Layout{};
  const std::int64_t first_set = family && has_second_set(*family) && f.num_experts.known() ? f.num_experts.value() : 0;
  RouterTable routers = family ? find_routers(model, *family, layout.where, skipped, encoder_layers, first_set, &storage)
                               : recognise_moe(model).table;
  const std::string note = std::to_string(model.size()) + " tensors, " + std::to_string(routers.layer.size()) + " routers" +
                           (family ? "" : ", recognised by shape");
  if (routers.layer.empty()) {
    f.routers.explain_unknown(family ? "the weight files hold no router of family " + f.family.value() : "no experts in the weight files");
  } else {
    source.tensor = routers.tensor.front();
    f.routers.set(std::move(routers), family ? Origin::kMeasured : Origin::kDerived, source);
    source.tensor.clear();
  }
  context.records.push_back({"header_scan", "host", note});
  if (storage.dtype.empty()) f.expert_storage.explain_unknown("no routed expert of a known family is in the weight files");
  else f.expert_storage.set(std::move(storage), Origin::kMeasured, source);

  if (!shaped) {
    f.weight_shapes.explain_unknown(why);
    if (model.missing_in_index().empty()) {
      f.tensor_diff.explain_unknown(why);
      return;
    }
    TensorDiff diff;  // without a family the index is the only list of names there is
    for (const auto& [name, file] : model.missing_in_index()) {
      diff.missing.push_back(name);
      diff.missing_shard.push_back(file);
    }
    f.tensor_diff.set(std::move(diff), Origin::kMeasured, source);
    return;
  }
  // A model around the language model (text_config) may put a prefix before all names, which this family does not know.
  if (!f.routers.known() && f.model_type.source().key.find('.') != std::string::npos) {
    why = "no router has a name of family " + f.family.value() + ", and the config is nested: the model around it names tensors its own way";
    f.tensor_diff.explain_unknown(why);
    f.weight_shapes.explain_unknown(why);
    return;
  }
  f.tensor_diff.set(compare(model, *family, layout.expected, skipped), Origin::kMeasured, source);
  f.weight_shapes.set(compare_shapes(model, layout.expected), Origin::kMeasured, source);
}

}  // namespace

extern const Measure measure_header_scan;
const Measure measure_header_scan = {.name = "header_scan", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
