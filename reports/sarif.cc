// SARIF 2.1.0 (OASIS), in the subset that GitHub code scanning shows: docs.github.com, "SARIF support for code scanning".
// Suppressed findings are left out: GitHub makes an alert of every result, whatever its `suppressions` say.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <ostream>
#include <string>

#include <nlohmann/json.hpp>

#include "reports/page.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

using Json = nlohmann::ordered_json;

/// A path as a URI reference: relative paths stay relative (GitHub resolves them against the repository).
std::string uri_of(const std::string& path) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  std::string uri = path.starts_with("/") ? "file://" : "";
  for (std::string_view rest = path.starts_with("./") ? std::string_view(path).substr(2) : path; const char c : rest) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::string_view("-._~/").find(c) != std::string_view::npos;
    if (plain) {
      uri += c;
      continue;
    }
    const unsigned char byte = static_cast<unsigned char>(c);
    uri += '%';
    uri += kHex[byte >> 4];
    uri += kHex[byte & 15];
  }
  return uri;
}

/// GitHub wants a line with every result; files that have none (weights, training_args.bin) get their first.
Json location_json(const Location& l) {
  Json location = {{"physicalLocation",
                    {{"artifactLocation", {{"uri", uri_of(l.file)}}}, {"region", {{"startLine", l.line > 0 ? l.line : 1}}}}}};
  const auto logical = [&](const std::string& name, const char* kind) {
    if (!name.empty()) location["logicalLocations"].push_back({{"fullyQualifiedName", name}, {"kind", kind}});
  };
  logical(l.key, "member");
  logical(l.tensor, "resource");
  return location;
}

/// 64-bit FNV-1a of what makes two findings the same one: not the line, which moves when the file is edited, nor the
/// values. GitHub matches alerts by "primaryLocationLineHash" alone, which upload-sarif would otherwise compute from
/// the source line, and cannot for a binary file.
class Fingerprints {
 public:
  std::string of(std::string_view rule, const Location& where) {
    std::uint64_t hash = 14695981039346656037u;
    for (const std::string_view part : {rule, std::string_view(where.file), std::string_view(where.key), std::string_view(where.tensor)}) {
      for (const char c : part) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
      hash = (hash ^ 0xff) * 1099511628211u;  // a byte that no UTF-8 text holds, between the parts
    }
    char text[32];
    std::snprintf(text, sizeof text, "%016llx:%d", static_cast<unsigned long long>(hash), ++seen_[hash]);
    return text;
  }

 private:
  std::map<std::uint64_t, int> seen_;
};

class Report {
 public:
  explicit Report(const AuditResult& result) : result_(result) {
    for (const RunResult& run : result.runs) {
      for (const RuleResult& rule : run.rules) add_rule(rule);
    }
    for (const RunResult& run : result.runs) {
      for (const InputProblem& p : run.problems) add_problem(p);
      for (const RuleResult& rule : run.rules) {
        for (const Finding& f : rule.outcome.findings) add_finding(run, rule, f);
        if (rule.outcome.kind == Outcome::Kind::kCannotTell) add_undecided(rule);
      }
    }
  }

  Json json() {
    Json driver = {{"name", "moe-audit"}, {"version", result_.tool_version}, {"rules", rules_}};
    Json invocation = {{"executionSuccessful", result_.verdict != Verdict::kCouldNotJudge},
                       {"exitCode", result_.exit_code},
                       {"toolExecutionNotifications", notifications_}};
    if (!result_.could_not_judge.empty()) invocation["exitCodeDescription"] = result_.could_not_judge;
    Json run = {{"tool", {{"driver", driver}}}, {"invocations", {invocation}}, {"results", results_}};
    return {{"$schema", "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"},
            {"version", "2.1.0"},
            {"runs", Json::array({run})}};
  }

 private:
  void add_rule(const RuleResult& rule) {
    if (!index_.emplace(rule.id, rules_.size()).second) return;
    std::string doc(rule.doc);
    rules_.push_back({{"id", rule.id},
                      {"name", rule.name},
                      {"shortDescription", {{"text", rule.summary}}},
                      {"fullDescription", {{"text", rule.summary}}},
                      {"help", {{"text", doc}, {"markdown", doc}}},
                      {"defaultConfiguration", {{"level", name_of(rule.severity)}}},
                      {"properties", {{"tags", {"mixture-of-experts", "training"}}, {"precision", "high"}}}});
  }

  void add_finding(const RunResult& run, const RuleResult& rule, const Finding& f) {
    std::vector<Location> places = f.locations;
    if (places.empty()) places.push_back({run.inputs.empty() ? run.name : run.inputs.front().path, 0, "", ""});
    // A line that a reviewer can see comes first; a checkpoint has none.
    const auto first = std::find_if(places.begin(), places.end(), [](const Location& l) { return l.line > 0; });
    if (first != places.end()) std::rotate(places.begin(), first, first + 1);
    std::string text = f.message;
    if (!f.remedy.empty()) text += "\n\nChange:\n" + f.remedy;
    if (!f.does_not_show.empty()) text += "\n\nDoes not show: " + f.does_not_show;
    Json evidence = Json::object();
    for (const Evidence& e : f.evidence) evidence[e.name] = e.value;
    Json entry = {{"ruleId", rule.id},
                  {"ruleIndex", index_.at(rule.id)},
                  {"level", name_of(f.severity)},
                  {"message", {{"text", text}}},
                  {"locations", Json::array({location_json(places.front())})},
                  {"partialFingerprints", {{"primaryLocationLineHash", fingerprints_.of(rule.id, places.front())}}},
                  {"properties", {{"evidence", evidence}, {"sources", f.sources}}}};
    for (std::size_t i = 1; i < places.size(); ++i) {
      Json related = location_json(places[i]);
      related["id"] = i;
      related["message"] = {{"text", places[i].key.empty() ? places[i].tensor : places[i].key}};
      entry["relatedLocations"].push_back(related);
    }
    results_.push_back(entry);
  }

  void add_problem(const InputProblem& p) {
    Json note = {{"level", p.fatal ? "error" : "note"}, {"message", {{"text", p.what + (p.remedy.empty() ? "" : "; " + p.remedy)}}}};
    if (!p.file.empty()) note["locations"].push_back(location_json({p.file, p.line, "", ""}));
    notifications_.push_back(note);
  }

  void add_undecided(const RuleResult& rule) {
    std::vector<std::string> missing;
    for (const Missing& m : rule.outcome.missing) missing.push_back(m.fact + (m.supply.empty() ? "" : " (give " + m.supply + ")"));
    notifications_.push_back({{"level", "note"},
                              {"message", {{"text", std::string(rule.id) + " cannot tell: unknown " + join(missing, ", ")}}},
                              {"associatedRule", {{"id", rule.id}, {"index", index_.at(rule.id)}}}});
  }

  const AuditResult& result_;
  Json rules_ = Json::array(), results_ = Json::array(), notifications_ = Json::array();
  std::map<std::string_view, std::size_t> index_;
  Fingerprints fingerprints_;
};

void write(const AuditResult& result, const WriterOptions&, std::ostream& out) {
  out << Report(result).json().dump(1, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace

extern const Writer writer_sarif;
const Writer writer_sarif = {"sarif", write};

}  // namespace moeaudit
