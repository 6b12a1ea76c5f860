// What an adapter reaches: from the file the run wrote if there is one, else from its configuration under every stack the
// version sets allow; and what each entry of that configuration hits.
#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <optional>
#include <string_view>

#include "audit/measures/adapter_file.h"
#include "audit/measures/measure.h"
#include "audit/measures/model_shape.h"
#include "audit/measures/peft_regimes.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 2> kSupplies = {"adapter.targets", "adapter.modules"};

// ---- the configuration ---------------------------------------------------------------------------------------------

template <class T>
struct Statement {
  const T* value = nullptr;
  const Source* source = nullptr;
};

/// The strongest word of the user's own training config, or of anybody.
template <class T>
Statement<T> stated(const Fact<T>& fact, bool in_training_config) {
  if (!fact.known()) return {};
  if (!in_training_config || fact.source().role == Role::kTrainingConfig) return {fact.get(), &fact.source()};
  for (auto s = fact.shadowed().rbegin(); s != fact.shadowed().rend(); ++s) {
    if (s->source.role == Role::kTrainingConfig) return {&s->value, &s->source};
  }
  return {};
}

/// A flag that goes with `of`: the one read at the same place.
bool flag_at(const Fact<bool>& fact, const Source* of) {
  auto same = [&](const Source& s) { return of && s.file == of->file && s.line == of->line && s.key == of->key; };
  if (!fact.known()) return false;
  if (same(fact.source())) return fact.value();
  for (const auto& s : fact.shadowed()) {
    if (same(s.source)) return s.value;
  }
  return fact.value();
}

struct Configuration {
  LoraTargets targets;
  std::map<std::string, const Source*> sources;  // by field
};

void read_rank_pattern(const FactSheet& f, LoraTargets* out) {
  if (!f.rank_pattern.known()) return;
  for (const std::string& entry : f.rank_pattern.value()) {
    const std::size_t equals = entry.rfind('=');
    if (equals == std::string::npos) continue;
    std::int64_t rank = 0;
    const auto [end, error] = std::from_chars(entry.data() + equals + 1, entry.data() + entry.size(), rank);
    if (error == std::errc() && end == entry.data() + entry.size()) out->rank_pattern.emplace_back(entry.substr(0, equals), rank);
  }
}

/// With `as_written`, targets come from the training config even where adapter_config.json knows better: PEFT rewrites them
/// there, and the user looks for what they wrote.
Configuration read_configuration(const FactSheet& f, bool as_written) {
  Configuration c;
  LoraTargets& t = c.targets;
  auto take = [&](const Fact<std::vector<std::string>>& fact, const char* field, bool from_config) -> const std::vector<std::string>* {
    const auto s = stated(fact, from_config);
    if (s.source) c.sources[field] = s.source;
    return s.value;
  };
  if (const auto* modules = take(f.target_modules, "target_modules", as_written)) {
    const Source* source = c.sources["target_modules"];
    if (!modules->empty() || f.target_modules.origin() != Origin::kAbsent) t.modules = *modules;
    t.modules_is_string = flag_at(f.target_modules_is_pattern, source);
    // Axolotl's key; "all" of LLaMA-Factory, "all-linear" of ms-swift, which list the names themselves
    t.linear_leaf_names = source->key == "lora_target_linear" || source->key == "target_modules.all-linear" ||
                          (t.modules_is_string && source->key == "lora_target");
  }
  if (const auto* v = take(f.target_parameters, "target_parameters", as_written)) t.parameters = *v;
  if (const auto* v = take(f.exclude_modules, "exclude_modules", false)) t.exclude = *v;
  if (const auto* v = take(f.modules_to_save, "modules_to_save", false)) t.save = *v;
  if (f.model_type.known()) t.model_type = f.model_type.value();
  if (f.exclude_modules_is_pattern.known()) t.exclude_is_string = f.exclude_modules_is_pattern.value();
  if (f.layers_to_transform.known()) t.layers = f.layers_to_transform.value();
  if (f.adapter_rank.known()) t.rank = f.adapter_rank.value();
  if (f.adapter_dropout.known()) t.dropout = f.adapter_dropout.value();
  read_rank_pattern(f, &t);
  return c;
}

