// PEP 440 versions and version sets, as far as lock files and requirements use them.
#include "audit/facts/version.h"

#include <algorithm>
#include <cctype>
#include <initializer_list>

namespace moeaudit {
namespace {

bool digit(char c) { return c >= '0' && c <= '9'; }

/// Reads a number of at most 9 digits; false if there is none or it is longer.
bool read_number(std::string_view& text, int* out) {
  std::size_t n = 0;
  int value = 0;
  while (n < text.size() && digit(text[n])) {
    if (n == 9) return false;
    value = value * 10 + (text[n] - '0');
    ++n;
  }
  if (n == 0) return false;
  text.remove_prefix(n);
  *out = value;
  return true;
}

bool take(std::string_view& text, std::string_view word) {
  if (text.substr(0, word.size()) != word) return false;
  text.remove_prefix(word.size());
  return true;
}

std::string_view trim(std::string_view s) {
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
  return s;
}

/// Release part only: "4.48.1" -> {4, 48, 1}.
bool read_release(std::string_view& text, std::vector<int>* release) {
  for (int number = 0; read_number(text, &number);) {
    if (release->size() == 16) return false;
    release->push_back(number);
    if (text.size() < 2 || text[0] != '.' || !digit(text[1])) break;
    text.remove_prefix(1);
  }
  return !release->empty();
}

/// Takes ".word7", "-word.7", "word" (7 is then 0) in any case; false if that is not what stands there.
bool read_mark(std::string_view& text, std::initializer_list<std::string_view> words, int* number) {
  std::string_view rest = text;
  if (!rest.empty() && std::string_view(".-_").find(rest[0]) != std::string_view::npos) rest.remove_prefix(1);
  for (const std::string_view word : words) {
    const bool same = rest.size() >= word.size() &&
                      std::equal(word.begin(), word.end(), rest.begin(),
                                 [](char a, char b) { return a == std::tolower(static_cast<unsigned char>(b)); });
    if (!same) continue;
    rest.remove_prefix(word.size());
    std::string_view digits = rest;
    if (!digits.empty() && std::string_view(".-_").find(digits[0]) != std::string_view::npos) digits.remove_prefix(1);
    *number = 0;
    if (read_number(digits, number)) rest = digits;
    text = rest;
    return true;
  }
  return false;
}

/// What stands behind the release: (a|b|rc)N, .postN, .devN, each at most once and in this order.
void read_phases(std::string_view& text, Version* v) {
  int number = 0;
  const std::initializer_list<std::string_view> kWords[] = {
      {"alpha", "a"}, {"beta", "b"}, {"preview", "pre", "rc", "c"}};
  for (int phase = 0; phase < 3 && v->phase == 3; ++phase) {
    if (read_mark(text, kWords[phase], &number)) v->phase = phase, v->phase_number = number;
  }
  if (read_mark(text, {"post", "rev", "r"}, &number)) {
    if (v->phase == 3)
      v->phase = 4, v->phase_number = number;
    else
      v->post = number;
  }
  if (read_mark(text, {"dev"}, &number)) {
    if (v->phase == 3)
      v->phase = -1, v->phase_number = number;
    else
      v->dev = number;
  }
}

std::optional<Version> bump(std::vector<int> release, std::size_t keep) {
  if (keep == 0 || keep > release.size()) return std::nullopt;
  release.resize(keep);
  ++release.back();
  Version v;
  v.phase = -1;  // 4.47.dev0: pre-releases of the next series lie outside
  for (int n : release) v.text += (v.text.empty() ? "" : ".") + std::to_string(n);
  v.release = std::move(release);
  return v;
}

bool before(const std::optional<Version>& from, const std::optional<Version>& until) {
  return !from || !until || compare(*from, *until) < 0;
}

void raise(std::optional<Version>* bound, const Version& v) {
  if (!*bound || compare(**bound, v) < 0) *bound = v;
}
void lower(std::optional<Version>* bound, const Version& v) {
  if (!*bound || compare(v, **bound) < 0) *bound = v;
}

/// The least version above v in the order of PEP 440: the development mark of its next post-release.
Version just_above(Version v) {
  if (v.phase == -1) {
    ++v.phase_number;
  } else if (v.dev != Version::kNoDev) {
    ++v.dev;
  } else if (v.phase == 3) {
    v.phase = 4, v.phase_number = 0, v.dev = 0;
  } else if (v.phase == 4) {
    ++v.phase_number, v.dev = 0;
  } else {
    ++v.post, v.dev = 0;
  }
  return v;
}

/// What ">v" begins with: not a post-release of v, so the next release.
Version next_release(const Version& v) {
  if (v.phase != 3) return just_above(v);
  Version next;
  next.release = v.release;
  next.release.resize(std::max<std::size_t>(3, v.release.size()));
  ++next.release.back();
  for (const int n : next.release) next.text.append(next.text.empty() ? "" : ".").append(std::to_string(n));
  return next;
}

/// What "<v" ends with: before the pre-releases of v.
Version before_pre_releases(Version v) {
  if (v.phase == 3) v.phase = -1;
  return v;
}

/// Applies one clause to the set; false if it cannot be understood.
bool apply_clause(std::string_view clause, VersionSet* set) {
  clause = trim(clause);
  std::string_view op;
  for (std::string_view candidate : {"===", "==", ">=", "<=", "~=", "!=", ">", "<"}) {
    if (take(clause, candidate)) {
      op = candidate;
      break;
    }
  }
  clause = trim(clause);
  if (op == "!=") return true;  // a hole in the set: widening it is safe, a fact must then hold for more versions
  const bool wildcard = clause.size() > 2 && clause.substr(clause.size() - 2) == ".*";
  if (wildcard) clause.remove_suffix(2);
  const std::optional<Version> v = Version::parse(clause);
  if (!v || (wildcard && op != "==")) return false;
  if (wildcard) {
    raise(&set->window.from, *v);
    const auto end = bump(v->release, v->release.size());
    if (end) lower(&set->window.until, *end);
    return end.has_value();
  }
  if (op.empty() || op == "==" || op == "===") {
    if (set->exact && !(*set->exact == *v)) return false;
    set->exact = *v;
  } else if (op == ">=") {
    raise(&set->window.from, *v);
  } else if (op == ">") {
    raise(&set->window.from, next_release(*v));
  } else if (op == "<") {
    lower(&set->window.until, before_pre_releases(*v));
  } else if (op == "<=") {
    lower(&set->window.until, just_above(*v));
  } else if (op == "~=") {
    if (v->release.size() < 2) return false;
    raise(&set->window.from, *v);
    lower(&set->window.until, *bump(v->release, v->release.size() - 1));
  }
  return true;
}

}  // namespace

std::optional<Version> Version::parse(std::string_view text) {
  Version v;
  text = trim(text);
  v.text = std::string(text);
  if (!text.empty() && (text[0] == 'v' || text[0] == 'V')) text.remove_prefix(1);
  if (!read_release(text, &v.release)) return std::nullopt;
  read_phases(text, &v);
  if (!text.empty() && text[0] != '+') return std::nullopt;  // what follows + is a local build: +cpu, +cu124
  return v;
}

int compare(const Version& a, const Version& b) {
  const std::size_t n = std::max(a.release.size(), b.release.size());
  for (std::size_t i = 0; i < n; ++i) {
    const int x = i < a.release.size() ? a.release[i] : 0, y = i < b.release.size() ? b.release[i] : 0;
    if (x != y) return x < y ? -1 : 1;
  }
  if (a.phase != b.phase) return a.phase < b.phase ? -1 : 1;
  if (a.phase_number != b.phase_number) return a.phase_number < b.phase_number ? -1 : 1;
  if (a.post != b.post) return a.post < b.post ? -1 : 1;
  if (a.dev != b.dev) return a.dev < b.dev ? -1 : 1;
  return 0;
}

bool VersionWindow::contains(const Version& v) const {
  return (!from || compare(*from, v) <= 0) && (!until || compare(v, *until) < 0);
}

std::optional<VersionSet> VersionSet::parse(std::string_view constraint) {
  VersionSet set;
  constraint = trim(constraint);
  if (constraint.empty() || constraint.size() > 512) return std::nullopt;
  set.text = std::string(constraint);
  bool any = false;
  for (std::size_t begin = 0; begin <= constraint.size();) {
    std::size_t end = constraint.find(',', begin);
    if (end == std::string_view::npos) end = constraint.size();
    const std::string_view clause = trim(constraint.substr(begin, end - begin));
    if (!clause.empty() && !apply_clause(clause, &set)) return std::nullopt;  // a comma at the end is allowed
    any = any || !clause.empty();
    begin = end + 1;
  }
  if (!any) return std::nullopt;
  if (set.exact && !set.window.contains(*set.exact)) return std::nullopt;
  if (!before(set.window.from, set.window.until)) return std::nullopt;
  return set;
}

bool VersionSet::intersects(const VersionWindow& w) const {
  if (exact) return w.contains(*exact);
  return before(window.from, w.until) && before(w.from, window.until);
}

bool VersionSet::inside(const VersionWindow& w) const {
  if (exact) return w.contains(*exact);
  const bool low = !w.from || (window.from && compare(*w.from, *window.from) <= 0);
  const bool high = !w.until || (window.until && compare(*window.until, *w.until) <= 0);
  return low && high;
}

VersionSet released(const VersionSet& versions) {
  if (!versions.exact || versions.exact->phase >= 3) return versions;
  Version release;
  release.release = versions.exact->release;
  release.text = versions.exact->text;
  VersionSet set;
  set.text = versions.text;
  if (versions.exact->phase >= 0) {
    set.exact = std::move(release);
    return set;
  }
  release.phase = 4;  // just above the release itself: the window holds the build and the release
  set.window = {*versions.exact, std::move(release)};
  return set;
}

std::string to_text(const VersionSet& set) { return set.exact ? set.exact->text : set.text; }

}  // namespace moeaudit
