#include "audit/measures/peft_targets.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <set>
#include <string_view>

#include "audit/measures/python_regex.h"

namespace moeaudit {
namespace {

using Kind = ModelModule::Kind;

constexpr std::int64_t kMaxSteps = 60'000'000;  // of all patterns over all paths, half a second; 60,000 paths take some 10 million

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}
/// PEFT's list rule: the whole path, or its end from a dot on.
bool names(std::string_view entry, std::string_view path) {
  if (!ends_with(path, entry)) return false;
  return path.size() == entry.size() || path[path.size() - entry.size() - 1] == '.';
}
std::string leaf_of(std::string_view path) { return std::string(path.substr(path.rfind('.') + 1)); }
std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

/// PEFT's _MOE_TARGET_MODULE_MAPPING: name in transformers 4 -> parameter in transformers 5. The two names that share
/// gate_up_proj (_MOE_FUSED_TARGETS) have to come together.
struct Rename {
  std::string_view old_name, new_name;
};
constexpr std::array<Rename, 4> kMixtral = {
    {{"gate", "gate.weight"}, {"w1", "gate_up_proj"}, {"w3", "gate_up_proj"}, {"w2", "down_proj"}}};
constexpr std::array<Rename, 4> kQwen2Moe = {
    {{"gate", "gate.weight"}, {"gate_proj", "gate_up_proj"}, {"up_proj", "gate_up_proj"}, {"down_proj", "down_proj"}}};
constexpr std::string_view kFused = "gate_up_proj";
constexpr std::int64_t kFusedNames = 2;

/// The layer as PEFT reads it for layers_to_transform: a number behind at least two other parts and before a last one,
/// the first such since 0.20 (".*?\.[^.]*\.(\d+)\."), the last such before (".*\.[^.]*\.(\d+)\."). -1: none.
std::int64_t layer_index(std::string_view path, bool first) {
  std::int64_t found = -1;
  std::size_t part = 0;
  for (std::size_t from = 0; from < path.size(); ++part) {
    const std::size_t dot = path.find('.', from);
    if (dot == std::string_view::npos) break;
    const std::string_view text = path.substr(from, dot - from);
    const bool number = !text.empty() && text.size() < 10 && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (number && part >= 2) {
      found = std::stoll(std::string(text));
      if (first) break;
    }
    from = dot + 1;
  }
  return found;
}

struct Target {
  std::string text;
  int entry;  // index of the entry it comes from; -1 for PEFT's own defaults
};

class Resolver {
 public:
  Resolver(const ModuleTree& tree, const LoraTargets& in, const PeftRules& rules) : tree_(tree), in_(in), rules_(rules) {}

  TargetResolution run() {
    list_entries();
    if (!compile_patterns()) return give_up();
    check_fields();
    prepare_targets();
    if (gave_up_) return give_up();
    match_modules();
    match_parameters();
    if (gave_up_) return give_up();
    const bool none = out_.hits.empty();
    save_modules();
    match_towers();
    if (none && !reaches_tower_ && out_.refused.empty()) refuse_empty();
    finish();
    return gave_up_ ? give_up() : std::move(out_);
  }

 private:
  // ---- outcomes ----
  TargetResolution give_up() {
    TargetResolution none;
    none.cannot_tell = unreadable_.empty() ? "matching the configured patterns takes too long" : unreadable_;
    return none;
  }
  void refuse(int entry, const std::string& why, TargetFault fault = TargetFault::kRefused) {
    if (out_.refused.empty()) out_.refused = why;
    if (entry < 0) return;
    TargetEntry& e = out_.entries[entry];
    if (e.why.empty()) e.why = why;
    if (e.fault == TargetFault::kNone) e.fault = fault;
    blocked_.insert(entry);
  }
  void refuse_empty() {
    if (letters_) return refuse(first_module_, string_fault(), TargetFault::kSplitString);
    out_.refused = "PEFT stops: no module or parameter of the model matches the configured targets";
    if (excluded_ > 0) out_.refused += ", or all that do are excluded";
  }
  void count(int entry, Part part) {
    if (entry < 0) return;
    ++out_.entries[entry].hits;
    ++out_.entries[entry].parts[part];
  }

  // ---- what was configured ----
  void list_entries() {
    auto add = [&](const char* field, const std::vector<std::string>& texts, int* first) {
      *first = static_cast<int>(out_.entries.size());
      for (const std::string& t : texts) out_.entries.push_back({field, t, 0, {}, {}, TargetFault::kNone, {}});
    };
    add("target_modules", in_.modules.value_or(std::vector<std::string>{}), &first_module_);
    add("target_parameters", in_.parameters, &first_parameter_);
    add("exclude_modules", in_.exclude, &first_exclude_);
    add("modules_to_save", in_.save, &first_save_);
  }

  std::optional<PythonRegex> compile(const std::string& pattern, int entry, const std::string& shown) {
    RegexError error;
    std::optional<PythonRegex> regex = PythonRegex::compile(pattern, &error);
    if (regex) return regex;
    if (error.invalid) {
      refuse(entry, "Python's re does not accept the pattern " + quoted(shown) + ": " + error.what);
    } else if (unreadable_.empty()) {
      unreadable_ = "the pattern " + quoted(shown) + " uses " + error.what + ", which moe-audit does not read";
    }
    return std::nullopt;
  }

  /// False: a pattern is valid Python that we cannot read.
  bool compile_patterns() {
    is_string_ = in_.modules_is_string && in_.modules && in_.modules->size() == 1 && !in_.linear_leaf_names;
    all_linear_ = is_string_ && lower(in_.modules->front()) == "all-linear";
    if (is_string_ && !all_linear_) pattern_ = compile(in_.modules->front(), first_module_, in_.modules->front());
    if (in_.exclude_is_string && in_.exclude.size() == 1) {
      exclude_pattern_ = compile(in_.exclude.front(), first_exclude_, in_.exclude.front());
    }
    for (std::size_t i = 0; i < in_.save.size(); ++i) {
      save_patterns_.push_back(compile("(^|.*\\.)" + in_.save[i] + "($|\\..*)", first_save_ + static_cast<int>(i), in_.save[i]));
    }
    rank_pattern_ = in_.rank_pattern;
    return unreadable_.empty();
  }

  void check_fields() {
    for (std::size_t i = 0; !rules_.has_target_parameters && i < in_.parameters.size(); ++i) {
      refuse(first_parameter_ + static_cast<int>(i), "LoraConfig has no target_parameters before PEFT 0.17");
    }
    for (std::size_t i = 0; !rules_.has_exclude_modules && i < in_.exclude.size(); ++i) {
      refuse(first_exclude_ + static_cast<int>(i), "LoraConfig has no exclude_modules before PEFT 0.14");
    }
    if (is_string_ && !in_.layers.empty()) {
      refuse(first_module_, "layers_to_transform cannot be combined with target_modules as one string");
    }
  }

  // ---- target_modules and target_parameters as PEFT holds them when it walks over the model ----
  void prepare_targets() {
    for (std::size_t i = 0; i < in_.parameters.size(); ++i) parameters_.push_back({in_.parameters[i], first_parameter_ + static_cast<int>(i)});
    if (in_.linear_leaf_names) {
      for (const std::string& name : linear_leaves()) modules_.push_back({name, first_module_});
    } else if (in_.modules && !is_string_) {
      for (std::size_t i = 0; i < in_.modules->size(); ++i) modules_.push_back({(*in_.modules)[i], first_module_ + static_cast<int>(i)});
    }
    bool none = !in_.modules;
    if (!rules_.conversion.empty()) {
      convert();
      none = false;  // PEFT turns None into an empty set here, so that its defaults never apply
    }
    if (none && in_.model_type == "mixtral") {  // TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, utils/constants.py
      modules_ = {{"q_proj", -1}, {"v_proj", -1}};
    } else if (none && parameters_.empty()) {
      refuse(-1, "PEFT has no default targets for model type " + quoted(in_.model_type) + ": it asks for target_modules");
    }
  }

