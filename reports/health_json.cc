// Expert health as JSON, described by reports/health.schema.json. A number that does not exist or was not measured has
// no key.
#include <cmath>
#include <nlohmann/json.hpp>
#include <ostream>

#include "reports/trace_json.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

using Json = nlohmann::ordered_json;

Json json_of(double v) { return number_json(v); }
template <class T>
Json json_of(const T& v) {
  return v;
}
Json json_of(const std::vector<double>& values) {
  Json list = Json::array();
  for (const double v : values) list.push_back(json_of(v));
  return list;
}

template <class T>
Json object_of(const T& v);
Json json_of(const PlacementLayer& v) { return object_of(v); }
Json json_of(const std::vector<PlacementLayer>& layers) {
  Json list = Json::array();
  for (const PlacementLayer& l : layers) list.push_back(json_of(l));
  return list;
}

template <class T>
Json object_of(const T& v) {
  Json object = Json::object();
  T::visit(v, [&](const char* name, const auto& field) { object[name] = json_of(field); });
  return object;
}

Json metric_json(const HealthMetric& m) {
  Json object = {{"outcome", m.cannot_tell.empty() ? "measured" : "cannot_tell"}, {"value", json_of(m.value)}};
  if (!m.cannot_tell.empty()) object["why"] = m.cannot_tell;
  if (!std::isnan(m.chance)) object["chance"] = json_of(m.chance);
  if (!std::isnan(m.floor)) object["floor"] = json_of(m.floor);
  if (!std::isnan(m.low)) object["interval_95"] = {json_of(m.low), json_of(m.high)};
  return object;
}

Json layer_json(const LayerHealth& l) {
  Json object = {{"layer", l.layer}};
  if (!l.module.empty()) object["module"] = l.module;
  object["experts"] = l.experts;
  if (l.top_k > 0) object["top_k"] = l.top_k;
  if (l.tokens > 0) object["tokens"] = l.tokens;  // counts without k do not say
  object["choices"] = l.choices;
  object["choices_from"] = l.choices_from;
  object["blocks"] = l.blocks;
  Json metrics = Json::object();
  for (const HealthMetric& m : l.metrics) {
    if (!std::isnan(m.value)) metrics[m.name] = metric_json(m);
  }
  object["metrics"] = std::move(metrics);
  object["load"] = l.load;
  object["utilisation"] = json_of(l.utilisation);
  for (const auto& [low, high] : l.utilisation_interval) object["utilisation_95"].push_back({json_of(low), json_of(high)});
  if (!l.importance.empty()) object["importance"] = json_of(l.importance);
  if (!l.gate_mass.empty()) object["gate_mass"] = json_of(l.gate_mass);
  if (!l.dropped.empty()) object["dropped"] = l.dropped;
  if (!l.together.empty()) {
    object["lift_chance"] = json_of(l.lift_chance);
    for (const CoActivation& c : l.together) object["most_together"].push_back(object_of(c));
  }
  if (!l.co_activation.empty()) {
    for (std::int64_t row = 0; row < l.experts; ++row) {
      const auto begin = l.co_activation.begin() + row * l.experts;
      object["co_activation"].push_back(std::vector<std::int64_t>(begin, begin + l.experts));
    }
  }
  return object;
}

}  // namespace

void write_health_json(const HealthReport& r, const WriterOptions&, std::ostream& out) {
  Json root = {{"schema_version", 1}, {"tool", {{"name", "moe-audit"}, {"version", MOE_AUDIT_VERSION}}}};
  root["trace"] = {{"path", r.path}, {"format", r.format}};
  const auto put = [&](const char* key, const std::string& text) {
    if (!text.empty()) root["trace"][key] = text;
  };
  put("recorder", r.recorder);
  put("model", r.model);
  put("score", r.score);
  put("score_from", r.score_from);
  put("note", r.note);
  put("compared_with", r.compared_with);
  root["trace"]["steps"] = r.steps;
  root["trace"]["micro_batches"] = r.micro_batches;
  root["trace"]["ranks"] = r.ranks;
  if (!r.backend.empty()) root["backend"] = r.backend;
  if (!r.warning.empty()) root["warning"] = r.warning;
  root["problems"] = problems_json(r.problems, r.weight_problems);
  root["layers"] = Json::array();
  for (const LayerHealth& l : r.layers) root["layers"].push_back(layer_json(l));
  root["across_layers"] = Json::array();
  for (const AcrossLayers& a : r.across) root["across_layers"].push_back(object_of(a));
  if (r.placement.ranks > 0) root["placement"] = object_of(r.placement);
  out << root.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace moeaudit
