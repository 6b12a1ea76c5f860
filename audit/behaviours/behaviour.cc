// Questions to the table of behaviours. A version is a set: an answer holds only if all rows that some version of the
// set can meet agree, and the rows leave no version of the set uncovered.
#include "audit/behaviours/behaviour.h"

#include <algorithm>
#include <tuple>

namespace moeaudit {
namespace {

enum class Match { kNo, kMaybe, kYes };  // kMaybe: the row asks for something about the subject that nobody knows

VersionWindow window_of(const BehaviourRow& row) {
  VersionWindow w;
  if (!row.from.empty()) w.from = Version::parse(row.from);
  if (!row.until.empty()) w.until = Version::parse(row.until);
  return w;
}

/// The table is sorted by package, then topic (cmake/compile_tables.cc).
std::span<const BehaviourRow> rows_of(std::string_view package, std::string_view topic) {
  const BehaviourRow* end = kBehaviours + kNumBehaviours;
  const auto key = [](const BehaviourRow& r) { return std::tie(r.package, r.topic); };
  const auto wanted = std::tie(package, topic);
  const BehaviourRow* first =
      std::partition_point(kBehaviours, end, [&](const BehaviourRow& r) { return key(r) < wanted; });
  const BehaviourRow* last =
      std::partition_point(first, end, [&](const BehaviourRow& r) { return !(wanted < key(r)); });
  return {first, last};
}

Match match(const BehaviourRow& row, const BehaviourQuery& query, std::string_view* unknown_key) {
  Match result = Match::kYes;
  for (const BehaviourCondition& condition : row.when) {
    const auto said = std::find_if(query.subject.begin(), query.subject.end(),
                                   [&](const auto& s) { return s.first == condition.key; });
    if (said == query.subject.end()) {
      *unknown_key = condition.key;
      result = Match::kMaybe;
    } else if (std::find(condition.values.begin(), condition.values.end(), said->second) == condition.values.end()) {
      return Match::kNo;
    }
  }
  return result;
}

/// The lower end of the first stretch of the set that no window covers: "" for "before any of them"; nullopt if none.
std::optional<std::string> first_gap(const VersionSet& set, const std::vector<VersionWindow>& windows) {
  if (set.exact) {
    for (const VersionWindow& w : windows) {
      if (w.contains(*set.exact)) return std::nullopt;
    }
    return set.exact->text;
  }
  std::optional<Version> at = set.window.from;
  bool begun = at.has_value();  // false: everything from the first release on
  for (std::size_t step = 0; step <= windows.size(); ++step) {
    const VersionWindow* best = nullptr;
    for (const VersionWindow& w : windows) {
      const bool starts = !w.from || (begun && !(*at < *w.from));
      const bool reaches = !w.until || !begun || *at < *w.until;
      if (!starts || !reaches) continue;
      if (!best || !w.until || (best->until && *best->until < *w.until)) best = &w;
    }
    if (!best) return begun ? at->text : std::string();
    if (!best->until || (set.window.until && !(*best->until < *set.window.until))) return std::nullopt;
    at = best->until;
    begun = true;
  }
  return at->text;
}

std::string window_text(const BehaviourRow& row) {
  if (row.from.empty() && row.until.empty()) return "every version";
  if (row.from.empty()) return "before " + std::string(row.until);
  if (row.until.empty()) return std::string(row.from) + " on";
  return std::string(row.from) + " to before " + std::string(row.until);
}

std::string values_text(std::string_view package, const std::vector<const BehaviourRow*>& rows) {
  std::vector<std::string> parts;
  for (const BehaviourRow* row : rows) {
    std::string part = window_text(*row) + " gives " + std::string(row->value);
    if (std::find(parts.begin(), parts.end(), part) == parts.end()) parts.push_back(std::move(part));
  }
  std::string text = std::string(package) + " ";
  for (std::size_t i = 0; i < parts.size(); ++i) text += (i ? ", " : "") + parts[i];
  return text;
}

std::string gap_text(std::string_view package, std::string_view topic, const std::string& gap) {
  const std::string subject = std::string(package) + (gap.empty() ? "" : " " + gap);
  return "nothing is recorded about " + std::string(topic) + " in " + subject +
         (gap.empty() ? " for all releases it may be" : "");
}

std::vector<VersionWindow> key_list_windows(std::span<const BehaviourRow> rows, std::string_view list) {
  std::vector<VersionWindow> windows;
  std::string_view from = "-", until = "-";
  for (const BehaviourRow& row : rows) {
    if (row.when.empty() || row.when[0].values[0] != list) continue;
    if (row.from == from && row.until == until) continue;  // neighbours mostly share their window
    from = row.from;
    until = row.until;
    windows.push_back(window_of(row));
  }
  return windows;
}

}  // namespace

BehaviourAnswer ask(const BehaviourQuery& query, const VersionSet* versions) {
  const VersionSet set = versions ? released(*versions) : VersionSet{};
  BehaviourAnswer answer;
  std::vector<VersionWindow> certain;
  std::vector<const BehaviourRow*> met;
  std::string_view unknown_key;
  for (const BehaviourRow& row : rows_of(query.package, query.topic)) {
    const VersionWindow window = window_of(row);
    std::string_view key;
    const Match m = match(row, query, &key);
    if (m == Match::kNo || !set.intersects(window)) continue;
    met.push_back(&row);
    if (m == Match::kMaybe)
      unknown_key = key;
    else
      certain.push_back(window), answer.rows.push_back(&row);
  }
  const bool agree =
      std::all_of(met.begin(), met.end(), [&](const BehaviourRow* r) { return r->value == met[0]->value; });
  if (!agree) {
    answer.rows.clear();
    answer.why = "depends on " +
                 (unknown_key.empty() ? "the version" : std::string(unknown_key) + ", which is not known") + ": " +
                 values_text(query.package, met);
    return answer;
  }
  if (const auto gap = first_gap(set, certain)) {
    answer.rows.clear();
    answer.why = unknown_key.empty() ? gap_text(query.package, query.topic, *gap)
                                     : "depends on " + std::string(unknown_key) + ", which is not known";
    return answer;
  }
  answer.value = std::string(met[0]->value);
  answer.measured =
      std::all_of(answer.rows.begin(), answer.rows.end(), [](const BehaviourRow* r) { return r->measured; });
  std::vector<std::string_view> cites;
  for (const BehaviourRow* row : answer.rows) {
    if (std::find(cites.begin(), cites.end(), row->cite) != cites.end()) continue;
    cites.push_back(row->cite);
    answer.cite += (answer.cite.empty() ? "" : "; ") + std::string(row->cite);
  }
  return answer;
}

bool has_key_list(std::string_view package, std::string_view list, const VersionSet* versions) {
  const auto windows = key_list_windows(rows_of(package, "known_key"), list);
  return !windows.empty() && !first_gap(versions ? released(*versions) : VersionSet{}, windows);
}

bool key_unknown(std::string_view package, std::string_view list, std::string_view key, const VersionSet* versions) {
  if (!has_key_list(package, list, versions)) return false;
  const VersionSet set = versions ? released(*versions) : VersionSet{};
  for (const BehaviourRow& row : rows_of(package, "known_key")) {
    if (row.value == key && row.when[0].values[0] == list && set.intersects(window_of(row))) return false;
  }
  return true;
}

}  // namespace moeaudit
