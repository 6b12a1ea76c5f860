// Norms and zeros of the LoRA matrices in adapter_model.safetensors, module by module and, in stacks, expert by expert.
#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cmath>
#include <optional>
#include <thread>

#include "audit/measures/adapter_file.h"
#include "audit/measures/measure.h"
#include "audit/measures/python_regex.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"adapter.tensors"};

constexpr std::int64_t kMostRank = 1024;  // the Gram matrices below have rank x rank entries

/// Of one expert's slice, or of the whole module.
struct Slice {
  double squares_a = 0, squares_b = 0;
  std::vector<double> gram_a, gram_b;  // A A^T and B^T B
  bool b_zero = true;
  std::int64_t non_finite = 0;
  bool bad_in_b = false;
  std::int64_t bad_index = -1;
};

/// Sums in index order, so the result does not depend on threads.
void add(double v, std::int64_t index, bool in_b, double* squares, Slice* s) {
  *squares += v * v;
  if (std::isfinite(v)) return;
  if (s->non_finite++ > 0) return;
  s->bad_in_b = in_b;
  s->bad_index = index;
}

/// gram += v v^T
void add_outer(const double* v, std::int64_t rank, std::vector<double>* gram) {
  for (std::int64_t i = 0; i < rank; ++i) {
    double* row = gram->data() + i * rank;
    for (std::int64_t j = 0; j < rank; ++j) row[j] += v[i] * v[j];
  }
}

/// |B A|^2 = trace((A A^T) (B^T B)), without forming B A. NaN if the rank is too large.
double norm_of_product(const Slice& s) {
  if (s.gram_a.empty()) return std::nan("");
  double sum = 0;
  for (std::size_t i = 0; i < s.gram_a.size(); ++i) sum += s.gram_a[i] * s.gram_b[i];
  return std::sqrt(sum < 0 ? 0 : sum);
}

/// A [copies * rank, in]: expert slow.
bool measure_a(const AdapterFileModule& m, std::vector<Slice>* slices) {
  std::vector<double> row(static_cast<std::size_t>(m.in));
  std::vector<double> columns;  // of one slice, rank values each
  for (std::int64_t e = 0; e < m.copies; ++e) {
    Slice& s = (*slices)[e];
    if (m.rank <= kMostRank) columns.assign(static_cast<std::size_t>(m.in * m.rank), 0);
    for (std::int64_t r = 0; r < m.rank; ++r) {
      const std::int64_t first = (e * m.rank + r) * m.in;
      if (!decode(*m.a, first, m.in, row.data())) return false;
      for (std::int64_t c = 0; c < m.in; ++c) add(row[c], first + c, false, &s.squares_a, &s);
      for (std::int64_t c = 0; c < m.in && !columns.empty(); ++c) columns[c * m.rank + r] = row[c];
    }
    if (columns.empty()) continue;
    s.gram_a.assign(static_cast<std::size_t>(m.rank * m.rank), 0);
    for (std::int64_t c = 0; c < m.in; ++c) add_outer(columns.data() + c * m.rank, m.rank, &s.gram_a);
  }
  return true;
}

/// B [out, rank * copies]: expert fast.
bool measure_b(const AdapterFileModule& m, std::vector<Slice>* slices) {
  const std::int64_t wide = m.copies * m.rank;
  std::vector<double> row(static_cast<std::size_t>(wide)), of_expert(static_cast<std::size_t>(m.rank));
  for (Slice& s : *slices) s.gram_b.assign(s.gram_a.size(), 0);
  for (std::int64_t o = 0; o < m.out; ++o) {
    if (!decode(*m.b, o * wide, wide, row.data())) return false;
    for (std::int64_t e = 0; e < m.copies; ++e) {
      Slice& s = (*slices)[e];
      for (std::int64_t r = 0; r < m.rank; ++r) {
        const double v = row[r * m.copies + e];
        add(v, o * wide + r * m.copies + e, true, &s.squares_b, &s);
        s.b_zero &= v == 0;
        of_expert[r] = v;
      }
      if (!s.gram_b.empty()) add_outer(of_expert.data(), m.rank, &s.gram_b);
    }
  }
  return true;
}

/// False if a matrix cannot be decoded.
bool measure_module(const AdapterFileModule& m, std::vector<Slice>* slices) {
  slices->assign(static_cast<std::size_t>(m.copies), {});
  return measure_a(m, slices) && measure_b(m, slices);
}

// ---- the scale -----------------------------------------------------------------------------------------------------