  /// _convert_peft_config_moe
  void convert() {
    const std::array<Rename, 4>& table = rules_.conversion == "mixtral" ? kMixtral : kQwen2Moe;
    if (is_string_ && rules_.strings_become_letters) {
      for (char c : std::set<char>(in_.modules->front().begin(), in_.modules->front().end())) modules_.push_back({std::string(1, c), first_module_});
      is_string_ = all_linear_ = false;
      letters_ = true;
    } else if (is_string_) {
      const std::set<std::string> found = resolve_string(table);
      if (found.empty()) return;
      for (const std::string& name : found) modules_.push_back({name, first_module_});
      is_string_ = all_linear_ = false;
    }
    std::vector<Target> kept, fused;
    std::set<std::string_view> present;
    for (Target& t : modules_) {
      const auto row = std::find_if(table.begin(), table.end(), [&](const Rename& r) { return names(r.old_name, t.text); });
      if (row == table.end()) {
        kept.push_back(std::move(t));
        continue;
      }
      parameters_.push_back({std::string(row->new_name), t.entry});
      if (row->new_name != kFused) continue;
      present.insert(row->old_name);
      fused.push_back({std::string(row->old_name), t.entry});
    }
    modules_ = std::move(kept);
    if (present.size() == 1) {
      const std::string_view other = *present.begin() == table[1].old_name ? table[2].old_name : table[1].old_name;
      for (const Target& t : fused) {
        refuse(t.entry, "PEFT stops: " + quoted(t.text) + " cannot be adapted without " + quoted(other) +
                            ", because transformers 5 fuses them into gate_up_proj",
               TargetFault::kLacksPartner);
        out_.entries[t.entry].partner = other;
      }
    } else if (present.size() == 2) {
      set_rank(".*\\.gate_up_proj", in_.rank * kFusedNames);
    }
  }

  void set_rank(const std::string& pattern, std::int64_t rank) {
    for (auto& [key, value] : rank_pattern_) {
      if (key == pattern) {
        value = rank;
        return;
      }
    }
    rank_pattern_.emplace_back(pattern, rank);
  }

  std::set<std::string> linear_leaves() const {
    std::set<std::string> found;
    for (const ModelModule& m : tree_.modules) {
      if (m.kind == Kind::kLinear && m.part != Part::kHead) found.insert(leaf_of(m.path));
    }
    return found;
  }

  /// _resolve_string_target_modules: leaf names that the string reaches; the experts' old names are probed in the place of
  /// the stack that took them over.
  std::set<std::string> resolve_string(const std::array<Rename, 4>& table) {
    std::set<std::string> found;
    if (all_linear_) {
      found = linear_leaves();
      for (const Rename& r : table) found.insert(std::string(r.old_name));
      return found;
    }
    auto reached = [&](const std::string& path) { return !is_excluded(path) && pattern_ && yes(pattern_->full_match(path, &steps_)); };
    for (const ModelModule& m : tree_.modules) {
      if (reached(m.path)) found.insert(leaf_of(m.path));
    }
    for (const ModelParameter& p : tree_.parameters) {
      if (reached(p.path)) found.insert(leaf_of(p.path));
    }
    for (const Rename& r : table) {
      for (const ModelParameter& p : tree_.parameters) {
        if (found.count(std::string(r.old_name))) break;
        if (leaf_of(p.path) != r.new_name) continue;
        if (reached(tree_.modules[p.module].path + "." + std::string(r.old_name))) found.insert(std::string(r.old_name));
      }
    }
    return found;
  }

  // ---- matching ----
  bool yes(RegexAnswer answer) {
    gave_up_ |= answer == RegexAnswer::kGaveUp;
    return answer == RegexAnswer::kYes;
  }

  /// By exclude_modules or modules_to_save.
  bool is_excluded(const std::string& path) {
    if (gave_up_) return true;
    if (in_.exclude_is_string) {
      if (exclude_pattern_ && yes(exclude_pattern_->full_match(path, &steps_))) return true;
    } else if (std::any_of(in_.exclude.begin(), in_.exclude.end(), [&](const std::string& e) { return names(e, path); })) {
      return true;
    }
    if (!rules_.saved_as_pattern) {
      return std::any_of(in_.save.begin(), in_.save.end(), [&](const std::string& s) { return ends_with(path, s); });
    }
    return std::any_of(save_patterns_.begin(), save_patterns_.end(), [&](const auto& p) { return p && yes(p->match(path, &steps_)); });
  }

  bool in_layers(const std::string& path) const {
    if (in_.layers.empty()) return true;
    const std::int64_t index = layer_index(path, rules_.first_index_is_layer);
    return std::find(in_.layers.begin(), in_.layers.end(), index) != in_.layers.end();
  }

  /// Entries of target_modules that reach the module; empty if none does.
  std::vector<int> reaching(const ModelModule& m) {
    std::vector<int> entries;
    if (all_linear_) {
      if (m.kind == Kind::kLinear && m.part != Part::kHead) entries.push_back(first_module_);
      return entries;
    }
    if (is_string_) {
      if (pattern_ && yes(pattern_->full_match(m.path, &steps_))) entries.push_back(first_module_);
      return entries;
    }
    for (const Target& t : modules_) {
      if (!names(t.text, m.path) || (t.text != m.path && !in_layers(m.path))) continue;
      if (entries.empty() || entries.back() != t.entry) entries.push_back(t.entry);
    }
    return entries;
  }

