// Comments in the user's files that accept a finding, and the baseline file that accepts the findings of a day.
#include <algorithm>
#include <cctype>

#include "audit/inputs/inputs.h"
#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

constexpr std::string_view kMarker = "moe-audit:";
constexpr std::string_view kForm = "# moe-audit: ignore[BL001] why this is meant (or ignore-file[...])";
constexpr int kBaselineVersion = 1;

bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r'; }

std::string_view trim(std::string_view text) {
  while (!text.empty() && is_blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_blank(text.back())) text.remove_suffix(1);
  return text;
}

bool take(std::string_view* text, std::string_view word) {
  if (!text->starts_with(word)) return false;
  text->remove_prefix(word.size());
  return true;
}

/// Position of the "#" of a comment that begins with the marker: at the start of the line or behind a blank, as YAML
/// and pip have it. npos: none.
std::size_t find_comment(std::string_view line) {
  for (std::size_t at = line.find('#'); at != std::string_view::npos; at = line.find('#', at + 1)) {
    if (at > 0 && !is_blank(line[at - 1])) continue;
    if (trim(line.substr(at + 1)).starts_with(kMarker)) return at;
  }
  return std::string_view::npos;
}

/// What stands behind the marker. Returns what is wrong with it, or "".
std::string parse(std::string_view text, Suppression* out, bool* whole_file) {
  text = trim(text);
  *whole_file = take(&text, "ignore-file");
  if (!*whole_file && !take(&text, "ignore")) return "is no comment that moe-audit knows";
  const std::size_t close = text.find(']');
  if (!take(&text, "[") || close == std::string_view::npos) return "names no rule in [ ]";
  std::string_view list = text.substr(0, close - 1);
  text = trim(text.substr(close));
  while (!list.empty()) {
    const std::size_t comma = std::min(list.find(','), list.size());
    const std::string_view rule = trim(list.substr(0, comma));
    if (!rule.empty()) out->rules.emplace_back(rule);
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  if (out->rules.empty()) return "names no rule in [ ]";
  while (!text.empty() && (text.front() == ':' || text.front() == '-' || is_blank(text.front()))) text.remove_prefix(1);
  out->reason = std::string(text);
  return text.empty() ? "gives no reason" : "";
}

}  // namespace

void read_suppressions(const std::string& path, std::string_view text, Material* material) {
  std::vector<Suppression> waiting;  // on lines of their own: they speak of the next line that is no comment
  int number = 0;
  for (std::size_t from = 0; from < text.size();) {
    const std::size_t end = std::min(text.find('\n', from), text.size());
    const std::string_view line = text.substr(from, end - from);
    from = end + 1;
    ++number;
    const std::string_view content = trim(line);
    if (!content.empty() && content.front() != '#') {
      for (Suppression& s : waiting) {
        s.line = number;
        material->suppressions.push_back(std::move(s));
      }
      waiting.clear();
    }
    const std::size_t at = find_comment(line);
    if (at == std::string_view::npos) continue;
    Suppression s;
    s.file = path;
    s.comment_line = number;
    bool whole_file = false;
    const std::string_view comment = trim(line.substr(at + 1));
    const std::string wrong = parse(comment.substr(kMarker.size()), &s, &whole_file);
    if (!wrong.empty()) {
      material->problems.push_back({path, number, static_cast<int>(at) + 1,
                                    "the comment \"# " + std::string(comment) + "\" " + wrong + ": it suppresses nothing",
                                    "write " + std::string(kForm), false});
      continue;
    }
    const bool own_line = trim(line.substr(0, at)).empty();
    s.line = whole_file ? 0 : number;
    if (whole_file || !own_line) material->suppressions.push_back(std::move(s));
    else waiting.push_back(std::move(s));
  }
}

bool read_baseline(const std::string& path, Baseline* baseline, InputProblem* problem) {
  const std::string remedy = "write it with: moe-audit check PATH --format baseline=" + path;
  const auto fail = [&](int line, int column, std::string what) {
    *problem = {path, line, column, std::move(what), remedy, true};
    return false;
  };
  std::string text, why;
  if (!read_file(path, &text, &why)) return fail(0, 0, why);
  Node root;
  TextError error;
  if (!parse_json(text, &root, nullptr, &error)) return fail(error.line, error.column, "JSON error: " + error.what);
  const Node* version = root.is_map() ? root.find("baseline_version") : nullptr;
  const Node* list = root.is_map() ? root.find("findings") : nullptr;
  if (!version || !list || !list->is_list()) return fail(root.line, root.column, "is no baseline of moe-audit");
  if (version->as_int() != kBaselineVersion) {
    return fail(version->line, version->column,
                "has baseline_version " + version->text + "; this release reads " + std::to_string(kBaselineVersion));
  }
  baseline->file = path;
  for (const Node& item : list->items) {
    const auto word = [&](std::string_view key) {
      const Node* n = item.is_map() ? item.find(key) : nullptr;
      return n && n->is_string() ? n->text : std::string();
    };
    BaselineEntry entry;
    entry.rule = word("rule");
    entry.reason = word("reason");
    entry.where = {word("file"), 0, word("key"), word("tensor")};
    const std::string severity = word("severity");
    bool known = false;
    for (const Severity s : {Severity::kNote, Severity::kWarning, Severity::kError}) {
      if (severity != name_of(s)) continue;
      entry.severity = s;
      known = true;
    }
    if (entry.rule.empty() || !known) {
      return fail(item.line, item.column, "an entry needs \"rule\" and \"severity\" (error, warning or note)");
    }
    baseline->entries.push_back(std::move(entry));
  }
  return true;
}

}  // namespace moeaudit
