#include "reports/page.h"

#include <algorithm>
#include <map>
#include <ostream>
#include <sstream>

namespace moeaudit {
namespace {

/// Width in columns: UTF-8 continuation bytes take none.
int columns(std::string_view s) {
  return static_cast<int>(std::count_if(s.begin(), s.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

}  // namespace

void fill(std::ostream& out, std::string_view text, int indent, int width) {
  std::istringstream lines{std::string(text)};
  const std::string margin(static_cast<std::size_t>(indent), ' ');
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line[0] == ' ') {
      out << margin << line << "\n";
      continue;
    }
    std::istringstream words(line);
    int used = 0;
    for (std::string word; words >> word;) {
      if (used > 0 && indent + used + 1 + columns(word) > width) {
        out << "\n";
        used = 0;
      }
      out << (used == 0 ? margin : " ") << word;
      used += columns(word) + (used > 0);
    }
    out << "\n";
  }
}

std::string join(const std::vector<std::string>& items, const char* separator) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : separator) + item;
  return text;
}

void write_keys(const RunResult& run, const Paint& paint, int width, std::ostream& out) {
  if (!run.facts.unread_keys.known() || run.facts.unread_keys.value().empty()) return;
  std::map<std::string, std::vector<std::string>> by_file;
  for (const UnreadKey& k : run.facts.unread_keys.value()) by_file[k.file].push_back(k.key);
  out << "\n" << paint.bold("Keys that moe-audit did not read") << " (its own limits, not a fault of the file)\n";
  for (const auto& [file, keys] : by_file) fill(out, file + ": " + join(keys, ", "), 2, width);
}

void write_problems(const RunResult& run, const Paint& paint, int width, std::ostream& out) {
  for (const InputProblem& p : run.problems) {
    Source where;
    where.file = p.file;
    where.line = p.line;
    std::string text = to_text(where);
    if (p.line > 0 && p.column > 0) text += ":" + std::to_string(p.column);
    out << "\n" << (p.fatal ? paint.of(Severity::kError, "unreadable") : paint.of(Severity::kNote, "input")) << " " << text << "\n";
    fill(out, p.what, 2, width);
    if (!p.remedy.empty()) fill(out, p.remedy, 2, width);
  }
}

}  // namespace moeaudit
