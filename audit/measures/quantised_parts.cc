// Which parts of the model are quantised: what the checkpoint's tensors show, or, where the weights are rounded while they
// load, what transformers replaces under the skip list. fixtures/quantisation holds what its own functions replaced.
#include <algorithm>
#include <array>

#include "audit/behaviours/behaviour.h"
#include "audit/families/family.h"
#include "audit/measures/measure.h"
#include "audit/measures/model_shape.h"
#include "audit/measures/module_tree.h"
#include "audit/measures/python_regex.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 2> kSupplies = {"quantisation.router_quantised", "quantisation.experts_quantised"};

/// How a release compares an entry of the skip list with a module.
enum class Comparison {
  kNameOrPathPart,  // the module's last name, its whole path, or the entry and a dot inside the path
  kSubstring,       // the entry anywhere in the path
  kRegex,           // re.match up to the end of a name, or the end of the path
  kIgnore,          // compressed-tensors: the whole path, a class name, or re.match after "re:"
};

std::string_view leaf_of(std::string_view path) { return path.substr(path.rfind('.') + 1); }

/// One entry of the list; a pattern is compiled once.
class Entry {
 public:
  Entry(const std::string& text, Comparison comparison) : text_(text), comparison_(comparison) {
    RegexError error;
    if (comparison == Comparison::kRegex) {
      regex_ = PythonRegex::compile("(?:" + text + ")(?=\\.|$)", &error);
    } else if (comparison == Comparison::kIgnore && text.starts_with("re:")) {
      regex_ = PythonRegex::compile(text.substr(3), &error);
    }
    broken_ = !error.what.empty();
  }
  bool broken() const { return broken_; }
  bool skips(std::string_view path, std::int64_t* steps_left) const {
    const bool matches = regex_ && regex_->match(path, steps_left) == RegexAnswer::kYes;
    switch (comparison_) {
      case Comparison::kNameOrPathPart:
        return leaf_of(path) == text_ || path == text_ || path.find(text_ + ".") != std::string_view::npos;
      case Comparison::kSubstring: return path.find(text_) != std::string_view::npos;
      case Comparison::kRegex: return matches || path.ends_with(text_);
      case Comparison::kIgnore: return matches || path == text_ || text_ == "Linear";
    }
    return false;
  }

 private:
  std::string text_;
  Comparison comparison_;
  std::optional<PythonRegex> regex_;
  bool broken_ = false;
};

/// First word of quantisation.method: "bitsandbytes nf4" -> "bitsandbytes".
std::string first_word(const std::string& text) { return text.substr(0, text.find(' ')); }

struct Found {
  int replaced = 0, kept = 0;
};

void conclude(const Found& found, std::string_view part, Fact<bool>& fact, const Source& source, Origin origin) {
  if (fact.known() || (found.replaced == 0 && found.kept == 0)) return;
  if (part == "experts" && found.replaced > 0 && found.kept > 0) {
    return fact.explain_unknown("some of the experts are quantised and some are not");
  }
  fact.set(found.replaced > 0, origin, source);
}

// ---- by the tensors ------------------------------------------------------------------------------------------------

bool is_plain_float(DType d) {
  return d == DType::kF16 || d == DType::kBF16 || d == DType::kF32 || d == DType::kF64;
}

/// Tensors by which each format stores a module's rounded weight, beside or instead of "weight".
bool stored_quantised(const TensorStore& store, const std::string& module, bool* known) {
  for (const char* mark : {".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax", ".SCB"}) {
    if (store.find(module + mark)) return *known = true;
  }
  const TensorView* weight = store.find(module + ".weight");
  *known = weight != nullptr;
  return weight && !is_plain_float(weight->dtype);
}

bool run_on_tensors(MeasureContext& context, const Family& family) {
  FactSheet& f = context.facts;
  FamilyShape shape;
  std::string why;
  if (context.model.empty() || !model_shape(f, &shape, &why)) return false;
  Found routers, experts;
  for (const ExpandedTensor& t : expand(family, shape, FamilyTensor::Where::kHub)) {
    if (t.part != Part::kRouter && t.part != Part::kRoutedExpert) continue;
    if (!t.name.ends_with(".weight")) continue;
    bool known = false;
    const bool rounded = stored_quantised(context.model, t.name.substr(0, t.name.size() - 7), &known);
    Found& found = t.part == Part::kRouter ? routers : experts;
    if (known) ++(rounded ? found.replaced : found.kept);
  }
  if (routers.replaced + experts.replaced == 0) return false;  // these are the weights before they are rounded
  Source source;
  source.role = Role::kModelWeights;
  source.file = context.model.files().front();
  conclude(routers, "router", f.router_quantised, source, Origin::kMeasured);
  conclude(experts, "experts", f.experts_quantised, source, Origin::kMeasured);
  return f.router_quantised.known();
}

// ---- by the modules ------------------------------------------------------------------------------------------------