  void match_modules() {
    adapted_.assign(tree_.modules.size(), false);
    for (std::size_t i = 0; i < tree_.modules.size() && !gave_up_; ++i) {
      const ModelModule& m = tree_.modules[i];
      const std::vector<int> entries = reaching(m);
      if (entries.empty()) continue;
      if (is_excluded(m.path)) {
        ++excluded_;
        excluded_entries_.insert(entries.begin(), entries.end());
        continue;
      }
      if (m.kind != Kind::kLinear && m.kind != Kind::kEmbedding) {
        for (int e : entries) refuse(e, refusal_of(m), letters_ ? TargetFault::kSplitString : TargetFault::kRefused);
        continue;
      }
      adapted_[i] = true;
      out_.hits.push_back({static_cast<int>(i), -1, rank_of(m.path)});
      for (int e : entries) count(e, m.part);
    }
  }

  std::string refusal_of(const ModelModule& m) const {
    if (letters_) return string_fault();
    if (m.kind == Kind::kContainer) return "PEFT stops: " + m.path + " is a container of modules, not a layer that LoRA can adapt";
    const std::string what = m.part == Part::kRouter         ? "the router is a module with a bare weight here"
                             : m.part == Part::kRoutedExpert ? "the experts are 3-D parameters of one module here"
                                                             : "it is no linear or embedding layer";
    return "PEFT stops: LoRA cannot adapt the module " + m.path + "; " + what;
  }
  std::string string_fault() const {
    return "PEFT stops: 0.19 takes the string " + quoted(in_.modules->front()) + " apart into letters on transformers 5 (fixed in 0.20.0)";
  }

  std::int64_t rank_of(const std::string& path) {
    if (!rank_compiled_) {
      rank_compiled_ = true;
      for (const auto& [key, rank] : rank_pattern_) rank_regex_.push_back(compile("(.*\\.)?(" + key + ")$", -1, key));
      gave_up_ |= !unreadable_.empty();
    }
    for (std::size_t i = 0; i < rank_regex_.size(); ++i) {
      if (rank_regex_[i] && yes(rank_regex_[i]->match(path, &steps_))) return rank_pattern_[i].second;
    }
    return in_.rank;
  }

  void match_parameters() {
    if (!rules_.has_target_parameters) return;
    wrapped_.assign(tree_.modules.size(), false);
    for (std::size_t i = 0; i < tree_.parameters.size() && !gave_up_; ++i) {
      const ModelParameter& p = tree_.parameters[i];
      std::vector<int> entries;
      for (const Target& t : parameters_) {
        if (names(t.text, p.path)) entries.push_back(t.entry);
      }
      if (entries.empty()) continue;
      const std::string why = parameter_fault(p);
      if (!why.empty()) {
        for (int e : entries) refuse(e, why, in_.dropout != 0 && !adapted_[p.module] ? TargetFault::kDropout : TargetFault::kRefused);
        continue;
      }
      wrapped_[p.module] = true;
      out_.hits.push_back({p.module, static_cast<int>(i), rank_of(p.path)});
      for (int e : entries) count(e, tree_.modules[p.module].part);
    }
  }

  std::string parameter_fault(const ModelParameter& p) const {
    if (adapted_[p.module]) return "PEFT stops: " + p.path + " is targeted as a parameter and its module as a module";
    if (in_.dropout != 0) return "PEFT stops: LoRA on a parameter (" + p.path + ") does not work with lora_dropout other than 0";
    if (p.shape.size() != 2 && p.shape.size() != 3) return "PEFT stops: " + p.path + " is neither a matrix nor a stack of matrices";
    return {};
  }

  /// Entries that reach nothing so far, in what is beside the language model; where its names are not known, they may.
  void match_towers() {
    for (std::size_t i = 0; tree_.has_towers && i < out_.entries.size() && !gave_up_; ++i) {
      TargetEntry& e = out_.entries[i];
      const bool modules = e.field == "target_modules" && !all_linear_ && !letters_, saves = e.field == "modules_to_save";
      if (e.hits > 0 || e.fault != TargetFault::kNone || (!modules && !saves && e.field != "target_parameters")) continue;
      if (excluded_entries_.count(static_cast<int>(i))) continue;
      for (const std::string& path : tree_.towers) {
        const bool named = saves        ? ends_with(path, e.text)
                           : is_string_ ? modules && pattern_ && yes(pattern_->full_match(path, &steps_))
                                        : modules && names(e.text, path) && in_layers(path);
        if (!named || (modules && is_excluded(path))) continue;
        ++e.hits;
        ++e.parts[Part::kOther];
      }
      if (e.hits == 0 && tree_.towers_listed && (modules || saves)) continue;  // it is not there either
      reaches_tower_ |= !saves;
      if (e.hits > 0) continue;
      e.fault = TargetFault::kElsewhere;
      e.why = "it may name something beside the language model";
    }
  }

