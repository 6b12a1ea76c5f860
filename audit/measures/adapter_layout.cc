// The shapes of the LoRA matrices in an adapter file: of each other, of the configured rank, of the model's matrices, and
// for stacks of experts of the PEFT release that is to load them.
#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "audit/behaviours/behaviour.h"
#include "audit/measures/adapter_file.h"
#include "audit/measures/measure.h"
#include "audit/measures/model_shape.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"adapter.layout"};

std::string shape_text(const TensorView* t) {
  if (!t) return "missing";
  std::string text;
  for (std::int64_t n : t->shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}
std::string pair_text(std::int64_t rows, std::int64_t in, std::int64_t out) {
  return "A [" + std::to_string(rows) + ", " + std::to_string(in) + "], B [" + std::to_string(out) + ", " + std::to_string(rows) + "]";
}

/// Whether A takes the last side of a stack [E, x, y] under these releases of PEFT; nullopt if they do not agree.
std::optional<bool> a_takes_last(const FactSheet& f, const VersionSet* peft) {
  auto ask_one = [&](std::string_view package, std::string_view topic, const VersionSet* versions) {
    return ask({package, topic, {{"family", f.family.known() ? f.family.value() : std::string()}}}, versions).value;
  };
  if (!peft) return std::nullopt;
  const std::optional<std::string> sides = ask_one("peft", "stack_sides", peft);
  if (!sides) return std::nullopt;
  if (*sides == "as_stored") return false;
  const std::optional<std::string> transposed = ask_one("transformers", "experts_is_transposed", f.transformers.get());
  if (!transposed) return std::nullopt;
  return (*transposed == "true") == (*sides == "swapped_if_transposed");
}

/// The release that wrote the file, where another one is to load it.
const VersionSet* writer(const FactSheet& f) {
  const VersionSet* peft = of_adapter_config(f.peft);
  return peft == f.peft.get() ? nullptr : peft;
}

class Layout {
 public:
  explicit Layout(MeasureContext& context) : context_(context), f_(context.facts) {
    family_ = f_.family.known() ? find_family(f_.family.value()) : nullptr;
    a_takes_last_ = a_takes_last(f_, f_.peft.get());
    a_took_last_ = a_takes_last(f_, writer(f_));
    if (const std::int64_t* rank = of_adapter_config(f_.adapter_rank)) ranks_.insert(*rank);
    const std::vector<std::string>* patterns = of_adapter_config(f_.rank_pattern);
    for (const std::string& entry : patterns ? *patterns : std::vector<std::string>{}) {
      std::int64_t rank = 0;
      const char* end = entry.data() + entry.size();
      if (std::from_chars(entry.data() + entry.rfind('=') + 1, end, rank).ptr == end) ranks_.insert(rank);
    }
    FamilyShape shape;
    std::string why;
    if (!family_ || !model_shape(f_, &shape, &why)) return;
    for (FamilyTensor::Where where : {FamilyTensor::Where::kHub, FamilyTensor::Where::kMemory}) {
      for (ExpandedTensor& t : expand(*family_, shape, where)) {
        const auto [at, first] = shapes_.emplace(std::move(t.name), t.shape);
        if (!first && at->second != t.shape) either_way_.insert(at->first);
      }
    }
  }

  AdapterLayout run(const AdapterFile& file) {
    for (const AdapterFileModule& m : file.incomplete) judge_half(m);
    for (const AdapterFileModule& m : file.modules) {
      if (m.rank > 0) judge(m);
    }
    out_.found_total = out_.judged + static_cast<std::int64_t>(file.incomplete.size());
    return std::move(out_);
  }

 private:
  void fault(const AdapterFileModule& m, AdapterFault what, std::string expected) {
    out_.module.push_back(m.path);
    out_.part.push_back(m.part.part);
    out_.layer.push_back(m.part.layer);
    out_.fault.push_back(what);
    out_.tensor.emplace_back(m.a ? m.a->name : m.b ? m.b->name : std::string_view(m.path));
    out_.found.push_back("A " + shape_text(m.a) + ", B " + shape_text(m.b));
    out_.expected.push_back(std::move(expected));
  }

  void judge_half(const AdapterFileModule& m) {
    if (!m.a || !m.b) fault(m, AdapterFault::kNoPair, "a lora_A and a lora_B");
    else if (m.a->elements() == 0) fault(m, AdapterFault::kMisfit, "values: a save under ZeRO-3 without gathering leaves none");
    else fault(m, AdapterFault::kMisfit, "as many rows of A as columns of B");
  }

  void judge(const AdapterFileModule& m) {
    ++out_.judged;
    if (m.part.part == Part::kEmbedding || m.part.part == Part::kHead) return;  // resized at will
    if (m.is_parameter) return judge_stack(m);
    const std::vector<std::int64_t> base = base_shape(m.path);  // [out, in]
    if (base.size() == 2 && ((base[0] > 0 && base[0] != m.out) || (base[1] > 0 && base[1] != m.in))) {
      return fault(m, AdapterFault::kBaseShape, pair_text(m.rank, base[1] > 0 ? base[1] : m.in, base[0] > 0 ? base[0] : m.out));
    }
    judge_rank(m, m.rank);
  }

  void judge_rank(const AdapterFileModule& m, std::int64_t rows) {
    const bool fixed = !f_.method.known() || f_.method.value() != Method::kOtherAdapter;  // AdaLoRA prunes ranks
    if (!fixed || ranks_.empty() || ranks_.count(m.rank)) return;
    fault(m, AdapterFault::kRank, pair_text(rows / m.rank * *ranks_.begin(), m.in, m.out));
  }

  void judge_stack(const AdapterFileModule& m) {
    const std::int64_t rows = m.copies * m.rank;
    const auto stack = shapes_.find(m.path);
    if (stack == shapes_.end() || stack->second.size() != 3) return judge_unknown_stack(m);
    const std::int64_t experts = stack->second[0], first = stack->second[1], last = stack->second[2];
    if (experts <= 0 || first <= 0 || last <= 0 || m.copies != experts) return;
    const bool sides_fit = (m.in == first && m.out == last) || (m.in == last && m.out == first);
    if (!sides_fit) {
      const bool takes_last = a_takes_last_.value_or(true);
      return fault(m, AdapterFault::kBaseShape, pair_text(rows, takes_last ? last : first, takes_last ? first : last));
    }
    judge_rank(m, rows);
    if (!a_takes_last_ || either_way_.count(m.path)) return;
    const std::int64_t in = *a_takes_last_ ? last : first;
    const bool square = first == last;
    if (square ? !a_took_last_ || *a_took_last_ == *a_takes_last_ : m.in == in) return;
    fault(m, AdapterFault::kStackOrder, pair_text(rows, in, *a_takes_last_ ? first : last) + (square ? ", and A and B exchanged" : ""));
    const std::string side = *a_takes_last_ ? "last" : "middle";
    out_.stack_order = "PEFT " + f_.peft.value().text + " gives A the " + side + " side of a stack of this family";
    out_.loads_silently |= square;
  }

  /// No parameter of the experts has these sides: with a known model, a fault.
  void judge_unknown_stack(const AdapterFileModule& m) {
    const std::string holder = m.path.substr(0, m.path.rfind(".experts") == std::string::npos ? 0 : m.path.rfind(".experts") + 8);
    std::string expected;
    for (const auto& [name, shape] : shapes_) {
      if (holder.empty() || name.compare(0, holder.size(), holder) != 0 || shape.size() != 3) continue;
      if (shape[0] <= 0 || shape[1] <= 0 || shape[2] <= 0 || ranks_.empty()) return;
      const bool last = a_takes_last_.value_or(true);
      expected += (expected.empty() ? "" : " or ") + name.substr(holder.size() + 1) + " " +
                  pair_text(shape[0] * *ranks_.begin(), last ? shape[2] : shape[1], last ? shape[1] : shape[2]);
    }
    if (!expected.empty()) fault(m, AdapterFault::kBaseShape, expected);
  }

  /// Of the file at hand, else of the family; empty if neither knows it.
  std::vector<std::int64_t> base_shape(const std::string& path) const {
    const std::string name = path + ".weight";
    const TensorView* t = context_.model.find(name);
    const bool plain = t && (t->dtype == DType::kF32 || t->dtype == DType::kBF16 || t->dtype == DType::kF16);
    if (plain) return {t->shape.begin(), t->shape.end()};
    const auto found = shapes_.find(name);
    return found == shapes_.end() ? std::vector<std::int64_t>{} : found->second;
  }

  MeasureContext& context_;
  FactSheet& f_;
  const Family* family_ = nullptr;
  std::optional<bool> a_takes_last_;  // under the release that is to load the file
  std::optional<bool> a_took_last_;   // under the one that wrote it, if that is another
  std::set<std::int64_t> ranks_;
  std::map<std::string, std::vector<std::int64_t>, std::less<>> shapes_;
  std::set<std::string, std::less<>> either_way_;  // stacks whose sides lie the one way in files and the other in memory
  AdapterLayout out_;
};

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (context.adapter.empty()) {
    f.adapter_layout.explain_unknown("no adapter weights are among the inputs");
    return;
  }
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  const AdapterFile file = read_adapter_file(context.adapter, family, f);
  const bool lora = std::any_of(file.modules.begin(), file.modules.end(), [](const AdapterFileModule& m) { return m.rank > 0; });
  if (!lora && file.incomplete.empty()) {
    f.adapter_layout.explain_unknown("the adapter file holds no pairs of LoRA matrices (lora_A, lora_B)");
    return;
  }
  Source source;
  source.role = Role::kAdapterWeights;
  source.file = context.adapter.files().front();
  AdapterLayout layout = Layout(context).run(file);
  context.records.push_back({"adapter_layout", "host", to_text(layout)});
  f.adapter_layout.set(std::move(layout), Origin::kMeasured, source);
}

}  // namespace

extern const Measure measure_adapter_layout;
const Measure measure_adapter_layout = {.name = "adapter_layout", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
