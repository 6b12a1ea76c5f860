// What the text writers share: colour, filled paragraphs, lists of problems and keys.
#pragma once

#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit {

/// Colours, or nothing.
class Paint {
 public:
  explicit Paint(bool on) : on_(on) {}
  std::string bold(const std::string& s) const { return wrap("1", s); }
  std::string dim(const std::string& s) const { return wrap("2", s); }
  std::string green(const std::string& s) const { return wrap("1;32", s); }
  std::string of(Severity severity, const std::string& s) const {
    return wrap(severity == Severity::kError ? "1;31" : severity == Severity::kWarning ? "1;33" : "1;36", s);
  }

 private:
  std::string wrap(const char* code, const std::string& s) const {
    return on_ ? "\033[" + std::string(code) + "m" + s + "\033[0m" : s;
  }
  bool on_;
};

/// Fills paragraphs to `width`; lines that begin with a space are kept as they are (code to paste).
void fill(std::ostream& out, std::string_view text, int indent, int width);

std::string join(const std::vector<std::string>& items, const char* separator);

/// AV001 and on: a row of a table, about a fault of some releases (audit/rules/advisory.h). There are many, so a report for
/// people sums up those that have nothing to say.
inline bool is_advisory(std::string_view id) { return id.starts_with("AV"); }

void write_problems(const RunResult& run, const Paint& paint, int width, std::ostream& out);
void write_keys(const RunResult& run, const Paint& paint, int width, std::ostream& out);

}  // namespace moeaudit