bool comparison_of(FactSheet& f, const std::string& method, Comparison* out, std::string* why) {
  if (method == "compressed-tensors") {
    *out = Comparison::kIgnore;
    return true;
  }
  const BehaviourAnswer answer = ask({"transformers", "quant_skip_comparison", {{"method", method}}}, f.transformers.get());
  if (!answer.value) {
    *why = answer.why;
    return false;
  }
  *out = *answer.value == "substring" ? Comparison::kSubstring
         : *answer.value == "regex"   ? Comparison::kRegex
                                      : Comparison::kNameOrPathPart;
  return true;
}

/// Does the method replace the experts that are one 3-D parameter?
bool reaches_fused(FactSheet& f, const std::string& method, bool* yes) {
  if (method == "bitsandbytes") {
    const BehaviourAnswer answer = ask({"bitsandbytes", "quantises", {}}, f.bitsandbytes.get());
    *yes = false;
    return answer.value == "nn.Linear";
  }
  *yes = method == "fp8";
  return method == "fp8" || method == "hqq" || method == "eetq";
}

void run_on_modules(MeasureContext& context, const Family& family, const std::string& method) {
  FactSheet& f = context.facts;
  std::string why;
  auto unknown = [&] {
    f.router_quantised.explain_unknown(why);
    f.experts_quantised.explain_unknown(why);
  };
  FamilyShape shape;
  if (!model_shape(f, &shape, &why)) {  // a hub id without its config.json: one layer of the family stands for all
    shape = {};
    shape.layers = shape.experts = shape.hidden = shape.expert_width = 1;
    shape.moe_layers = {0};
  }
  if (!f.router_is_linear.known() || !f.experts_fused.known()) {
    why = f.router_is_linear.known() ? f.experts_fused.why_unknown() : f.router_is_linear.why_unknown();
    return unknown();
  }
  std::vector<Entry> entries;
  if (f.quant_skip.known() && !f.quant_skip.value().empty()) {
    Comparison comparison = Comparison::kRegex;
    if (!comparison_of(f, method, &comparison, &why)) return unknown();
    for (const std::string& text : f.quant_skip.value()) {
      entries.emplace_back(text, comparison);
      if (!entries.back().broken()) continue;
      why = "the skip list holds \"" + text + "\", a pattern that is not understood here";
      return unknown();
    }
  }
  const MemoryLayout layout{f.router_is_linear.value(), f.experts_fused.value()};
  const ModuleTree tree = build_module_tree(family, shape, layout, context.model);
  std::int64_t steps_left = 200'000'000;
  Found routers, experts;
  bool fused_reached = false;
  const bool fused_known = !layout.experts_fused || reaches_fused(f, method, &fused_reached);
  for (const ModelModule& m : tree.modules) {
    if (m.part != Part::kRouter && m.part != Part::kRoutedExpert) continue;
    const bool stack = m.part == Part::kRoutedExpert && layout.experts_fused;
    if (m.kind == ModelModule::Kind::kContainer && !stack) continue;
    const bool reached = stack ? fused_reached : m.kind == ModelModule::Kind::kLinear;
    const bool skipped = reached && std::any_of(entries.begin(), entries.end(),
                                                [&](const Entry& e) { return e.skips(m.path, &steps_left); });
    ++(reached && !skipped ? (m.part == Part::kRouter ? routers : experts).replaced
                           : (m.part == Part::kRouter ? routers : experts).kept);
  }
  if (steps_left <= 0) {
    why = "the skip list takes too many steps to compare";
    return unknown();
  }
  const Source& source = f.quant_skip.known() ? f.quant_skip.source() : f.quant_bits.source();
  conclude(routers, "router", f.router_quantised, source, Origin::kDerived);
  if (fused_known)
    conclude(experts, "experts", f.experts_quantised, source, Origin::kDerived);
  else
    f.experts_quantised.explain_unknown("whether " + method + " reaches experts that are one 3-D parameter is not known");
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (f.router_quantised.known() || !f.quant_method.known() || !f.family.known()) return;
  if (!f.router_quantised.why_unknown().empty()) return;
  const Family* family = find_family(f.family.value());
  if (!family) return;
  const std::string method = first_word(f.quant_method.value());
  if (run_on_tensors(context, *family)) return;
  if (method == "mxfp4") {  // GptOssExperts alone is replaced
    f.router_quantised.set(false, Origin::kDerived, f.quant_method.source());
    f.experts_quantised.set(true, Origin::kDerived, f.quant_method.source());
  } else if (method == "bitsandbytes" || method == "fp8" || method == "awq" || method == "hqq" || method == "eetq" ||
             method == "compressed-tensors") {
    run_on_modules(context, *family, method);
  } else {
    const std::string why = "which modules " + method + " has quantised is read from the tensors, and they are not here";
    f.router_quantised.explain_unknown(why);
    f.experts_quantised.explain_unknown(why);
  }
}

}  // namespace

extern const Measure measure_quantised_parts;
const Measure measure_quantised_parts = {.name = "quantised_parts", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
