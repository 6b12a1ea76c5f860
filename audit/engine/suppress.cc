#include "audit/engine/suppress.h"

#include <algorithm>
#include <filesystem>

#include "audit/engine/engine.h"

namespace moeaudit {
namespace {

bool speaks_of(const Suppression& s, const RuleResult& rule) {
  return std::any_of(s.rules.begin(), s.rules.end(),
                     [&](const std::string& pattern) { return selects(pattern, rule.id, rule.name); });
}

bool touches(const Suppression& s, const Finding& finding) {
  return std::any_of(finding.locations.begin(), finding.locations.end(), [&](const Location& l) {
    return l.file == s.file && (s.line == 0 || s.line == l.line);
  });
}

bool same_place(const Location& a, const Location& b) {
  return plain_path(a.file) == plain_path(b.file) && a.key == b.key && a.tensor == b.tensor;
}

class Suppressor {
 public:
  Suppressor(RunResult* run, std::span<const Suppression> comments, const Baseline& baseline)
      : run_(run), comments_(comments), baseline_(baseline), comment_used_(comments.size(), 0) {}

  void apply() {
    for (RuleResult& rule : run_->rules) {
      std::vector<Finding> left;
      for (Finding& finding : rule.outcome.findings) {
        if (!by_comment(rule, finding) && !by_baseline(rule, finding)) left.push_back(std::move(finding));
      }
      rule.outcome.findings = std::move(left);
    }
    for (std::size_t i = 0; i < comments_.size(); ++i) report_useless(comments_[i], comment_used_[i]);
  }

 private:
  bool by_comment(const RuleResult& rule, Finding& finding) {
    for (std::size_t i = 0; i < comments_.size(); ++i) {
      const Suppression& s = comments_[i];
      if (!speaks_of(s, rule) || !touches(s, finding)) continue;
      comment_used_[i] = 1;
      run_->suppressed.push_back({rule.id, rule.name, std::move(finding), {s.file, s.comment_line, "", ""}, -1, s.reason});
      return true;
    }
    return false;
  }

  bool by_baseline(const RuleResult& rule, Finding& finding) {
    const Location where = finding.locations.empty() ? Location{} : finding.locations.front();
    for (std::size_t i = 0; i < baseline_.entries.size(); ++i) {
      const BaselineEntry& entry = baseline_.entries[i];
      if (entry.rule != rule.id || finding.severity > entry.severity || !same_place(entry.where, where)) continue;
      run_->suppressed.push_back({rule.id, rule.name, std::move(finding), {baseline_.file, 0, "", ""},
                                   static_cast<int>(i), entry.reason});
      return true;
    }
    return false;
  }

  void report_useless(const Suppression& s, bool used) {
    const auto problem = [&](std::string what, std::string remedy) {
      run_->problems.push_back({s.file, s.comment_line, 0, std::move(what), std::move(remedy), false});
    };
    std::vector<std::string> unknown;
    for (const std::string& pattern : s.rules) {
      if (selects_nothing(pattern)) unknown.push_back(pattern);
    }
    for (const std::string& pattern : unknown) {
      problem("ignore[" + pattern + "]: no rule is called so, or begins with it", "moe-audit rules lists them");
    }
    if (used || unknown.size() == s.rules.size()) return;
    bool judged = false;
    for (const RuleResult& rule : run_->rules) {
      if (!speaks_of(s, rule)) continue;
      if (rule.outcome.kind == Outcome::Kind::kCannotTell) return;  // it may speak yet
      judged = true;
    }
    if (!judged) return;  // not selected
    std::string rules;
    for (const std::string& pattern : s.rules) rules += (rules.empty() ? "" : ", ") + pattern;
    problem("ignore[" + rules + "] suppresses nothing: there is no such finding here", "delete the comment");
  }

  RunResult* run_;
  std::span<const Suppression> comments_;
  const Baseline& baseline_;
  std::vector<char> comment_used_;
};

}  // namespace

std::string plain_path(std::string_view path) {
  return path.empty() ? std::string() : std::filesystem::path(path).lexically_normal().generic_string();
}

void suppress(RunResult* run, std::span<const Suppression> comments, const Baseline& baseline) {
  Suppressor(run, comments, baseline).apply();
}

}  // namespace moeaudit
