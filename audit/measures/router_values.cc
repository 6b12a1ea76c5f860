// Reads every router tensor once: values that are not finite, rows that are exactly zero.
#include <algorithm>
#include <array>
#include <cmath>

#include "audit/measures/measure.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"weights.router_values"};
constexpr std::array<std::string_view, 1> kWants = {"weights.routers"};

struct Scan {
  std::int64_t non_finite = 0, first_index = -1, zero_rows = 0, first_zero_row = -1;
};

constexpr std::int64_t kBlock = 1 << 16;  // values decoded at a time: memory does not grow with what the file claims

/// A vector counts as one row that is never "zero": biases may well be. Of a router that is stored [hidden, experts] a column is
/// what an expert has.
bool scan(const TensorView& t, bool input_major, Scan* out) {
  const bool matrix = t.shape.size() == 2;
  const std::int64_t rows = matrix ? t.shape[0] : 1, columns = matrix ? t.shape[1] : t.elements();
  std::vector<double> values(static_cast<std::size_t>(std::min(kBlock, columns)));
  std::vector<char> zero_columns(static_cast<std::size_t>(matrix && input_major ? columns : 0), 1);
  for (std::int64_t r = 0; columns > 0 && r < rows; ++r) {
    bool zero = matrix && !input_major;
    for (std::int64_t from = 0; from < columns; from += kBlock) {
      const std::int64_t n = std::min(kBlock, columns - from);
      if (!decode(t, r * columns + from, n, values.data())) return false;
      for (std::int64_t c = 0; c < n; ++c) {
        zero &= values[c] == 0;
        if (!zero_columns.empty()) zero_columns[static_cast<std::size_t>(from + c)] &= values[c] == 0;
        if (std::isfinite(values[c])) continue;
        if (out->non_finite++ == 0) out->first_index = r * columns + from + c;
      }
    }
    if (zero && out->zero_rows++ == 0) out->first_zero_row = r;
  }
  for (std::size_t c = 0; c < zero_columns.size(); ++c) {
    if (zero_columns[c] && out->zero_rows++ == 0) out->first_zero_row = static_cast<std::int64_t>(c);
  }
  return true;
}

/// Integers hold a quantised router: bytes of codes, no values.
bool holds_codes(DType d) {
  return d == DType::kU8 || d == DType::kI8 || d == DType::kI32 || d == DType::kU32 || d == DType::kI16 || d == DType::kU16;
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (!f.routers.known()) {
    f.router_values.explain_unknown(f.routers.why_unknown());
    return;
  }
  RouterValues out;
  std::string unread;
  auto add = [&](int layer, const std::string& name, bool is_buffer, bool input_major = false) {
    const TensorView* t = name.empty() ? nullptr : context.model.find(name);
    if (!t) return;
    Scan result;
    if (holds_codes(t->dtype) || !scan(*t, input_major, &result)) {
      if (unread.empty()) unread = "; not read: " + name + " (" + std::string(t->dtype_text) + ")";
      return;
    }
    out.layer.push_back(layer);
    out.tensor.push_back(name);
    out.file.push_back(context.model.files()[t->file]);
    out.is_buffer.push_back(is_buffer);
    out.non_finite.push_back(result.non_finite);
    out.first_index.push_back(result.first_index);
    out.zero_rows.push_back(result.zero_rows);
    out.first_zero_row.push_back(result.first_zero_row);
  };
  const RouterTable& routers = f.routers.value();
  for (std::size_t i = 0; i < routers.layer.size(); ++i) {
    const std::string& weight = routers.tensor[i];
    add(routers.layer[i], weight, false, routers.is_input_major(i));
    add(routers.layer[i], weight.substr(0, weight.rfind('.') + 1) + "bias", false);
    add(routers.layer[i], routers.bias[i], true);
  }
  context.records.push_back({"router_values", "host float64", std::to_string(out.layer.size()) + " tensors" + unread});
  if (out.layer.empty()) {
    f.router_values.explain_unknown("no router tensor is stored in a type that can be read" + unread);
    return;
  }
  f.router_values.set(std::move(out), Origin::kMeasured, f.routers.source());
}

}  // namespace

extern const Measure measure_router_values;
const Measure measure_router_values = {.name = "router_values", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit
