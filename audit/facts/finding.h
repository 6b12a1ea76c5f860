// What a rule says, and the result of a whole audit. Types only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/fact_sheet.h"
#include "audit/facts/origin.h"

namespace moeaudit {

/// Severity is evidence (docs/architecture.md): error = what runs differs from what is configured or cannot work, and a
/// competent user would stop the run; warning = a documented risk with its measured size; note = advice.
enum class Severity { kNote, kWarning, kError };
const char* name_of(Severity severity);

struct Location {
  std::string file;
  int line = 0;
  std::string key;
  std::string tensor;
};
inline Location location_of(const Source& s) { return {s.file, s.line, s.key, s.tensor}; }

/// One number or word that proves the finding: {"router.top_k", "9", place}.
struct Evidence {
  std::string name;
  std::string value;
  Location where;
};

struct Finding {
  Severity severity = Severity::kError;
  std::string message;                // one or two sentences with the values in them
  std::vector<Evidence> evidence;
  std::string remedy;                 // what to change; contains a line that can be pasted and makes the finding go away
  std::string does_not_show;          // what this finding does not prove
  std::vector<Location> locations;    // first: where to change something
  std::vector<std::string> sources;   // paper equation, framework file at a commit, issue, fixtures/oracle row
};

struct Missing {
  std::string fact;    // "versions.transformers"
  std::string supply;  // "--assume transformers=VERSION"
  std::string why;     // "depends on the version: ..."; may be empty
};

/// The four outcomes of a rule. A skipped check is never a passed check.
struct Outcome {
  enum class Kind { kPass, kFinding, kCannotTell, kNotApplicable };
  Kind kind = Kind::kPass;
  std::vector<Finding> findings;  // kFinding
  std::vector<Missing> missing;   // kCannotTell
  std::string reason;             // kNotApplicable: what proves that the rule has no subject; kPass: may say what was compared

  static Outcome pass(std::string what = {}) { return {Kind::kPass, {}, {}, std::move(what)}; }
  static Outcome finding(Finding f) {
    Outcome o;
    o.kind = Kind::kFinding;
    o.findings.push_back(std::move(f));
    return o;
  }
  static Outcome findings_or_pass(std::vector<Finding> f, std::string what = {}) {
    if (f.empty()) return pass(std::move(what));
    return {Kind::kFinding, std::move(f), {}, {}};
  }
  static Outcome not_applicable(std::string why) { return {Kind::kNotApplicable, {}, {}, std::move(why)}; }
};
const char* name_of(Outcome::Kind kind);

/// The fact sheet as a rule sees it: reading through require() and want() records what was asked, so that the engine
/// can run the measures that supply it and can say what was missing.
class Facts {
 public:
  explicit Facts(const FactSheet& sheet) : sheet_(&sheet) {}
  const FactSheet* operator->() const { return sheet_; }

  /// The value, or nullptr; what is unknown is recorded as missing and makes cannot_tell() name it.
  template <class T>
  const T* require(const Fact<T>& fact) {
    ask(fact);
    if (!fact.known()) missing_.push_back({std::string(fact.info().name), std::string(fact.info().supply), fact.why_unknown()});
    return fact.get();
  }
  /// The value, or nullptr, for evidence that sharpens a verdict but does not decide whether there is one.
  template <class T>
  const T* want(const Fact<T>& fact) {
    ask(fact);
    return fact.get();
  }
  bool missing() const { return !missing_.empty(); }
  Outcome cannot_tell() const {
    Outcome o;
    o.kind = Outcome::Kind::kCannotTell;
    o.missing = missing_;
    return o;
  }
  const std::vector<std::string_view>& asked_unknown() const { return asked_unknown_; }

 private:
  template <class T>
  void ask(const Fact<T>& fact) {
    if (!fact.known()) asked_unknown_.push_back(fact.info().name);
  }
  const FactSheet* sheet_;
  std::vector<Missing> missing_;
  std::vector<std::string_view> asked_unknown_;
};

/// What one rule said of one run. A rule whose findings are all suppressed keeps kFinding, with an empty list.
struct RuleResult {
  std::string_view id;
  std::string_view name;
  Outcome outcome;
  Severity severity = Severity::kError;  // of the rule: its default
  std::string_view summary = {}, doc = {};
};

/// "# moe-audit: ignore[BL001, PR] reason" in a file of the user.
struct Suppression {
  std::string file;
  int line = 0;                    // the line it speaks of; 0: the whole file
  int comment_line = 0;            // where it is written
  std::vector<std::string> rules;  // ids, id prefixes or names
  std::string reason;
};

/// A finding that was accepted earlier. Lines are no part of it: they move when the file is edited.
struct BaselineEntry {
  std::string rule;
  Severity severity = Severity::kError;  // a finding that has become worse than this counts again
  Location where;                        // file, key and tensor of the finding's first location
  std::string reason;                    // may be empty
};
struct Baseline {
  std::string file;
  std::vector<BaselineEntry> entries;
};

/// A finding that does not count, and who said so.
struct Suppressed {
  std::string_view rule, name;
  Finding finding;
  Location by;             // the comment, or the baseline file
  int baseline_entry = -1;  // position in Baseline::entries; -1: a comment
  std::string reason;      // may be empty for a baseline
};

/// One file or folder that was given or found, and what it was taken for.
struct InputFile {
  std::string path;
  std::string kind;   // "model", "adapter", "axolotl config", "training_args.bin", ...
  std::string note;   // "latest of 3 checkpoints", empty otherwise
};

/// An input that could not be read, or was not understood. `fatal`: exit code 2.
struct InputProblem {
  std::string file;
  int line = 0;
  int column = 0;
  std::string what;
  std::string remedy;
  bool fatal = true;
};

/// One measure that was run, or why it was not.
struct MeasureRecord {
  std::string name;
  std::string backend;  // "host avx2", "host float64", "cuda NVIDIA H100"
  std::string note;     // "4,096 tokens probe", "skipped: --static"
  std::string warning = {};  // a device that failed, and what was done instead
};

/// The audit of one run (one checkpoint).
struct RunResult {
  std::string name;  // path of the checkpoint or run as given
  FactSheet facts;
  std::vector<InputFile> inputs;
  std::vector<InputProblem> problems;
  std::vector<MeasureRecord> measures;
  std::vector<RuleResult> rules;  // ordered by id; only the selected rules
  std::vector<Suppressed> suppressed;
};

enum class Verdict { kPassed, kFindings, kCouldNotJudge };
const char* name_of(Verdict v);  // "passed" | "findings" | "could_not_judge"

/// The whole invocation. `exit_code` follows docs/architecture.md (0, 1, 2; 3 is main's).
struct AuditResult {
  std::string tool_version;
  std::vector<RunResult> runs;
  bool all_checkpoints = false;  // --all: reports list the runs, even if there is one
  Verdict verdict = Verdict::kPassed;
  int exit_code = 0;
  std::string could_not_judge;  // why, when verdict is kCouldNotJudge
  std::string baseline;         // file; empty: none was given
  std::vector<BaselineEntry> stale_baseline;  // entries that no finding of these rules matches any more
};

}  // namespace moeaudit