bool written_in_training_config(const FactSheet& f) {
  return stated(f.target_modules, true).value || stated(f.target_parameters, true).value;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

std::int64_t elements(const std::vector<std::int64_t>& shape) {
  std::int64_t n = 1;
  for (std::int64_t d : shape) {
    if (d < 0 || __builtin_mul_overflow(n, d, &n)) return 0;
  }
  return n;
}

/// A module as the table names it: a matrix called "weight" is its module.
std::string shown_path(const ModuleTree& tree, const TargetHit& hit) {
  if (hit.parameter < 0) return tree.modules[hit.module].path;
  const std::string& path = tree.parameters[hit.parameter].path;
  const bool weight = path.size() > 7 && path.compare(path.size() - 7, 7, ".weight") == 0;
  return weight ? path.substr(0, path.size() - 7) : path;
}

void add_row(AdapterModules* out, std::string path, const ModelModule& m, std::int64_t rank, std::int64_t in, std::int64_t width,
             std::int64_t copies, std::int64_t adapter, std::int64_t base, bool by_parameter) {
  out->module.push_back(std::move(path));
  out->part.push_back(m.part);
  out->layer.push_back(m.layer);
  out->expert.push_back(m.expert);
  out->rank.push_back(rank);
  out->in.push_back(in);
  out->out.push_back(width);
  out->copies.push_back(copies);
  out->adapter_parameters.push_back(adapter);
  out->base_parameters.push_back(base);
  out->by_parameter.push_back(by_parameter);
}

/// A saved module trains with everything below it.
void add_saved(AdapterModules* out, const ModuleTree& tree, const ModelModule& saved) {
  for (std::size_t i = 0; i < tree.modules.size(); ++i) {
    const ModelModule& m = tree.modules[i];
    const bool inside = m.path.compare(0, saved.path.size(), saved.path) == 0 &&
                        (m.path.size() == saved.path.size() || m.path[saved.path.size()] == '.');
    if (!inside || m.kind == ModelModule::Kind::kContainer) continue;
    std::int64_t total = 0;
    for (const ModelParameter& p : tree.parameters) {
      if (p.module == static_cast<int>(i)) total += elements(p.shape);
    }
    add_row(out, m.path, m, 0, m.in, m.out, 1, total, total, false);
  }
}

AdapterModules to_modules(const ModuleTree& tree, const TargetResolution& resolution) {
  AdapterModules out;
  for (const TargetHit& hit : resolution.hits) {
    const ModelModule& m = tree.modules[hit.module];
    if (hit.rank == 0) {
      add_saved(&out, tree, m);
      continue;
    }
    std::int64_t in = m.in, width = m.out, copies = 1;
    if (hit.parameter >= 0) {
      const auto& shape = tree.parameters[hit.parameter].shape;
      copies = shape.size() == 3 ? std::max<std::int64_t>(1, shape[0]) : 1;
      in = std::max<std::int64_t>(0, shape.back());
      width = std::max<std::int64_t>(0, shape[shape.size() - 2]);
    }
    const bool sized = in > 0 && width > 0;
    add_row(&out, shown_path(tree, hit), m, hit.rank, in, width, copies, sized ? elements({hit.rank, in + width, copies}) : 0,
            sized ? elements({in, width, copies}) : 0, hit.parameter >= 0);
  }
  return out;
}

AdapterModules to_modules(const AdapterFile& file, const FactSheet& f) {
  AdapterModules out;
  for (const AdapterFileModule& m : file.modules) {
    bool by_parameter = m.is_parameter;
    if (m.part.part == Part::kRouter && f.target_parameters.known()) {
      for (const std::string& entry : f.target_parameters.value()) {
        const std::string path = m.path + ".weight";
        by_parameter |= path.size() >= entry.size() && path.compare(path.size() - entry.size(), entry.size(), entry) == 0;
      }
    }
    ModelModule as{m.path, {}, m.part.part, m.part.layer, m.copies > 1 ? -1 : m.part.expert, 0, 0};
    const std::int64_t base = m.rank == 0 ? m.parameters : elements({m.in, m.out, m.copies});
    add_row(&out, m.path, as, m.rank, m.in, m.out, m.copies, m.parameters, base, by_parameter);
  }
  return out;
}

std::vector<std::string_view> sorted_paths(const AdapterModules& m) {
  std::vector<std::string_view> paths(m.module.begin(), m.module.end());
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::string summary(const std::map<Part, std::int64_t>& parts) {
  std::string text;
  for (const auto& [part, n] : parts) text += (text.empty() ? "" : ", ") + std::string(name_of(part)) + " " + std::to_string(n);
  return text;
}
std::string summary(const AdapterModules& m) {
  std::map<Part, std::int64_t> parts;
  for (Part p : m.part) ++parts[p];
  return parts.empty() ? "nothing" : summary(parts);
}

// ---- resolution over regimes ---------------------------------------------------------------------------------------

struct Case {
  const PeftRegime* regime;
  const ModuleTree* tree;
  TargetResolution written;   // of what the user wrote
  TargetResolution resolved;  // of the strongest word
  AdapterModules modules;     // of `resolved`
};

class Coverage {
 public:
  Coverage(MeasureContext& context, const Family& family, const FamilyShape& shape)
      : context_(context), f_(context.facts), family_(family), shape_(shape) {}

  /// False with `why`.
  bool resolve(std::string* why) {
    regimes_ = peft_regimes(f_.family.value(), f_.transformers.get(), f_.peft.get(), why);
    if (regimes_.empty()) return false;
    written_ = read_configuration(f_, written_in_training_config(f_));
    const Configuration strongest = read_configuration(f_, false);
    const bool same = written_.targets == strongest.targets;
    for (const PeftRegime& regime : regimes_) {
      const ModuleTree& tree = tree_of(regime.layout);
      Case c{&regime, &tree, resolve_targets(tree, written_.targets, regime.rules), {}, {}};
      c.resolved = same ? c.written : resolve_targets(tree, strongest.targets, regime.rules);
      const std::string& blind = !c.written.cannot_tell.empty() ? c.written.cannot_tell : c.resolved.cannot_tell;
      if (!blind.empty()) {
        *why = blind;
        return false;
      }
      c.modules = to_modules(tree, c.resolved);
      cases_.push_back(std::move(c));
    }
    return true;
  }

  /// Stacks that cannot have written the adapter file are out; if none can, our resolution is wrong and judges nothing away.
  void keep_consistent_with(const AdapterModules& measured) {
    const std::vector<std::string_view> paths = sorted_paths(measured);
    keep_if([&](const Case& c) {
      return c.resolved.refused.empty() && c.modules.module.size() == paths.size() && sorted_paths(c.modules) == paths;
    });
  }
  /// A run that took steps was not refused.
  void keep_accepted() {
    keep_if([](const Case& c) { return c.resolved.refused.empty(); });
  }
  std::size_t size() const { return cases_.size(); }

  void set_modules(const Source& source) {
    const Case& first = cases_.front();
    const bool agree = std::all_of(cases_.begin(), cases_.end(), [&](const Case& c) {
      return c.resolved.refused.empty() == first.resolved.refused.empty() && c.modules.module == first.modules.module &&
             c.modules.rank == first.modules.rank;
    });
    if (!agree) {
      std::string why = "depends on the versions:";
      for (const Case& c : cases_) {
        why += " " + c.regime->text + ": " + (c.resolved.refused.empty() ? summary(c.modules) : c.resolved.refused) + ";";
      }
      why.pop_back();
      f_.adapter_modules.explain_unknown(why);
    } else if (!first.resolved.refused.empty()) {
      f_.adapter_modules.explain_unknown(first.resolved.refused);
    } else {
      Source s = source;
      s.cite = first.regime->cite;
      f_.adapter_modules.set(first.modules, Origin::kDerived, s);
    }
  }

  void set_targets(const Source& source) {
    AdapterTargets out;
    const TargetResolution old = names_in_transformers_4();
    for (std::size_t i = 0; i < cases_.front().written.entries.size(); ++i) add_entry(i, old, &out);
    Source s = source;
    s.cite = cases_.front().regime->cite;
    f_.adapter_targets.set(std::move(out), Origin::kDerived, s);
  }

 private:
  template <class Keep>
  void keep_if(Keep keep) {
    const auto end = std::stable_partition(cases_.begin(), cases_.end(), keep);
    if (end != cases_.begin()) cases_.erase(end, cases_.end());
  }

  const ModuleTree& tree_of(const MemoryLayout& layout) {
    const std::pair<bool, bool> key{layout.router_is_linear, layout.experts_fused};
    const auto known = trees_.find(key);
    if (known != trees_.end()) return known->second;
    return trees_.emplace(key, build_module_tree(family_, shape_, layout, context_.model)).first->second;
  }

  /// What the entries would reach where every expert is a module of its own: what their author had in mind.
  TargetResolution names_in_transformers_4() {
    PeftRules rules;
    LoraTargets targets = written_.targets;
    targets.dropout = 0;
    targets.layers.clear();
    return resolve_targets(tree_of({true, false}), targets, rules);
  }

  bool names_experts(const TargetEntry& entry, const TargetEntry* old) const {
    if (written_.targets.linear_leaf_names || entry.text == "all-linear") return false;
    if (old && old->parts.count(Part::kRoutedExpert)) return true;
    const std::string leaf = entry.text.substr(entry.text.rfind('.') + 1);
    return std::find(family_.expert_names.begin(), family_.expert_names.end(), leaf) != family_.expert_names.end();
  }

  void add_entry(std::size_t i, const TargetResolution& old, AdapterTargets* out) {
    const TargetEntry* best = nullptr;
    bool certain = true, one_reason = true;
    std::string why;
    const TargetEntry& first = cases_.front().written.entries[i];
    TargetFault fault = first.fault;
    for (const Case& c : cases_) {
      const TargetEntry& e = c.written.entries[i];
      certain &= e.hits == first.hits;
      if (fault != e.fault) fault = fault == TargetFault::kNone || e.fault == TargetFault::kNone ? TargetFault::kNone : TargetFault::kRefused;
      if (!best || e.hits > best->hits) best = &e;
      if (why.empty()) why = e.why;
      one_reason &= e.why == first.why;
    }
    if (best->hits == 0 && !one_reason) why.clear();  // it matches nothing under any version, for more than one reason
    const bool experts = names_experts(*best, i < old.entries.size() ? &old.entries[i] : nullptr);
    if (best->hits == 0 && (why.empty() || fault == TargetFault::kElsewhere) && experts && best->field == "target_modules") {
      why = "routed experts are 3-D parameters here, not modules: target_parameters reaches them";
    }
    const auto source = written_.sources.find(best->field);
    const bool placed = source != written_.sources.end() && source->second;
    out->entry.push_back(best->text);
    out->field.push_back(best->field);
    out->hits.push_back(best->hits);
    out->reaches.push_back(summary(best->parts));
    out->names_experts.push_back(experts);
    out->file.push_back(placed ? source->second->file : std::string());
    out->line.push_back(placed ? source->second->line : 0);
    out->certain.push_back(certain);
    out->why.push_back(best->hits > 0 && certain ? std::string() : why);
    out->fault.push_back(fault);
    out->partner.push_back(fault == TargetFault::kLacksPartner ? first.partner : std::string());
  }

  MeasureContext& context_;
  FactSheet& f_;
  const Family& family_;
  FamilyShape shape_;
  std::vector<PeftRegime> regimes_;
  Configuration written_;
  std::map<std::pair<bool, bool>, ModuleTree> trees_;
  std::vector<Case> cases_;
};

// ---- the measure ---------------------------------------------------------------------------------------------------

/// Why the configuration cannot be resolved; empty if it can.
std::string obstacle(const FactSheet& f, const Family* family, FamilyShape* shape) {
  std::string why;
  if (f.method.known() && f.method.value() == Method::kOtherAdapter) return "the adapter is not a LoRA: moe-audit resolves LoRA targets only";
  const bool configured = f.adapter_rank.known() && f.adapter_rank.origin() == Origin::kStated;  // None means: PEFT's defaults
  if (!f.target_modules.known() && !f.target_parameters.known() && !configured) return "no file says which modules the adapter targets";
  if (!family) return "the family of the model is not known";
  model_shape(f, shape, &why);
  return why;
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (context.adapter.empty() && !(f.has_adapter.known() && f.has_adapter.value())) return;
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;

  AdapterModules measured;
  Source source;
  if (!context.adapter.empty()) {
    source.role = Role::kAdapterWeights;
    source.file = context.adapter.files().front();
    measured = to_modules(read_adapter_file(context.adapter, family, f), f);
  }
  const bool has_file = !measured.module.empty();
  std::string note = has_file ? std::to_string(measured.module.size()) + " modules in the adapter file" : "no adapter file";
  if (has_file) f.adapter_modules.set(measured, Origin::kMeasured, source);

  FamilyShape shape;
  std::string why = obstacle(f, family, &shape);
  std::optional<Coverage> coverage;
  if (why.empty()) coverage.emplace(context, *family, shape).resolve(&why);
  if (!why.empty()) {
    f.adapter_targets.explain_unknown(why);
    if (!has_file) f.adapter_modules.explain_unknown(why);
    context.records.push_back({"adapter_coverage", "host", note + "; configuration not resolved: " + why});
    return;
  }
  if (has_file) coverage->keep_consistent_with(measured);
  else if (f.optimizer_steps.known() && f.optimizer_steps.value() > 0) coverage->keep_accepted();
  const Source& written = f.target_modules.known() ? f.target_modules.source() : f.target_parameters.source();
  if (!has_file) coverage->set_modules(written);
  coverage->set_targets(written);
  context.records.push_back({"adapter_coverage", "host", note + "; configuration resolved for " + std::to_string(coverage->size()) +
                                                             (coverage->size() == 1 ? " kind of stack" : " kinds of stack")});
}

}  // namespace

extern const Measure measure_adapter_coverage;
const Measure measure_adapter_coverage = {.name = "adapter_coverage", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