/// scaling[adapter] of PEFT's LoraLayer.update_layer: alpha / r, or alpha / sqrt(r) with rsLoRA.
class Scale {
 public:
  explicit Scale(const FactSheet& f) {
    if (const double* alpha = of_adapter_config(f.adapter_alpha)) alpha_ = *alpha;
    if (const bool* rslora = of_adapter_config(f.adapter_rslora)) rslora_ = *rslora;
    const std::vector<std::string>* patterns = of_adapter_config(f.alpha_pattern);
    for (const std::string& entry : patterns ? *patterns : std::vector<std::string>{}) {
      const std::size_t equals = entry.rfind('=');
      double alpha = 0;
      if (equals == std::string::npos) continue;
      std::from_chars(entry.data() + equals + 1, entry.data() + entry.size(), alpha);
      RegexError error;
      patterns_.emplace_back(PythonRegex::compile("(.*\\.)?(" + entry.substr(0, equals) + ")$", &error), alpha);
    }
  }
  /// NaN if alpha is not known, or a pattern cannot be read.
  double of(const AdapterFileModule& m) const {
    double alpha = alpha_;
    std::int64_t steps = 1'000'000;
    for (const auto& [regex, value] : patterns_) {
      const RegexAnswer answer = regex ? regex->match(m.path, &steps) : RegexAnswer::kGaveUp;
      if (answer == RegexAnswer::kGaveUp) return std::nan("");
      if (answer == RegexAnswer::kNo) continue;
      alpha = value;
      break;
    }
    const double rank = static_cast<double>(m.rank);
    return alpha / (rslora_ ? std::sqrt(rank) : rank);
  }
  std::string text() const { return rslora_ ? "alpha / sqrt(r)" : "alpha / r"; }

 private:
  double alpha_ = std::nan("");
  bool rslora_ = false;
  std::vector<std::pair<std::optional<PythonRegex>, double>> patterns_;
};

void append(const AdapterFileModule& m, const std::vector<Slice>& slices, double scale, AdapterTensors* out) {
  for (std::size_t e = 0; e < slices.size(); ++e) {
    const Slice& s = slices[e];
    out->module.push_back(m.path);
    out->part.push_back(m.part.part);
    out->layer.push_back(m.part.layer);
    out->expert.push_back(m.copies > 1 ? static_cast<int>(e) : m.part.expert);
    out->rank.push_back(m.rank);
    out->in.push_back(m.in);
    out->out.push_back(m.out);
    out->norm_a.push_back(std::sqrt(s.squares_a));
    out->norm_b.push_back(std::sqrt(s.squares_b));
    out->norm_ba.push_back(norm_of_product(s));
    out->scale.push_back(scale);
    out->b_zero.push_back(s.b_zero);
    out->non_finite.push_back(s.non_finite);
    out->bad_tensor.emplace_back(s.bad_index < 0 ? std::string_view() : s.bad_in_b ? m.b->name : m.a->name);
    out->bad_index.push_back(s.bad_index);
  }
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (context.adapter.empty()) {
    f.adapter_tensors.explain_unknown("no adapter weights are among the inputs");
    return;
  }
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  const AdapterFile file = read_adapter_file(context.adapter, family, f);
  std::vector<const AdapterFileModule*> modules;
  for (const AdapterFileModule& m : file.modules) {
    if (m.rank > 0) modules.push_back(&m);
  }
  if (modules.empty()) {
    f.adapter_tensors.explain_unknown("the adapter file holds no pairs of LoRA matrices (lora_A, lora_B)");
    return;
  }
  const Scale scale(f);
  std::vector<std::vector<Slice>> slices(modules.size());
  std::vector<char> read(modules.size());
  std::atomic<std::size_t> next{0};
  auto work = [&] {
    for (std::size_t i; (i = next.fetch_add(1)) < modules.size();) read[i] = measure_module(*modules[i], &slices[i]);
  };
  std::vector<std::thread> helpers;
  for (int t = 1; t < context.threads && static_cast<std::size_t>(t) < modules.size(); ++t) helpers.emplace_back(work);
  work();
  for (std::thread& t : helpers) t.join();

  AdapterTensors out;
  std::size_t unread = 0;
  for (std::size_t i = 0; i < modules.size(); ++i) {
    if (read[i]) append(*modules[i], slices[i], scale.of(*modules[i]), &out);
    else ++unread;
  }
  std::string note = std::to_string(modules.size() - unread) + " modules";
  if (unread > 0) note += ", " + std::to_string(unread) + " in a type that cannot be decoded";
  if (!file.incomplete.empty()) note += ", " + std::to_string(file.incomplete.size()) + " without a matching pair: " + file.incomplete.front().path;
  if (const auto [least, most] = std::minmax_element(out.scale.begin(), out.scale.end()); least != out.scale.end() && *least > 0) {
    note += ", scale " + scale.text() + " = " + to_text(*least) + (*least < *most ? " to " + to_text(*most) : "");
  }
  context.records.push_back({"adapter_tensors", "host float64", std::move(note)});
  if (out.module.empty()) {
    f.adapter_tensors.explain_unknown("the adapter's matrices are stored in a type that cannot be decoded");
    return;
  }
  Source source;
  source.role = Role::kAdapterWeights;
  source.file = context.adapter.files().front();
  f.adapter_tensors.set(std::move(out), Origin::kMeasured, source);
}

}  // namespace

extern const Measure measure_adapter_tensors;
const Measure measure_adapter_tensors = {.name = "adapter_tensors", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
