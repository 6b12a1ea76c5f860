#include "audit/facts/finding.h"

namespace moeaudit {

const char* name_of(Severity severity) {
  switch (severity) {
    case Severity::kNote: return "note";
    case Severity::kWarning: return "warning";
    case Severity::kError: return "error";
  }
  return "?";
}

const char* name_of(Outcome::Kind kind) {
  switch (kind) {
    case Outcome::Kind::kPass: return "pass";
    case Outcome::Kind::kFinding: return "finding";
    case Outcome::Kind::kCannotTell: return "cannot_tell";
    case Outcome::Kind::kNotApplicable: return "not_applicable";
  }
  return "?";
}

const char* name_of(Verdict v) {
  switch (v) {
    case Verdict::kPassed: return "passed";
    case Verdict::kFindings: return "findings";
    case Verdict::kCouldNotJudge: return "could_not_judge";
  }
  return "?";
}

}  // namespace moeaudit
