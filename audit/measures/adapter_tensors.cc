// Norms and zeros of the LoRA matrices in adapter_model.safetensors, module by module and, in stacks, expert by expert.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <thread>

#include "audit/measures/adapter_file.h"
#include "audit/measures/measure.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"adapter.tensors"};

/// Of one expert's slice, or of the whole module.
struct Slice {
  double squares_a = 0, squares_b = 0;
  bool b_zero = true;
  std::int64_t non_finite = 0;
};

/// Sums in index order, so the result does not depend on threads.
void add(double v, double* squares, std::int64_t* non_finite) {
  if (!std::isfinite(v)) ++*non_finite;
  *squares += v * v;
}

/// False if a matrix cannot be decoded.
bool measure_module(const AdapterFileModule& m, std::vector<Slice>* slices) {
  slices->assign(static_cast<std::size_t>(m.copies), {});
  const std::int64_t wide = m.copies * m.rank;
  std::vector<double> row(static_cast<std::size_t>(std::max(m.in, wide)));
  for (std::int64_t r = 0; r < wide; ++r) {  // A [copies * rank, in]: expert slow
    Slice& s = (*slices)[r / m.rank];
    if (!decode(*m.a, r * m.in, m.in, row.data())) return false;
    for (std::int64_t c = 0; c < m.in; ++c) add(row[c], &s.squares_a, &s.non_finite);
  }
  for (std::int64_t o = 0; o < m.out; ++o) {  // B [out, rank * copies]: expert fast
    if (!decode(*m.b, o * wide, wide, row.data())) return false;
    const double* v = row.data();
    for (std::int64_t r = 0; r < m.rank; ++r) {
      for (Slice& s : *slices) {
        add(*v, &s.squares_b, &s.non_finite);
        s.b_zero &= *v++ == 0;
      }
    }
  }
  return true;
}

void append(const AdapterFileModule& m, const std::vector<Slice>& slices, AdapterTensors* out) {
  for (std::size_t e = 0; e < slices.size(); ++e) {
    out->module.push_back(m.path);
    out->part.push_back(m.part.part);
    out->layer.push_back(m.part.layer);
    out->expert.push_back(m.copies > 1 ? static_cast<int>(e) : m.part.expert);
    out->rank.push_back(m.rank);
    out->norm_a.push_back(std::sqrt(slices[e].squares_a));
    out->norm_b.push_back(std::sqrt(slices[e].squares_b));
    out->b_zero.push_back(slices[e].b_zero);
    out->non_finite.push_back(slices[e].non_finite);
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
  for (std::size_t i = 0; i < modules.size(); ++i) read[i] ? append(*modules[i], slices[i], &out) : static_cast<void>(++unread);
  std::string note = std::to_string(modules.size() - unread) + " modules";
  if (unread > 0) note += ", " + std::to_string(unread) + " in a type that cannot be decoded";
  if (!file.incomplete.empty()) note += ", " + std::to_string(file.incomplete.size()) + " without a matching pair: " + file.incomplete.front();
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
