// Annotations of GitHub Actions: workflow commands on stdout. GitHub shows ten of each level a step and drops the rest
// without a word (actions/toolkit pull request 734), so a level with more than ten findings gets one annotation a rule,
// and the last of ten says what is left.
#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include "reports/writer.h"

namespace moeaudit {
namespace {

constexpr std::size_t kShownPerLevel = 10;

std::string escape(std::string_view text, bool property) {
  std::string out;
  for (const char c : text) {
    if (c == '%') out += "%25";
    else if (c == '\r') out += "%0D";
    else if (c == '\n') out += "%0A";
    else if (property && c == ':') out += "%3A";
    else if (property && c == ',') out += "%2C";
    else out += c;
  }
  return out;
}

struct Annotation {
  std::string title, text;
  Location where;
  std::size_t findings = 1;
};

const char* command_of(Severity s) {
  return s == Severity::kError ? "error" : s == Severity::kWarning ? "warning" : "notice";
}

void print(const char* command, const Annotation& a, std::ostream& out) {
  out << "::" << command << " ";
  if (!a.where.file.empty()) out << "file=" << escape(a.where.file, true) << ",";
  if (a.where.line > 0) out << "line=" << a.where.line << ",";
  out << "title=" << escape(a.title, true) << "::" << escape(a.text, false) << "\n";
}

Annotation annotation_of(const RuleResult& rule, const Finding& f) {
  Annotation a;
  a.title = std::string(rule.id) + " " + std::string(rule.name);
  a.text = f.message + (f.remedy.empty() ? "" : "\n" + f.remedy);
  for (const Location& l : f.locations) {  // the first with a line, which a reviewer can see
    if (a.where.file.empty() || (a.where.line == 0 && l.line > 0)) a.where = l;
  }
  return a;
}

/// One annotation a rule: its first finding, and how many more there are.
std::vector<Annotation> by_rule(const std::vector<Annotation>& all) {
  std::vector<Annotation> out;
  for (const Annotation& a : all) {
    if (!out.empty() && out.back().title == a.title) ++out.back().findings;
    else out.push_back(a);
  }
  for (Annotation& a : out) {
    if (a.findings > 1) a.text += "\nand " + std::to_string(a.findings - 1) + " more of this rule";
  }
  return out;
}

void write(const AuditResult& result, const WriterOptions&, std::ostream& out) {
  if (result.verdict == Verdict::kCouldNotJudge) print("error", {"moe-audit could not judge", result.could_not_judge, {}}, out);
  for (const Severity severity : {Severity::kError, Severity::kWarning, Severity::kNote}) {
    std::vector<Annotation> list;
    for (const RunResult& run : result.runs) {
      for (const RuleResult& rule : run.rules) {
        for (const Finding& f : rule.outcome.findings) {
          if (f.severity == severity) list.push_back(annotation_of(rule, f));
        }
      }
    }
    // The verdict above is an error too.
    const std::size_t room = kShownPerLevel - (severity == Severity::kError && result.verdict == Verdict::kCouldNotJudge);
    if (list.size() > room) {
      std::stable_sort(list.begin(), list.end(), [](const Annotation& a, const Annotation& b) { return a.title < b.title; });
      list = by_rule(list);
    }
    const std::size_t shown = list.size() > room ? room - 1 : list.size();
    for (std::size_t i = 0; i < shown; ++i) print(command_of(severity), list[i], out);
    if (shown == list.size()) continue;
    Annotation rest;
    rest.title = "moe-audit: " + std::to_string(list.size() - shown) + " more rules";
    for (std::size_t i = shown; i < list.size(); ++i) {
      rest.text += (i > shown ? "\n" : "") + list[i].title + ": " + std::to_string(list[i].findings);
    }
    print(command_of(severity), rest, out);
  }
}

}  // namespace

extern const Writer writer_github;
const Writer writer_github = {"github", write};

}  // namespace moeaudit