  /// _set_trainable: the plain end of the path, not from a dot on ("gate" saves shared_expert_gate too).
  void save_modules() {
    for (std::size_t i = 0; i < tree_.modules.size(); ++i) {
      const ModelModule& m = tree_.modules[i];
      bool saved = false;
      for (std::size_t s = 0; s < in_.save.size(); ++s) {
        if (!ends_with(m.path, in_.save[s])) continue;
        const int entry = first_save_ + static_cast<int>(s);
        if (adapted_[i] || (!wrapped_.empty() && wrapped_[i])) {
          refuse(entry, "PEFT stops: " + m.path + " is adapted by LoRA and cannot be in modules_to_save too");
          continue;
        }
        count(entry, m.part);
        saved = true;
      }
      if (saved) out_.hits.push_back({static_cast<int>(i), -1, 0});
    }
  }

  // ---- what to say of each entry ----
  void finish() {
    count_excluded();
    if (TargetEntry* e = letters_ ? &out_.entries[first_module_] : nullptr; e && e->hits == 0) {
      e->why = string_fault();
      e->fault = out_.refused.empty() ? TargetFault::kNone : TargetFault::kSplitString;
    }
    for (int e : blocked_) {
      out_.entries[e].hits = 0;
      out_.entries[e].parts.clear();
    }
    for (TargetEntry& e : out_.entries) {
      if (e.hits > 0 || !e.why.empty()) continue;
      if (excluded_entries_.count(static_cast<int>(&e - out_.entries.data()))) {
        e.why = "everything it names is excluded by exclude_modules or modules_to_save";
      } else if (e.field == "target_modules" && in_.modules_is_string && !in_.linear_leaf_names && lower(e.text) != "all-linear") {
        e.why = "one string is a pattern for the whole path; to match the end of a path, write a list: [" + e.text + "]";
      } else if (e.field == "target_modules" && !in_.layers.empty()) {
        e.why = "nothing of this name is in the layers of layers_to_transform";
      }
    }
    if (!out_.hits.empty()) std::stable_sort(out_.hits.begin(), out_.hits.end(), [](const TargetHit& a, const TargetHit& b) { return a.module < b.module; });
  }

  void count_excluded() {
    for (std::size_t x = 0; x < in_.exclude.size(); ++x) {
      for (const ModelModule& m : tree_.modules) {
        if (m.kind == Kind::kContainer || gave_up_) continue;
        const bool hit = in_.exclude_is_string ? exclude_pattern_ && yes(exclude_pattern_->full_match(m.path, &steps_)) : names(in_.exclude[x], m.path);
        if (hit) count(first_exclude_ + static_cast<int>(x), m.part);
      }
    }
  }

  const ModuleTree& tree_;
  const LoraTargets& in_;
  const PeftRules& rules_;
  TargetResolution out_;
  std::int64_t steps_ = kMaxSteps;
  bool gave_up_ = false;
  std::string unreadable_;
  int first_module_ = 0, first_parameter_ = 0, first_exclude_ = 0, first_save_ = 0;
  bool is_string_ = false, all_linear_ = false, letters_ = false, reaches_tower_ = false;
  std::optional<PythonRegex> pattern_, exclude_pattern_;
  std::vector<std::optional<PythonRegex>> save_patterns_, rank_regex_;
  std::vector<std::pair<std::string, std::int64_t>> rank_pattern_;
  bool rank_compiled_ = false;
  std::vector<Target> modules_, parameters_;
  std::vector<bool> adapted_, wrapped_;
  std::set<int> blocked_, excluded_entries_;
  std::int64_t excluded_ = 0;
};

}  // namespace

TargetResolution resolve_targets(const ModuleTree& tree, const LoraTargets& targets, const PeftRules& rules) {
  return Resolver(tree, targets, rules).run();
}

}  // namespace moeaudit
