// The correction biases of the routers, value by value: a few hundred numbers a layer.
#include <algorithm>
#include <array>
#include <cmath>

#include "audit/families/family.h"
#include "audit/measures/measure.h"
#include "kernels/host/low_precision.h"

namespace moeaudit {
namespace {

namespace k = kernels;

constexpr std::array<std::string_view, 1> kSupplies = {"weights.correction_bias"};
constexpr std::array<std::string_view, 1> kWants = {"weights.routers"};
constexpr std::int64_t kMostElements = 1 << 20;  // experts of one layer

std::int64_t off_grid(const std::vector<double>& values, k::Float dtype) {
  return std::count_if(values.begin(), values.end(), [&](double v) { return std::isfinite(v) && k::round_to(v, dtype) != v; });
}

bool add_row(const TensorView& t, int layer, const std::string& file, CorrectionBias* out) {
  const std::int64_t n = t.elements();
  std::vector<double> values(static_cast<std::size_t>(n <= kMostElements ? n : 0));
  if (values.empty() || !decode(t, 0, n, values.data())) return false;
  double most = 0;
  for (double v : values) most = std::isfinite(v) ? std::max(most, std::fabs(v)) : most;
  out->layer.push_back(layer);
  out->tensor.emplace_back(t.name);
  out->file.push_back(file);
  out->dtype.push_back(t.dtype);
  out->elements.push_back(n);
  out->zeros.push_back(std::count(values.begin(), values.end(), 0.0));
  out->off_bf16.push_back(off_grid(values, k::Float::kBF16));
  out->off_fp16.push_back(off_grid(values, k::Float::kF16));
  out->max_abs.push_back(most);
  out->bf16_spacing.push_back(k::spacing(most, k::Float::kBF16));
  out->fp16_spacing.push_back(k::spacing(most, k::Float::kF16));
  std::sort(values.begin(), values.end());
  out->distinct.push_back(std::unique(values.begin(), values.end()) - values.begin());
  return true;
}

/// "e_score_correction_bias" among the tensors that the class keeps in float32.
bool family_keeps_fp32(const FactSheet& f, const std::string& tensor) {
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  if (!family) return false;
  return std::any_of(family->fp32_tensors.begin(), family->fp32_tensors.end(),
                     [&](std::string_view kept) { return tensor.find(kept) != std::string::npos; });
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (!f.routers.known()) {
    f.correction_bias.explain_unknown(f.routers.why_unknown());
    return;
  }
  const RouterTable& routers = f.routers.value();
  CorrectionBias out;
  std::size_t unread = 0;
  for (std::size_t i = 0; i < routers.layer.size(); ++i) {
    const TensorView* t = routers.bias[i].empty() ? nullptr : context.model.find(routers.bias[i]);
    if (t && !add_row(*t, routers.layer[i], context.model.files()[t->file], &out)) ++unread;
  }
  if (out.layer.empty()) {
    f.correction_bias.explain_unknown(unread > 0 ? "the correction bias is stored in a type that cannot be decoded"
                                                 : "the weight files hold no correction bias");
    return;
  }
  out.kept_fp32 = family_keeps_fp32(f, out.tensor.front());
  Source source = f.routers.source();
  source.file = out.file.front();
  source.tensor = out.tensor.front();
  context.records.push_back({"correction_bias", "host float64", std::to_string(out.layer.size()) + " layers"});
  f.correction_bias.set(std::move(out), Origin::kMeasured, source);
}

}  // namespace

extern const Measure measure_correction_bias;
const Measure measure_correction_bias = {.name = "correction_bias", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit
