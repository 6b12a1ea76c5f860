#include "audit/measures/adapter_file.h"

#include <algorithm>
#include <array>
#include <map>
#include <string_view>
#include <tuple>

#include "audit/measures/model_shape.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 4> kWrappers = {"_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
                                                       "original_module."};
constexpr std::string_view kPrefix = "base_model.model.";

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

/// Takes every `what` out of `text`; how many there were.
int remove_all(std::string* text, std::string_view what) {
  int n = 0;
  for (std::size_t at; (at = text->find(what)) != std::string::npos; ++n) text->erase(at, what.size());
  return n;
}

/// "base_model.model.X.base_layer.lora_A.weight" -> path "X", what "lora_A", depth 1. Without a LoRA part, `what` is empty
/// and path is the module of the tensor.
struct Name {
  std::string path, what;
  int depth = 0;  // ParamWrappers around the same module nest: each inner one adds a "base_layer"
};

Name parse(std::string_view tensor) {
  Name name;
  std::string text(tensor);
  for (std::string_view w : kWrappers) remove_all(&text, w);
  if (text.rfind(kPrefix, 0) == 0) text.erase(0, kPrefix.size());
  std::size_t cut = text.rfind('.') == std::string::npos ? text.size() : text.rfind('.');
  if (const std::size_t lora = text.find(".lora_"); lora != std::string::npos) {
    const std::size_t end = std::min(text.find('.', lora + 1), text.size());
    name.what = text.substr(lora + 1, end - lora - 1);
    cut = lora;
  } else if (const std::size_t saved = text.find(".modules_to_save."); saved != std::string::npos) {
    cut = saved;
  }
  name.path = text.substr(0, cut);
  if (ends_with(name.path, ".base_layer")) name.path += '.';
  name.depth = remove_all(&name.path, "base_layer.");
  if (ends_with(name.path, ".")) name.path.pop_back();
  return name;
}

std::int64_t rows(const TensorView& t) { return t.shape.empty() ? 0 : t.shape[0]; }
std::int64_t columns(const TensorView& t) { return rows(t) > 0 ? t.elements() / rows(t) : 0; }

/// Parameters in memory by the module that holds them: of experts, and of a second set of them.
using Parameters = std::map<std::string, std::vector<ExpandedTensor>, std::less<>>;

Parameters parameters_in_memory(const Family* family, const FactSheet& facts) {
  Parameters out;
  FamilyShape shape;
  std::string why;
  if (!family || !model_shape(facts, &shape, &why)) return out;
  for (ExpandedTensor& t : expand(*family, shape, FamilyTensor::Where::kMemory)) {
    if (t.part != Part::kRoutedExpert && !(has_second_set(*family) && t.part == Part::kOther && t.shape.size() == 3)) continue;
    const std::string module = t.name.substr(0, t.name.rfind('.'));
    out[module].push_back(std::move(t));
  }
  return out;
}

/// An entry of modules_to_save is the end of the module's path, or of a module above it.
bool names_or_holds(std::string_view entry, std::string_view path) {
  for (std::size_t at = path.find(entry); at != std::string_view::npos; at = path.find(entry, at + 1)) {
    if (at + entry.size() == path.size() || path[at + entry.size()] == '.') return true;
  }
  return false;
}

bool same_pair(std::int64_t a, std::int64_t b, std::int64_t x, std::int64_t y) {
  return (a == x && b == y) || (a == y && b == x);  // PEFT before 0.19 took the stack for [E, in, out]
}

class Reader {
 public:
  Reader(const TensorStore& adapter, const Family* family, const FactSheet& facts)
      : adapter_(adapter), family_(family), facts_(facts), parameters_(parameters_in_memory(family, facts)) {}

  AdapterFile run() {
    collect();
    for (auto& [key, m] : groups_) finish(key.second, m);
    std::stable_sort(out_.modules.begin(), out_.modules.end(), [](const AdapterFileModule& x, const AdapterFileModule& y) {
      return std::tie(x.part.layer, x.path) < std::tie(y.part.layer, y.path);
    });
    return std::move(out_);
  }

 private:
  struct Group {
    AdapterFileModule module;
    const TensorView* weight = nullptr;  // of a module that was saved whole
    bool lora = false;
  };

  void collect() {
    for (std::size_t i = 0; i < adapter_.size(); ++i) {
      const TensorView& t = adapter_[i];
      Name name = parse(t.name);
      Group& g = groups_[{name.path, name.depth}];
      g.module.path = name.path;
      g.module.parameters += t.elements();
      g.lora |= !name.what.empty();
      const bool bias = ends_with(t.name, ".bias");
      if (name.what == "lora_A" || name.what == "lora_embedding_A") g.module.a = &t;
      if ((name.what == "lora_B" || name.what == "lora_embedding_B") && !bias) g.module.b = &t;
      g.module.embedding |= name.what.rfind("lora_embedding", 0) == 0;
      if (name.what.empty() && t.shape.size() >= 2) g.weight = &t;
      if (name.what.empty()) out_.whole.emplace_back(name.path + std::string(t.name.substr(std::min(t.name.rfind('.'), t.name.size()))), &t);
      out_.magnitudes |= name.what == "lora_magnitude_vector";
    }
  }

  void finish(int depth, Group& g) {
    AdapterFileModule& m = g.module;
    m.part = classify(family_, m.path, facts_.encoder_layers.known() ? facts_.encoder_layers.value() : 0);
    if (!g.lora) {
      if (g.weight && was_saved_on_purpose(m)) {
        m.in = columns(*g.weight);
        m.out = rows(*g.weight);
        out_.modules.push_back(std::move(m));
      }
      return;
    }
    if (!m.a || !m.b || m.a->shape.size() < 2 || m.b->shape.size() < 2 || rows(*m.a) != m.b->shape[1] || rows(*m.a) == 0) {
      out_.incomplete.push_back(std::move(m));
      return;
    }
    m.rank = rows(*m.a);
    m.in = columns(*m.a);
    m.out = rows(*m.b);
    const bool stack = m.part.part == Part::kRoutedExpert || (m.part.part == Part::kOther && parameters_.count(m.path) > 0);
    if (stack && m.part.expert < 0) describe_stack(depth, &m);
    out_.modules.push_back(std::move(m));
  }

  /// With save_embedding_layers PEFT copies embeddings and head into the file although they were not trained.
  bool was_saved_on_purpose(const AdapterFileModule& m) const {
    if (facts_.modules_to_save.known()) {
      const auto& saved = facts_.modules_to_save.value();
      return std::any_of(saved.begin(), saved.end(), [&](const std::string& s) { return names_or_holds(s, m.path); });
    }
    return m.part.part != Part::kEmbedding && m.part.part != Part::kHead;
  }

  /// Which parameter of the expert module this is, and for how many experts.
  void describe_stack(int depth, AdapterFileModule* m) const {
    const std::int64_t wide = rows(*m->a);
    const auto holder = parameters_.find(m->path);
    if (holder != parameters_.end()) {
      for (const ExpandedTensor& t : holder->second) {
        const auto& s = t.shape;
        const bool stack = s.size() == 3 && s[0] > 0 && wide % s[0] == 0 && same_pair(m->in, m->out, s[1], s[2]);
        const bool matrix = s.size() == 2 && same_pair(m->in, m->out, s[0], s[1]);
        if (!stack && !matrix) continue;
        if (stack) set_copies(s[0], m);
        m->path = t.name;
        m->is_parameter = true;
        return;
      }
    }
    const std::int64_t experts = facts_.num_experts.known() ? facts_.num_experts.value() : 0;
    const std::int64_t rank = facts_.adapter_rank.known() ? facts_.adapter_rank.value() : 0;
    if (experts > 0 && wide % experts == 0) set_copies(experts, m);
    else if (experts <= 0 && rank > 0 && wide % rank == 0) set_copies(wide / rank, m);
    // Two wrappers nest in the order of registration, gate_up_proj innermost.
    const bool two = groups_.count({m->path, 1}) != 0;
    if (two) m->path += depth > 0 ? ".gate_up_proj" : ".down_proj";
    m->is_parameter = true;
  }

  static void set_copies(std::int64_t experts, AdapterFileModule* m) {
    m->copies = experts;
    m->rank = rows(*m->a) / experts;
    m->part.fused = true;
  }

  const TensorStore& adapter_;
  const Family* family_;
  const FactSheet& facts_;
  Parameters parameters_;
  std::map<std::pair<std::string, int>, Group> groups_;
  AdapterFile out_;
};

}  // namespace

AdapterFile read_adapter_file(const TensorStore& adapter, const Family* family, const FactSheet& facts) {
  return Reader(adapter, family, facts).run();
}

}  // namespace moeaudit
