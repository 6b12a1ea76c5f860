// audit/behaviours/*.yaml -> the source of kBehaviours (compile_tables.cc). Schema: docs/add_a_behaviour.md.
#include <algorithm>
#include <filesystem>
#include <map>
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

// Closed values of topics that code switches on; other topics are free text (defaults, key names).
const std::map<std::string, std::set<std::string>> kClosedTopics = {
    {"aux_flag_effect", {"added", "ignored", "crash", "keyword_only", "no_field"}},
    {"aux_formula", {"hf", "double_softmax", "topk_scores"}},
    {"aux_multiplier", {"1", "GA", "W", "GA*W", "1/GA", "transformers"}},
    {"loss_factor", {"1", "GA", "W", "GA*W", "1/GA"}},
    {"aux_path", {"model", "none", "own"}},
    {"router_is_linear", {"true", "false"}},
    {"experts_fused", {"true", "false"}},
    {"autocast_lowers_router", {"true", "false"}}};
// Issue 2, section 5: these are never taken from reading.
const std::set<std::string> kMeasuredOnly = {"aux_multiplier", "loss_factor", "autocast_lowers_router"};

struct Row {
  std::string package, topic, from, until, value, cite, file;
  std::map<std::string, std::vector<std::string>> when;
  bool measured = false;
  YAML::Mark mark;
};

std::optional<Version> version_of(Map& map, const std::string& key, std::string* text) {
  *text = map.text_or(key, "");
  if (text->empty()) return std::nullopt;
  const std::optional<Version> v = Version::parse(*text);
  if (!v)
    fail(map.file(), map.node(key).Mark(),
         key + ": '" + *text + "' is no version (write 4.46.0; in quotes where YAML would read a number)");
  return v;
}

void read_window(Map& map, Row* row) {
  const auto from = version_of(map, "from", &row->from), until = version_of(map, "until", &row->until);
  if (from && until && !(*from < *until))
    fail(map.file(), map.mark(), "the window [" + row->from + ", " + row->until + ") is empty");
}

void read_row(Map& map, const Sources& sources, Row row, std::vector<Row>* rows) {
  row.topic = map.text("topic");
  read_window(map, &row);
  row.value = map.text("value");
  row.measured = map.flag("measured", false);
  row.cite = sources.cite(map);
  row.mark = map.mark();
  if (map.has("when")) {
    Map when(map.file(), map.node("when"));
    for (const auto& condition : map.node("when"))
      row.when[condition.first.Scalar()] = when.list(condition.first.Scalar(), true);
  }
  if (const auto closed = kClosedTopics.find(row.topic);
      closed != kClosedTopics.end() && !closed->second.count(row.value)) {
    fail(map.file(), map.node("value").Mark(),
         "'" + row.value + "' is no value of topic '" + row.topic +
             "'; write one of: " + joined({closed->second.begin(), closed->second.end()}, ", "));
  }
  if (kMeasuredOnly.count(row.topic) && (!row.measured || row.cite.find("fixtures/oracle/") == std::string::npos)) {
    fail(map.file(), map.mark(),
         "topic '" + row.topic + "' takes measured rows only: measured: true, and cite the row of fixtures/oracle/");
  }
  map.done();
  rows->push_back(std::move(row));
}

/// `known_keys:` one entry a list of a framework: versions it was read from, and each key with its window.
void read_known_keys(Map& top, const Sources& sources, const Row& base, std::vector<Row>* rows) {
  if (!top.has("known_keys")) return;
  for (const auto& entry : top.node("known_keys")) {
    Map list(top.file(), entry);
    Row row = base;
    row.topic = "known_key";
    row.measured = false;
    row.cite = sources.cite(list);
    row.when["list"] = {list.text("list")};
    for (const auto& group : list.node("groups")) {
      Map g(top.file(), group);
      row.mark = g.mark();
      read_window(g, &row);
      if (row.from.empty() || row.until.empty())
        fail(top.file(), g.mark(), "a list of keys is known for a closed window only: give from and until");
      for (const std::string& key : g.list("keys", true)) {
        row.value = key;
        rows->push_back(row);
      }
      g.done();
    }
    list.done();
  }
}

bool windows_overlap(const Row& a, const Row& b) {
  auto before = [](const std::string& until, const std::string& from) {
    return !until.empty() && !from.empty() && !(*Version::parse(from) < *Version::parse(until));
  };
  return !before(a.until, b.from) && !before(b.until, a.from);
}

/// Can one subject meet both rows? Only a key that both name, with no value in common, keeps them apart.
bool conditions_overlap(const Row& a, const Row& b) {
  for (const auto& [key, values] : a.when) {
    const auto other = b.when.find(key);
    if (other == b.when.end()) continue;
    if (std::none_of(values.begin(), values.end(), [&](const std::string& v) {
          return std::find(other->second.begin(), other->second.end(), v) != other->second.end();
        }))
      return false;
  }
  return true;
}

/// No two rows may answer the same question differently; equal answers may overlap, except that a key is listed once.
void check_contradictions(const std::vector<Row>& rows) {
  std::map<std::string, std::vector<const Row*>> groups;
  for (const Row& r : rows)
    groups[r.package + " " + r.topic + (r.topic == "known_key" ? " " + r.value : "")].push_back(&r);
  for (const auto& [name, group] : groups) {
    for (std::size_t i = 0; i < group.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        const Row &a = *group[j], &b = *group[i];
        if (!windows_overlap(a, b) || !conditions_overlap(a, b)) continue;
        if (a.value == b.value && a.topic != "known_key") continue;
        fail(b.file, b.mark,
             name + ": " + (a.value == b.value ? "listed twice" : "'" + b.value + "' contradicts '" + a.value + "'") +
                 " of " + a.file + ":" + std::to_string(a.mark.line + 1) + " (same subject, overlapping versions)");
      }
    }
  }
}

}  // namespace

std::string behaviours_source(const fs::path& dir) {
  std::vector<Row> rows;
  for (const fs::path& path : yaml_files(dir)) {
    Map top(path.string(), load(path));
    const Sources sources(top);
    Row base;
    base.package = top.text("package");
    base.file = path.string();
    if (top.has("rows")) {
      for (const auto& entry : top.node("rows")) {
        Map map(top.file(), entry);
        read_row(map, sources, base, &rows);
      }
    }
    read_known_keys(top, sources, base, &rows);
    top.done();
  }
  check_contradictions(rows);
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::tie(a.package, a.topic) < std::tie(b.package, b.topic);
  });
  Writer w;
  std::vector<std::string> out;
  for (const Row& r : rows) {
    std::vector<std::string> when;
    for (const auto& [key, values] : r.when) when.push_back("{" + quoted(key) + ", " + w.strings(values) + "}");
    out.push_back("{" + quoted(r.package) + ", " + quoted(r.topic) + ", " + w.array("BehaviourCondition", when) + ", " +
                  quoted(r.from) + ", " + quoted(r.until) + ", " + quoted(r.value) + ", " +
                  (r.measured ? "true" : "false") + ", " + quoted(r.cite) + "}");
  }
  return "// Generated by cmake/compile_tables.cc from audit/behaviours. Do not edit.\n#include "
         "\"audit/behaviours/behaviour.h\"\n\n"
         "namespace moeaudit {\nnamespace {\n" +
         w.text() + "}  // namespace\n\nconstexpr BehaviourRow kBehaviours[] = {\n    " +
         (out.empty() ? "{}" : joined(out, ",\n    ")) +
         "};\nconst int kNumBehaviours = " + std::to_string(rows.size()) + ";\n}  // namespace moeaudit\n";
}

}  // namespace tables
