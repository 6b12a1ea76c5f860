// A baseline: today's findings, to be accepted by --baseline tomorrow (audit/inputs/suppressions.cc reads it). Findings
// that a comment in a file suppresses are left to the comment.
#include <algorithm>
#include <ostream>

#include <nlohmann/json.hpp>

#include "reports/writer.h"

namespace moeaudit {
namespace {

using Json = nlohmann::ordered_json;

void add(std::string_view rule, const Finding& f, const std::string& reason, Json* list) {
  Json entry = {{"rule", rule}, {"severity", name_of(f.severity)}};
  const Location where = f.locations.empty() ? Location{} : f.locations.front();
  for (const auto& [key, value] : {std::pair{"file", where.file}, {"key", where.key}, {"tensor", where.tensor}, {"reason", reason}}) {
    if (!value.empty()) entry[key] = value;
  }
  if (std::find(list->begin(), list->end(), entry) == list->end()) list->push_back(std::move(entry));
}

void write(const AuditResult& result, const WriterOptions&, std::ostream& out) {
  Json list = Json::array();
  for (const RunResult& run : result.runs) {
    for (const RuleResult& rule : run.rules) {
      for (const Finding& f : rule.outcome.findings) add(rule.id, f, "", &list);
    }
    for (const Suppressed& s : run.suppressed) {
      if (s.baseline_entry >= 0) add(s.rule, s.finding, s.reason, &list);
    }
  }
  const Json root = {{"baseline_version", 1}, {"tool_version", result.tool_version}, {"findings", list}};
  out << root.dump(1, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace

extern const Writer writer_baseline;
const Writer writer_baseline = {"baseline", write};

}  // namespace moeaudit
