// Every row of every router weight, one expert's vector each: cheap, and done in every audit with weights.
#include <array>
#include <vector>

#include "audit/measures/measure.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/value_scan.h"
#include "audit/tensors/guarded_read.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"weights.router_rows"};
constexpr std::array<std::string_view, 1> kWants = {"weights.routers"};

void append(int layer, std::int64_t expert, const std::string& name, const std::string& file, const kernels::ScanResult& r, RouterRows* out) {
  out->layer.push_back(layer);
  out->expert.push_back(static_cast<int>(expert));
  out->tensor.push_back(name);
  out->file.push_back(file);
  out->elements.push_back(r.elements);
  out->non_finite.push_back(r.non_finite);
  out->zeros.push_back(r.zeros);
  out->min.push_back(r.min);
  out->max.push_back(r.max);
  out->sum.push_back(r.sum);
  out->sum_of_squares.push_back(r.sum_of_squares);
  out->hash.push_back(hash_text(r.hash));
}

/// Of a router that is stored [hidden, experts], whose rows are no piece of it; what is wrong with it, or empty.
std::string add_columns(const TensorStore& model, const RouterTable& routers, std::size_t i, RouterRows* out) {
  std::vector<float> values;
  if (const std::string fault = read_gate(model, routers, i, routers.tensor[i], &values); !fault.empty()) return "; not read: " + fault;
  for (std::int64_t e = 0; e < routers.experts[i]; ++e) {
    kernels::ScanResult r;
    kernels::scan(kernels::Stored::kF32, values.data() + e * routers.hidden[i], routers.hidden[i], &r);
    append(routers.layer[i], e, routers.tensor[i], routers.file[i], r, out);
  }
  return {};
}

void add_rows(const ValueScan& scan, int layer, const std::string& name, const std::string& file, double* scratch,
              const ReadGuard& guard, RouterRows* out, std::string* unread) {
  const std::int64_t columns = scan.values().columns();
  for (std::int64_t e = 0; columns > 0 && e < scan.values().elements() / columns; ++e) {
    kernels::ScanResult r;
    if (!guard.guarded([&] { r = scan.run(e * columns, columns, scratch); })) {
      if (unread->empty()) *unread = "; not read: " + name + " (the file became shorter, or the disk gives an error)";
      return;
    }
    append(layer, e, name, file, r, out);
  }
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (!f.routers.known()) {
    f.router_rows.explain_unknown(f.routers.why_unknown());
    return;
  }
  const RouterTable& routers = f.routers.value();
  RouterRows out;
  std::string unread;
  std::vector<double> scratch(static_cast<std::size_t>(ValueScan::scratch_length()));
  const ReadGuard guard;
  for (std::size_t i = 0; i < routers.layer.size(); ++i) {
    const TensorView* t = context.model.find(routers.tensor[i]);
    if (t == nullptr) continue;
    const ValueScan scan(context.model, *t);
    const bool whole_bytes = !scan.values().two_a_byte() || scan.values().columns() % 2 == 0;
    if (scan.values().kind() == StoredValues::Kind::kOpaque || !whole_bytes) {
      if (unread.empty()) unread = "; not decoded: " + routers.tensor[i] + " (" + std::string(t->dtype_text) + ")";
      continue;
    }
    if (routers.is_input_major(i)) {
      const std::string fault = add_columns(context.model, routers, i, &out);
      if (unread.empty()) unread = fault;
      continue;
    }
    add_rows(scan, routers.layer[i], routers.tensor[i], routers.file[i], scratch.data(), guard, &out, &unread);
  }
  context.records.push_back(
      {"router_rows", std::string("host ") + kernels::host_backend(),
       std::to_string(out.layer.size()) + " rows of " + std::to_string(routers.layer.size()) + " routers" + unread});
  if (out.layer.empty()) {
    f.router_rows.explain_unknown("no router is stored in a type that can be read" + unread);
    return;
  }
  f.router_rows.set(std::move(out), Origin::kMeasured, f.routers.source());
}

}  // namespace

extern const Measure measure_router_rows;
const Measure measure_router_rows = {.name = "router_rows", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit
