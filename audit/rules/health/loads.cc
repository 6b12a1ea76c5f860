#include "audit/rules/health/loads.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "audit/rules/say.h"

namespace moeaudit::loads {

const TraceLoads* table(Facts& f, Outcome* otherwise) {
  const std::string* format = f.require(f->trace_format);
  if (format && *format == "none") {
    *otherwise = Outcome::not_applicable("no recorded trace was given");
    return nullptr;
  }
  const TraceLoads* t = f.require(f->trace_loads);
  if (f.missing()) *otherwise = f.cannot_tell();
  return f.missing() ? nullptr : t;
}

double effective_experts(const TraceLoads& t, std::size_t i) {
  return std::exp(t.normalised_entropy[i] * std::log(static_cast<double>(t.experts[i])));
}

double evenness(const TraceLoads& t, std::size_t i) {
  const double k = static_cast<double>(std::max<std::int64_t>(t.top_k[i], 1)), experts = static_cast<double>(t.experts[i]);
  return experts > k ? (effective_experts(t, i) - k) / (experts - k) : std::nan("");
}

bool collapsed(const TraceLoads& t, std::size_t i) { return t.can_judge[i] && evenness(t, i) <= kCollapsed; }

std::string sample_for(const TraceLoads& t, std::size_t i, double choices) {
  const double all = choices * static_cast<double>(t.experts[i]);
  if (t.top_k[i] == 0) return say::count(std::llround(std::ceil(all))) + " choices";
  return say::count(std::llround(std::ceil(all / static_cast<double>(t.top_k[i])))) + " tokens";
}

Outcome too_few(const Facts& f, const TraceLoads& t, const std::vector<std::size_t>& rows, double choices) {
  const std::size_t i = rows.front();
  Outcome o;
  o.kind = Outcome::Kind::kCannotTell;
  o.missing.push_back({std::string(f->trace_loads.info().name), "a trace of more tokens",
                       layers_of(t, rows) + ": " + say::number(t.fair_share[i]) + " choices an expert are too few; it takes " +
                           sample_for(t, i, choices)});
  return o;
}

std::string rounded(double v) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.3g", v);
  return buffer;
}

std::string layers_of(const TraceLoads& t, const std::vector<std::size_t>& rows) {
  std::vector<std::int64_t> layers;
  for (const std::size_t i : rows) layers.push_back(t.layer[i]);
  return (layers.size() == 1 ? "layer " : "layers ") + to_text(layers);
}

Evidence evidence(const Facts& f, const TraceLoads& t, std::size_t i, const std::string& name, std::string value) {
  return {"trace.loads " + name + " of layer " + std::to_string(t.layer[i]), std::move(value), location_of(f->trace_loads.source())};
}

std::string show(const Facts& f) { return "    moe-audit health " + f->trace_loads.source().file + " --verbose\n"; }

}  // namespace moeaudit::loads
