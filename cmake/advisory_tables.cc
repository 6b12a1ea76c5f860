// audit/behaviours/advisories/*.yaml -> the source of kAdvisories and kAdvisoryRules (compile_tables.cc).
// Schema: docs/add_an_advisory.md.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "audit/facts/version.h"
#include "cmake/table_yaml.h"

namespace tables {
namespace {

namespace fs = std::filesystem;

using moeaudit::Version;
using moeaudit::VersionSet;
using moeaudit::VersionWindow;

struct FactLine {
  std::string name, member, type;
};
const std::vector<FactLine>& fact_lines() {
  static const std::vector<FactLine> lines = {
#define FACT(member, type, name, meaning, supply) {name, #member, #type},
#include "audit/facts/fact_list.inc"
#undef FACT
  };
  return lines;
}

const FactLine* find_fact(const std::string& name) {
  for (const FactLine& line : fact_lines()) {
    if (line.name == name) return &line;
  }
  return nullptr;
}

struct Window {
  std::string from, until, seen;
};
struct Affected {
  std::string package;
  std::vector<Window> windows;
};
struct Condition {
  std::string fact, op, text;
  std::vector<std::string> values;
};
struct Setting {
  std::string where, key, value;
};
struct Row {
  std::string package, id, name, since, severity, evidence, summary, text, why, release, advice, paste, does_not_show, cite;
  std::vector<Affected> affected;
  std::vector<Condition> when;
  std::vector<Setting> settings;
  std::vector<std::string> issues;
  std::string file;
  YAML::Mark mark;
};

const Words kSeverities = {{"error", "kError"}, {"warning", "kWarning"}, {"note", "kNote"}};
const Words kEvidence = {{"measured", ""}, {"read", ""}, {"reported", ""}};
const Words kOps = {{"==", "kEqual"},  {"!=", "kNotEqual"}, {"<", "kLess"}, {"<=", "kAtMost"},
                    {">", "kMore"},    {">=", "kAtLeast"},  {"in", "kIn"},  {"contains", "kContains"}};
const Words kPlaces = {{"training", "kTraining"}, {"model_config", "kModelConfig"}, {"lora", "kLora"}};

// ---- windows ---------------------------------------------------------------------------------------------------------

std::string version_text(Map& map, const std::string& key) {
  const std::string text = map.text_or(key, "");
  if (!text.empty() && !Version::parse(text))
    fail(map.file(), map.node(key).Mark(), key + ": '" + text + "' is no version (in quotes: 5.10 is not 5.1)");
  return text;
}

VersionWindow window_of(const Window& w) {
  VersionWindow window;
  if (!w.from.empty()) window.from = Version::parse(w.from);
  if (!w.until.empty()) window.until = Version::parse(w.until);
  return window;
}

std::vector<Window> read_windows(const std::string& file, const YAML::Node& node) {
  std::vector<Window> windows;
  if (node.IsScalar() && node.Scalar() == "all") return windows;
  if (!node.IsSequence() || node.size() == 0) fail(file, node.Mark(), "windows must be a list of {from, until}, or all");
  for (const auto& item : node) {
    Map map(file, item);
    Window w{version_text(map, "from"), version_text(map, "until"), version_text(map, "seen")};
    map.done();
    if (w.until.empty() == w.seen.empty())
      fail(file, map.mark(),
           "a window ends with until (first release without the fault) or with seen (newest release looked at that still "
           "has it), one of the two");
    const std::string& end = w.until.empty() ? w.seen : w.until;
    if (!w.from.empty() && *Version::parse(end) < *Version::parse(w.from))
      fail(file, map.mark(), "the window ends before it begins: " + w.from + " to " + end);
    if (!windows.empty() && (!windows.back().seen.empty() || w.from.empty() ||
                             !(*Version::parse(windows.back().until) < *Version::parse(w.from))))
      fail(file, map.mark(), "windows must be in order and apart");
    windows.push_back(std::move(w));
  }
  return windows;
}

void add_affected(Row* row, const std::string& package, const YAML::Node& node) {
  if (!find_fact("versions." + package))
    fail(row->file, node.Mark(), "'" + package + "' has no fact versions." + package + " in audit/facts/fact_list.inc");
  row->affected.push_back({package, read_windows(row->file, node)});
}

// ---- conditions ------------------------------------------------------------------------------------------------------

bool is_number(const std::string& text) {
  double v = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), v);
  return result.ec == std::errc{} && result.ptr == text.data() + text.size();
}

std::vector<std::string> split_words(const std::string& text) {
  std::vector<std::string> words;
  std::stringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) {
    word.erase(0, word.find_first_not_of(' '));
    word.erase(word.find_last_not_of(' ') + 1);
    if (!word.empty()) words.push_back(word);
  }
  return words;
}

/// What may be compared how: numbers by order, lists by contains, words and truth values by equality.
void check_condition(const Condition& c, const FactLine& fact, const std::string& file, const YAML::Mark& mark) {
  const bool number = fact.type == "std::int64_t" || fact.type == "double";
  const bool list = fact.type == "std::vector<std::string>";
  const std::set<std::string> words = {"bool", "std::string", "DType", "Scoring", "Method", "Precision", "AuxEffect", "Balance"};
  if (!number && !list && !words.count(fact.type))
    fail(file, mark, "'" + c.fact + "' is a " + fact.type + ": conditions compare numbers, words and lists of words");
  const std::set<std::string> ops = number ? std::set<std::string>{"==", "!=", "<", "<=", ">", ">=", "in"}
                                    : list ? std::set<std::string>{"contains"}
                                           : std::set<std::string>{"==", "!=", "in"};
  if (!ops.count(c.op))
    fail(file, mark, "'" + c.op + "' does not apply to " + c.fact + "; write one of: " + joined({ops.begin(), ops.end()}, ", "));
  if (c.values.empty() || (c.values.size() > 1 && c.op != "in"))
    fail(file, mark, "'" + c.text + "': one value, or 'in' with several");
  for (const std::string& v : c.values) {
    if (number && !is_number(v)) fail(file, mark, "'" + v + "' is no number, and " + c.fact + " is one");
    if (fact.type == "bool" && v != "true" && v != "false") fail(file, mark, "'" + v + "' is neither true nor false");
  }
}

Condition read_condition(const std::string& text, const std::string& file, const YAML::Mark& mark) {
  Condition c;
  c.text = text;
  std::stringstream stream(text);
  std::string rest;
  stream >> c.fact >> c.op;
  std::getline(stream, rest);
  c.values = split_words(rest);
  const FactLine* fact = find_fact(c.fact);
  if (!fact) fail(file, mark, "no fact is called '" + c.fact + "' (audit/facts/fact_list.inc)");
  if (!kOps.count(c.op)) {
    std::vector<std::string> known;
    for (const auto& op : kOps) known.push_back(op.first);
    fail(file, mark, "'" + text + "': '" + c.op + "' is no comparison; write one of: " + joined(known, ", "));
  }
  check_condition(c, *fact, file, mark);
  return c;
}

// ---- rows ------------------------------------------------------------------------------------------------------------

void read_settings(Map& map, Row* row) {
  if (!map.has("settings")) return;
  Map places(map.file(), map.node("settings"));
  for (const auto& [place, symbol] : kPlaces) {
    if (!places.has(place)) continue;
    Map keys(map.file(), places.node(place));
    for (const auto& entry : places.node(place)) {
      const std::string key = entry.first.Scalar();
      row->settings.push_back({place, key, keys.text(key)});
    }
  }
  places.done();
}

/// The release that the remedy names must be outside every window of that package.
void check_release(const Row& row, const YAML::Mark& mark) {
  if (row.release.empty()) return;
  const std::size_t at = row.release.find_first_of("=<>~");
  const std::string package = row.release.substr(0, at);
  const auto set = at == std::string::npos ? std::nullopt : VersionSet::parse(row.release.substr(at));
  if (!set) fail(row.file, mark, "release: write a requirement, e.g. transformers>=5.6.0");
  for (const Affected& a : row.affected) {
    if (a.package != package) continue;
    for (const Window& w : a.windows) {
      if (set->intersects(window_of(w)))
        fail(row.file, mark, "release: " + row.release + " still lies in an affected window of " + package);
    }
    return;
  }
  fail(row.file, mark, "release: " + package + " is not among the affected packages");
}

/// Each line four blanks in, as in every remedy.
std::string indented(const std::string& text) {
  std::string out;
  std::stringstream lines(text);
  for (std::string line; std::getline(lines, line);) out += (out.empty() ? "    " : "\n    ") + line;
  return out;
}

bool matches_id(const std::string& id) {
  return id.size() == 5 && id.substr(0, 2) == "AV" && id.find_first_not_of("0123456789", 2) == std::string::npos;
}

Row read_row(Map& map, const Sources& sources, const std::string& package) {
  Row row;
  row.package = package;
  row.file = map.file();
  row.mark = map.mark();
  row.id = map.text("id");
  if (!matches_id(row.id)) fail(row.file, map.node("id").Mark(), "'" + row.id + "': an id is AV and three digits");
  row.name = map.text("name");
  if (row.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") != std::string::npos)
    fail(row.file, map.node("name").Mark(), "'" + row.name + "': a name is kebab-case and states the fault");
  row.since = map.text("since");
  row.severity = map.word("severity", kSeverities);
  map.word("evidence", kEvidence);
  row.evidence = map.text("evidence");
  if (row.evidence == "reported" && row.severity == "kError")
    fail(row.file, map.node("evidence").Mark(), "an error needs evidence: measured, or read in the released sources");
  add_affected(&row, package, map.node("affected"));
  if (map.has("also")) {
    for (const auto& entry : map.node("also")) add_affected(&row, entry.first.Scalar(), entry.second);
  }
  for (const std::string& text : map.list("when", true))
    row.when.push_back(read_condition(text, row.file, map.node("when").Mark()));
  if (row.when.empty()) fail(row.file, map.node("when").Mark(), "when: say by at least one condition whom it bites");
  row.summary = map.text("summary");
  row.text = map.text("text");
  row.why = map.text("why");
  row.release = map.text_or("release", "");
  row.advice = map.text_or("advice", "");
  row.paste = indented(map.text_or("paste", ""));
  read_settings(map, &row);
  if (row.release.empty() && row.settings.empty() && row.paste.empty())
    fail(row.file, map.mark(), "nothing to paste: give release, settings or paste");
  if (!row.paste.empty() && row.advice.empty()) fail(row.file, map.mark(), "advice: say where to paste");
  check_release(row, map.mark());
  row.does_not_show = map.text("does_not_show");
  row.issues = map.list("issues", false);
  row.cite = sources.cite(map);
  map.done();
  return row;
}

// ---- documentation -----------------------------------------------------------------------------------------------------

/// Lines of at most 110 columns.
std::string folded(const std::string& text) {
  std::string out;
  std::size_t used = 0;
  std::stringstream words(text);
  for (std::string word; words >> word;) {
    const bool fits = used == 0 || used + 1 + word.size() <= 110;
    out += used == 0 ? "" : fits ? " " : "\n";
    used = fits && used > 0 ? used + 1 + word.size() : word.size();
    out += word;
  }
  return out;
}

/// A sentence of its own: the texts of a row follow a colon in the report.
std::string sentence(std::string text) {
  if (!text.empty()) text[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(text[0])));
  return text;
}

std::string releases(const Affected& a) {
  std::string text;
  for (const Window& w : a.windows) {
    std::string part = w.from.empty() ? (w.seen.empty() ? "before " : "up to ") : w.from + (w.seen.empty() ? " to before " : " to ");
    part += w.seen.empty() ? w.until : w.seen + " (the newest that was looked at)";
    text += (text.empty() ? "" : ", ") + part;
  }
  return a.package + ": " + (text.empty() ? "every release" : text);
}

std::string doc(const Row& row) {
  std::string text = "\n## What it checks\n" + folded(row.summary) + "\n\nReleases with it:\n";
  for (const Affected& a : row.affected) text += "* " + releases(a) + "\n";
  text += "\nIt bites where all of this holds:\n";
  for (const Condition& c : row.when) text += "* `" + c.text + "`\n";
  text += "\n## Why it matters\n" + folded(sentence(row.text)) + "\n\n" + folded(row.why) + "\n\n" +
          folded("Evidence: " + row.evidence + ". " + row.cite + ".") + "\n";
  if (!row.issues.empty()) text += folded("Reported or changed in: " + joined(row.issues, ", ") + ".") + "\n";
  text += "\n## How to fix\n";
  if (!row.release.empty()) text += "Use a release without it:\n\n    pip install \"" + row.release + "\"\n";
  if (!row.advice.empty()) text += (row.release.empty() ? "" : "\n") + folded(row.release.empty() ? sentence(row.advice) : "Or: " + row.advice) + "\n";
  if (!row.paste.empty()) text += "\n" + row.paste + "\n";
  for (const auto& place : kPlaces) {
    std::string lines;
    for (const Setting& s : row.settings) {
      if (s.where == place.first) lines += "    " + s.key + ": " + s.value + "\n";
    }
    if (!lines.empty()) text += "\nIn the " + (place.first == "model_config" ? "model's config" : place.first + " settings") + ":\n\n" + lines;
  }
  text += "\n## Limits\n" + folded("Does not show: " + row.does_not_show) + "\n" +
          folded("An unknown release or setting gives cannot_tell; releases that nobody looked at are not judged.") + "\n";
  return text;
}

// ---- writing -----------------------------------------------------------------------------------------------------------

std::string info(const std::string& fact) { return "&fact_info::" + find_fact(fact)->member; }

std::string advisory(const Row& row, Writer* w) {
  std::vector<std::string> affected, when, settings, sources = row.issues;
  for (const Affected& a : row.affected) {
    std::vector<std::string> windows;
    for (const Window& v : a.windows)
      windows.push_back("{" + quoted(v.from) + ", " + quoted(v.until) + ", " + quoted(v.seen) + "}");
    affected.push_back("{" + quoted(a.package) + ", " + info("versions." + a.package) + ", " + w->array("AdvisoryWindow", windows) + "}");
  }
  for (const Condition& c : row.when) {
    when.push_back("{" + info(c.fact) + ", Comparison::" + kOps.at(c.op) + ", " + w->strings(c.values) + ", " + quoted(c.text) + "}");
  }
  for (const Setting& s : row.settings)
    settings.push_back("{PasteInto::" + kPlaces.at(s.where) + ", " + quoted(s.key) + ", " + quoted(s.value) + "}");
  sources.push_back(row.cite);
  return "{" + quoted(row.id) + ", " + quoted(row.name) + ", " + quoted(row.package) + ", " + quoted(row.summary) + ", Severity::" +
         row.severity + ", " + quoted(row.evidence) + ", " + w->array("AffectedPackage", affected) + ", " +
         w->array("AdvisoryCondition", when) + ", " + quoted(row.text) + ", " + quoted(row.release) + ", " + quoted(row.advice) +
         ", " + quoted(row.paste) + ", " + w->array("AdvisorySetting", settings) + ", " + quoted(row.does_not_show) + ", " + w->strings(row.issues) + ", " +
         w->strings(sources) + "}";
}

std::string rule(const Row& row, std::size_t i) {
  return "{.id = " + quoted(row.id) + ", .name = " + quoted(row.name) + ", .since = " + quoted(row.since) +
         ", .severity = Severity::" + row.severity + ", .summary = " + quoted(row.summary) + ", .doc = " + quoted(doc(row)) +
         ", .check = check<" + std::to_string(i) + ">}";
}

}  // namespace

std::string advisories_source(const fs::path& dir) {
  std::vector<Row> rows;
  for (const fs::path& path : yaml_files(dir)) {
    Map top(path.string(), load(path));
    const Sources sources(top);
    const std::string package = top.text("package");
    for (const auto& entry : top.node("advisories")) {
      Map map(top.file(), entry);
      rows.push_back(read_row(map, sources, package));
    }
    top.done();
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.id < b.id; });
  std::map<std::string, const Row*> seen;
  for (const Row& row : rows) {
    for (const std::string& word : {row.id, row.name}) {
      const auto [it, added] = seen.emplace(word, &row);
      if (!added)
        fail(row.file, row.mark, "'" + word + "' is used twice, first at " + it->second->file + ":" +
                                     std::to_string(it->second->mark.line + 1) + "; ids are never shared nor reused");
    }
  }
  Writer w;
  std::vector<std::string> advisories, rules;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    advisories.push_back(advisory(rows[i], &w));
    rules.push_back(rule(rows[i], i));
  }
  return "// Generated by cmake/compile_tables.cc from audit/behaviours/advisories. Do not edit.\n#include "
         "\"audit/rules/advisory.h\"\n\nnamespace moeaudit {\nnamespace {\n" +
         w.text() + "template <int I>\nOutcome check(Facts& facts) {\n  return judge(kAdvisories[I], facts);\n}\n}  // namespace\n\n" +
         "constexpr Advisory kAdvisories[] = {\n    " + joined(advisories, ",\n    ") + "};\nconst Rule kAdvisoryRules[] = {\n    " +
         joined(rules, ",\n    ") + "};\nconst int kNumAdvisories = " + std::to_string(rows.size()) + ";\n}  // namespace moeaudit\n";
}

}  // namespace tables
