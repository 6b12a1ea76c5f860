// What patterns of parameter names to train reach. LLaMA-Factory's freeze looks for them anywhere in the name
// (src/llamafactory/model/adapter.py, _setup_freeze_tuning). Axolotl's unfrozen_parameters (src/axolotl/utils/freeze.py@v0.18.0, freeze_layers_except and
// LayerNamePattern): every parameter whose name no pattern matches is frozen. The patterns are tried as Axolotl tries
// them: a dot that no plus follows is a literal dot, so ".*" is "any number of dots"; re.match, so the pattern begins at
// the beginning of the name, although its documentation says "any part"; a range of rows behind it is no part of it.
#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "audit/measures/measure.h"
#include "audit/measures/model_shape.h"
#include "audit/measures/module_tree.h"
#include "audit/measures/python_regex.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 3> kSupplies = {"training.unfrozen_targets", "training.router_trains", "training.experts_train"};
constexpr std::int64_t kSteps = 200'000'000;  // of the regular expressions, over all patterns and names

/// "layers.0.gate$[:4]" without the range, as _parse_pattern cuts it off.
std::string_view without_range(std::string_view pattern) {
  if (!pattern.ends_with(']')) return pattern;
  const std::size_t open = pattern.rfind('[');
  if (open == std::string_view::npos || open == 0) return pattern;
  std::string_view inside = pattern.substr(open + 1, pattern.size() - open - 2);
  const auto digits = [&] {
    while (!inside.empty() && inside.front() >= '0' && inside.front() <= '9') inside.remove_prefix(1);
  };
  const bool empty = inside.empty();
  digits();
  if (!inside.empty() && inside.front() == ':') {
    inside.remove_prefix(1);
    digits();
  } else if (empty) {
    return pattern;  // "[]" has neither a number nor a colon
  }
  return inside.empty() ? pattern.substr(0, open) : pattern;
}

/// re.sub(r"\.(?!\+)", "\\.", pattern)
std::string with_literal_dots(std::string_view pattern) {
  std::string out;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const bool dot = pattern[i] == '.' && (i + 1 == pattern.size() || pattern[i + 1] != '+');
    if (dot) out += '\\';
    out += pattern[i];
  }
  return out;
}

struct Reach {
  std::int64_t hits = 0;
  std::map<Part, std::int64_t> parts;
  std::string anywhere;
  std::string why;
};

Part part_of(const ModelParameter& p, const ModuleTree& tree) {
  return p.module < 0 ? Part::kOther : tree.modules[static_cast<std::size_t>(p.module)].part;
}

Reach try_substring(std::string_view text, const ModuleTree& tree) {
  Reach reach;
  for (const ModelParameter& p : tree.parameters) {
    if (p.path.find(text) == std::string::npos) continue;
    ++reach.hits;
    ++reach.parts[part_of(p, tree)];
  }
  return reach;
}

Reach try_pattern(std::string_view pattern, const ModuleTree& tree, std::int64_t* steps) {
  Reach reach;
  RegexError error;
  const std::string text = with_literal_dots(without_range(pattern));
  const auto regex = PythonRegex::compile(text, &error);
  if (!regex) {
    reach.why = error.invalid ? "Python refuses this pattern: " + error.what : "moe-audit does not know " + error.what;
    return reach;
  }
  const auto inside = PythonRegex::compile(".*" + text, &error);
  for (const ModelParameter& p : tree.parameters) {
    const RegexAnswer answer = regex->match(p.path, steps);
    if (answer == RegexAnswer::kGaveUp) {
      reach.why = "trying this pattern took too many steps";
      return reach;
    }
    if (answer == RegexAnswer::kYes) {
      ++reach.hits;
      ++reach.parts[part_of(p, tree)];
    } else if (reach.anywhere.empty() && inside && inside->match(p.path, steps) == RegexAnswer::kYes) {
      reach.anywhere = p.path;
    }
  }
  return reach;
}

std::string text_of(const std::map<Part, std::int64_t>& parts) {
  std::string text;
  for (const auto& [part, n] : parts) text += (text.empty() ? "" : ", ") + std::string(name_of(part)) + " " + std::to_string(n);
  return text;
}

/// Layouts in memory that the releases of transformers allow. Names differ by how experts are held, not by the router.
std::vector<MemoryLayout> layouts(const FactSheet& f) {
  if (f.experts_fused.known()) return {{true, f.experts_fused.value()}};
  return {{true, false}, {true, true}};
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (!f.unfrozen_patterns.known()) return;
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  FamilyShape shape;
  std::string why = "the family of this model is not known";
  if (!family || !model_shape(f, &shape, &why)) {
    f.unfrozen_targets.explain_unknown(why);
    return;
  }
  const auto& patterns = f.unfrozen_patterns.value();
  UnfrozenTargets out;
  std::set<bool> router, experts;  // over the layouts
  std::int64_t steps = kSteps;
  bool tried = true;
  const bool substrings = f.framework.known() && f.framework.value() == "llama-factory";
  for (const MemoryLayout& layout : layouts(f)) {
    const ModuleTree tree = build_module_tree(*family, shape, layout, context.model);
    bool reaches_router = false, reaches_experts = false;
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      const Reach reach = substrings ? try_substring(patterns[i], tree) : try_pattern(patterns[i], tree, &steps);
      tried &= reach.why.empty();
      reaches_router |= reach.parts.count(Part::kRouter) > 0;
      reaches_experts |= reach.parts.count(Part::kRoutedExpert) > 0;
      if (i == out.pattern.size()) {
        out.pattern.push_back(patterns[i]);
        out.line.push_back(f.unfrozen_patterns.source().line);
        out.hits.push_back(reach.hits);
        out.reaches.push_back(text_of(reach.parts));
        out.anywhere.push_back(reach.hits > 0 ? "" : reach.anywhere);
        out.why.push_back(reach.why);
      } else if (reach.hits > out.hits[i]) {
        out.hits[i] = reach.hits;
        out.reaches[i] = text_of(reach.parts);
        out.anywhere[i].clear();
      }
    }
    router.insert(reaches_router);
    experts.insert(reaches_experts);
  }
  const Source source = f.unfrozen_patterns.source();
  f.unfrozen_targets.set(std::move(out), Origin::kDerived, source);
  if (!tried) return;
  if (router.size() == 1) f.router_trains.set_if_unknown(*router.begin(), Origin::kDerived, source);
  if (experts.size() == 1) f.experts_train.set_if_unknown(*experts.begin(), Origin::kDerived, source);
}

}  // namespace

extern const Measure measure_unfrozen_parameters;
const Measure measure_unfrozen_parameters = {.name = "unfrozen_parameters", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
