// A scaling pair for people, and as JSON (reports/compare.schema.json).
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <ostream>

#include "reports/page.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

std::string number(double v, const char* form = "%.6g") {
  char text[32];
  std::snprintf(text, sizeof text, form, v);
  return text;
}

}  // namespace

void write_pair_text(const PairReport& r, const WriterOptions& options, std::ostream& out) {
  const Paint paint{options.color};
  out << paint.bold("compare") << "  " << r.a << "  " << r.b << "\n";
  if (!r.differs.empty()) fill(out, "differ in " + join(r.differs, ", "), 2, options.width);
  for (const InputProblem& p : r.problems) {
    fill(out, std::string(p.fatal ? "problem: " : "note: ") + p.file + ": " + p.what + "; " + p.remedy, 2,
         options.width);
  }
  for (const WeightProblem& p : r.weight_problems) fill(out, "problem: " + p.file + ": " + p.what, 2, options.width);
  if (!r.not_comparable.empty()) fill(out, "No pair: " + r.not_comparable + ".", 2, options.width);
  if (!r.note.empty()) fill(out, r.note, 2, options.width);
  if (!r.rows.empty()) out << "\n";
  for (const PairRow& row : r.rows) {
    std::string line =
        row.quantity + ": " + number(row.a) + " -> " + number(row.b) + ", ratio " + number(row.ratio) + ": ";
    const std::string factor = row.factor.empty() ? "1" : row.factor + " = " + number(row.factor_value);
    const std::string off = number(100 * std::expm1(row.off), "%.2g") + " %";
    if (!row.named) {
      line += "no product of the settings; the nearest is " + factor + ", " + off + " away";
    } else {
      line += factor;
      if (row.off > 1e-6) line += " within " + off;
    }
    if (!row.rule.empty() && row.named) line += "; it should be 1 (" + row.rule + ")";
    fill(out, row.rule.empty() && row.named ? line : paint.bold(line), 2, options.width);
  }
}

void write_pair_json(const PairReport& r, const WriterOptions&, std::ostream& out) {
  using Json = nlohmann::ordered_json;
  const auto json_of = [](double v) -> Json {
    if (std::isfinite(v)) return v;
    return std::isnan(v) ? "nan" : v > 0 ? "inf" : "-inf";
  };
  Json root = {
      {"schema_version", 1}, {"tool", {{"name", "moe-audit"}, {"version", MOE_AUDIT_VERSION}}}, {"a", r.a}, {"b", r.b}};
  root["differs"] = r.differs;
  if (!r.note.empty()) root["note"] = r.note;
  if (!r.not_comparable.empty()) root["not_comparable"] = r.not_comparable;
  root["problems"] = Json::array();
  for (const InputProblem& p : r.problems)
    root["problems"].push_back({{"file", p.file}, {"what", p.what}, {"remedy", p.remedy}, {"fatal", p.fatal}});
  for (const WeightProblem& p : r.weight_problems)
    root["problems"].push_back(
        {{"file", p.file}, {"what", p.what}, {"remedy", "record the run again"}, {"fatal", true}});
  root["quantities"] = Json::array();
  for (const PairRow& row : r.rows) {
    Json object = {{"quantity", row.quantity},    {"a", json_of(row.a)},  {"b", json_of(row.b)},
                   {"ratio", json_of(row.ratio)}, {"factor", row.factor}, {"factor_value", json_of(row.factor_value)},
                   {"off", json_of(row.off)}};
    if (!row.named) object["named"] = false;
    if (!row.rule.empty() && row.named) object["rule"] = row.rule;
    root["quantities"].push_back(std::move(object));
  }
  out << root.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace moeaudit
