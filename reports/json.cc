// The JSON report, described by reports/schema.json: the superset of every other writer. nlohmann/json writes.
#include <cmath>
#include <ostream>
#include <type_traits>

#include <nlohmann/json.hpp>

#include "reports/writer.h"

namespace moeaudit {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSchemaVersion = 1;

// ---- values ----------------------------------------------------------------------------------------------------------

Json json_of(double v) {
  if (std::isfinite(v)) return v;
  return std::isnan(v) ? "nan" : v > 0 ? "inf" : "-inf";  // JSON has no such numbers
}
Json json_of(bool v) { return v; }
Json json_of(int v) { return v; }
Json json_of(std::int64_t v) { return v; }
Json json_of(char v) { return v != 0; }  // columns of flags
Json json_of(const std::string& v) { return v; }
Json json_of(const VersionSet& v) { return to_text(v); }

template <class T>
auto json_of(T v) -> std::enable_if_t<std::is_enum_v<T>, Json> {
  return name_of(v);
}

struct Ignore {
  void operator()(const char*, const auto&) const {}
};
template <class T>
concept Visitable = requires(const T& v) { T::visit(v, Ignore{}); };

template <Visitable T>
Json json_of(const T& v);

template <class T>
Json json_of(const std::vector<T>& v) {
  Json list = Json::array();
  for (const T& item : v) list.push_back(json_of(item));
  return list;
}

/// A struct, or a table: one array a column.
template <Visitable T>
Json json_of(const T& v) {
  Json object = Json::object();
  T::visit(v, [&](const char* name, const auto& field) { object[name] = json_of(field); });
  return object;
}

void put(Json& object, const char* key, const std::string& value) {
  if (!value.empty()) object[key] = value;
}

Json json_of(const Source& s) {
  Json object = {{"role", name_of(s.role)}};
  put(object, "file", s.file);
  if (s.line > 0) object["line"] = s.line;
  if (s.column > 0) object["column"] = s.column;
  put(object, "key", s.key);
  put(object, "tensor", s.tensor);
  put(object, "cite", s.cite);
  return object;
}

Json json_of(const Location& l) {
  Json object = Json::object();
  put(object, "file", l.file);
  if (l.line > 0) object["line"] = l.line;
  put(object, "key", l.key);
  put(object, "tensor", l.tensor);
  return object;
}

/// A table with a row for every tensor or expert: in JSON some 700 bytes a row, 60 MB for the largest models.
template <class T>
constexpr bool kLongTable = std::is_same_v<T, WeightScan> || std::is_same_v<T, RouterRows>;

template <class T>
Json value_json(const T& value, bool long_tables) {
  if constexpr (kLongTable<T>) {
    if (!long_tables) return {{"rows", value.tensor.size()}, {"columns", "written with --full"}};
  }
  return json_of(value);
}

template <class T>
Json fact_json(const Fact<T>& fact, bool long_tables) {
  if (!fact.known()) {
    Json object = {{"value", nullptr}, {"origin", name_of(Origin::kUnknown)}};
    put(object, "why", fact.why_unknown());
    put(object, "supply", std::string(fact.info().supply));
    return object;
  }
  Json object = {{"value", value_json(fact.value(), long_tables)}, {"origin", name_of(fact.origin())}, {"source", json_of(fact.source())}};
  for (const auto& s : fact.shadowed()) {
    object["shadowed"].push_back({{"value", json_of(s.value)}, {"origin", name_of(s.origin)}, {"source", json_of(s.source)}});
  }
  return object;
}

Json facts_json(const FactSheet& facts, bool long_tables) {
  Json object = Json::object();
  facts.visit([&](const auto& fact) { object[std::string(fact.info().name)] = fact_json(fact, long_tables); });
  return object;
}

// ---- the report --------------------------------------------------------------------------------------------------------

Json finding_json(std::string_view rule, std::string_view name, const Finding& f) {
  Json evidence = Json::array();
  for (const Evidence& e : f.evidence) evidence.push_back({{"name", e.name}, {"value", e.value}, {"where", json_of(e.where)}});
  Json locations = Json::array();
  for (const Location& l : f.locations) locations.push_back(json_of(l));
  return {{"rule", rule},            {"name", name},        {"severity", name_of(f.severity)},
          {"message", f.message},    {"evidence", evidence}, {"remedy", f.remedy},
          {"does_not_show", f.does_not_show}, {"locations", locations}, {"sources", f.sources}};
}

Json checks_json(const RunResult& run) {
  Json ran = Json::array(), cannot_tell = Json::array(), not_applicable = Json::array();
  for (const RuleResult& rule : run.rules) {
    const Outcome& o = rule.outcome;
    switch (o.kind) {
      case Outcome::Kind::kPass:
      case Outcome::Kind::kFinding: {
        const bool suppressed = o.kind == Outcome::Kind::kFinding && o.findings.empty();
        ran.push_back({{"rule", rule.id}, {"outcome", suppressed ? "suppressed" : name_of(o.kind)}});
        break;
      }
      case Outcome::Kind::kNotApplicable:
        not_applicable.push_back({{"rule", rule.id}, {"reason", o.reason}});
        break;
      case Outcome::Kind::kCannotTell: {
        Json missing = Json::array(), supply = Json::array();
        for (const Missing& m : o.missing) {
          Json entry = {{"fact", m.fact}};
          put(entry, "why", m.why);
          missing.push_back(entry);
          if (!m.supply.empty()) supply.push_back(m.supply);
        }
        cannot_tell.push_back({{"rule", rule.id}, {"missing", missing}, {"supply", supply}});
      }
    }
  }
  return {{"ran", ran}, {"cannot_tell", cannot_tell}, {"not_applicable", not_applicable}};
}

Json inputs_json(const RunResult& run) {
  Json inputs = Json::array();
  for (const InputFile& i : run.inputs) {
    Json entry = {{"path", i.path}, {"kind", i.kind}};
    put(entry, "note", i.note);
    inputs.push_back(entry);
  }
  return inputs;
}

Json problems_json(const RunResult& run) {
  Json problems = Json::array();
  for (const InputProblem& p : run.problems) {
    Json entry = {{"file", p.file}, {"what", p.what}, {"fatal", p.fatal}};
    if (p.line > 0) entry["line"] = p.line;
    if (p.column > 0) entry["column"] = p.column;
    put(entry, "remedy", p.remedy);
    problems.push_back(entry);
  }
  return problems;
}

Json run_json(const RunResult& run, bool long_tables) {
  Json findings = Json::array();
  for (const RuleResult& rule : run.rules) {
    for (const Finding& f : rule.outcome.findings) findings.push_back(finding_json(rule.id, rule.name, f));
  }
  Json suppressed = Json::array();
  for (const Suppressed& s : run.suppressed) {
    Json by = {{"kind", s.baseline_entry < 0 ? "comment" : "baseline"}, {"where", json_of(s.by)}};
    put(by, "reason", s.reason);
    suppressed.push_back({{"finding", finding_json(s.rule, s.name, s.finding)}, {"by", by}});
  }
  Json measures = Json::array();
  for (const MeasureRecord& m : run.measures) {
    measures.push_back({{"name", m.name}, {"backend", m.backend}, {"note", m.note}});
    if (!m.warning.empty()) measures.back()["warning"] = m.warning;
  }
  Json unread = Json::array();
  if (run.facts.unread_keys.known()) unread = json_of(run.facts.unread_keys.value());
  Json facts = facts_json(run.facts, long_tables);
  facts.erase("config.unread_keys");  // has its own place
  return {{"inputs", inputs_json(run)}, {"problems", problems_json(run)}, {"findings", findings}, {"suppressed", suppressed}, {"checks", checks_json(run)},
          {"facts", facts},             {"unread_keys", unread},          {"measures", measures}};
}

Json report(const AuditResult& result, const WriterOptions& options) {
  Json root = {{"schema_version", kSchemaVersion},
               {"tool", {{"name", "moe-audit"}, {"version", result.tool_version}}},
               {"outcome", name_of(result.verdict)},
               {"exit_code", result.exit_code}};
  put(root, "could_not_judge", result.could_not_judge);
  if (!result.baseline.empty()) {
    Json stale = Json::array();
    for (const BaselineEntry& e : result.stale_baseline) {
      stale.push_back({{"rule", e.rule}, {"severity", name_of(e.severity)}, {"where", json_of(e.where)}});
    }
    root["baseline"] = {{"file", result.baseline}, {"stale", stale}};
  }
  if (result.all_checkpoints || result.runs.size() != 1) {
    root["runs"] = Json::array();
    for (const RunResult& run : result.runs) {
      Json entry = {{"name", run.name}};
      entry.update(run_json(run, options.full));
      root["runs"].push_back(entry);
    }
  } else {
    root.update(run_json(result.runs.front(), options.full));
  }
  return root;
}

// Bytes that are not UTF-8 (file names may hold any) are replaced, never thrown on.
void dump(const Json& json, std::ostream& out) { out << json.dump(2, ' ', false, Json::error_handler_t::replace) << "\n"; }

void write(const AuditResult& result, const WriterOptions& options, std::ostream& out) { dump(report(result, options), out); }

}  // namespace

void write_facts_json(const AuditResult& result, const WriterOptions& options, std::ostream& out) {
  Json list = Json::array();
  for (const RunResult& run : result.runs) {
    list.push_back({{"name", run.name}, {"inputs", inputs_json(run)}, {"problems", problems_json(run)}, {"facts", facts_json(run.facts, options.full)}});
  }
  dump({{"schema_version", kSchemaVersion}, {"runs", list}}, out);
}

extern const Writer writer_json;
const Writer writer_json = {"json", write};

}  // namespace moeaudit
