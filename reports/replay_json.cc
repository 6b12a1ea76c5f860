// A replay as JSON, described by reports/replay.schema.json.
#include <nlohmann/json.hpp>
#include <ostream>

#include "reports/trace_json.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

using Json = nlohmann::ordered_json;

Json json_of(double v) { return number_json(v); }

Json row_json(const ReplayTable& t, std::size_t i) {
  Json row = {{"quantity", t.quantity[i]}};
  if (t.layer[i] >= 0) row["layer"] = t.layer[i];
  row["outcome"] = t.compared[i] == 0 ? "cannot_tell" : t.differing[i] > 0 ? "differs" : "agrees";
  if (!t.missing[i].empty()) row["missing"] = t.missing[i];
  row["compared"] = t.compared[i];
  row["differing"] = t.differing[i];
  if (t.compared[i] == 0) return row;
  row["held_to"] = t.held_to[i];
  row["recorded"] = json_of(t.recorded[i]);
  row["expected"] = json_of(t.expected[i]);
  row["band"] = json_of(t.band[i]);
  row["distance"] = json_of(t.distance[i]);
  const auto place = [&](const char* key, std::int64_t value) {
    if (value >= 0) row[key] = value;
  };
  place("step", t.step[i]);
  place("micro_batch", t.micro_batch[i]);
  place("rank", t.rank[i]);
  if (!t.file[i].empty()) row["file"] = t.file[i];
  if (t.line[i] > 0) row["line"] = t.line[i];
  if (!t.name[i].empty()) {
    row["found"] = {{"formula", t.formula[i]},
                    {"name", t.name[i]},
                    {"factor", t.factor[i]},
                    {"factor_value", json_of(t.factor_value[i])},
                    {"fit", json_of(t.fit[i])}};
    if (!t.also[i].empty()) row["found"]["also"] = t.also[i];
  }
  if (!t.runner_up[i].empty()) row["runner_up"] = {{"name", t.runner_up[i]}, {"fit", json_of(t.runner_up_fit[i])}};
  return row;
}

}  // namespace

void write_replay_json(const ReplayReport& r, const WriterOptions&, std::ostream& out) {
  const ReplayTable& t = r.table;
  Json root = {{"schema_version", 1}, {"tool", {{"name", "moe-audit"}, {"version", MOE_AUDIT_VERSION}}}};
  root["trace"] = {{"path", t.path},
                   {"steps", t.steps},
                   {"micro_batches", t.micro_batches},
                   {"ranks", t.ranks},
                   {"accumulation", t.accumulation}};
  const auto put = [&](const char* key, const std::string& text) {
    if (!text.empty()) root["trace"][key] = text;
  };
  put("framework", t.framework);
  put("trainer", t.trainer);
  put("model_type", t.model_type);
  put("model_class", t.model_class);
  put("packages", t.packages);
  if (!r.backend.empty()) root["backend"] = r.backend;
  if (!r.warning.empty()) root["warning"] = r.warning;
  root["problems"] = problems_json(r.problems, r.weight_problems);
  root["quantities"] = Json::array();
  for (std::size_t i = 0; i < t.quantity.size(); ++i) root["quantities"].push_back(row_json(t, i));
  out << root.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace moeaudit
