#include "audit/engine/engine.h"

#include <algorithm>
#include <set>

#include "audit/engine/suppress.h"
#include "audit/measures/measure.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

bool matches(std::string_view pattern, const Rule& rule) { return selects(pattern, rule.id, rule.name); }

bool any_matches(const std::vector<std::string>& patterns, const Rule& rule) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& p) { return matches(p, rule); });
}

std::vector<const Rule*> select_rules(const EngineOptions& options) {
  std::vector<const Rule*> selected;
  for (const Rule* rule : all_rules()) {
    const bool in = options.select.empty() || any_matches(options.select, *rule);
    if (in && !any_matches(options.ignore, *rule)) selected.push_back(rule);
  }
  return selected;
}

using Names = std::set<std::string_view>;

bool supplies_any(const Measure& measure, const Names& wanted) {
  return std::any_of(measure.supplies.begin(), measure.supplies.end(), [&](std::string_view n) { return wanted.count(n) > 0; });
}

/// Runs the measures that supply `wanted`, the measures they want first. Each measure runs at most once.
class Measures {
 public:
  explicit Measures(MeasureContext& context) : context_(context) {}

  bool run_for(const Names& wanted) {
    bool ran = false;
    for (int i = 0; i < kNumMeasures; ++i) {
      if (supplies_any(*kMeasures[i], wanted)) ran |= run(*kMeasures[i]);
    }
    return ran;
  }

 private:
  bool run(const Measure& measure) {
    if (!done_.insert(&measure).second) return false;  // also ends a cycle of wants
    run_for(Names(measure.wants.begin(), measure.wants.end()));
    measure.run(context_);
    return true;
  }

  MeasureContext& context_;
  std::set<const Measure*> done_;
};

}  // namespace

bool selects(std::string_view pattern, std::string_view id, std::string_view name) {
  return id.substr(0, pattern.size()) == pattern || name == pattern;
}

bool selects_nothing(std::string_view pattern) {
  const auto rules = all_rules();
  return std::none_of(rules.begin(), rules.end(), [&](const Rule* rule) { return matches(pattern, *rule); });
}

/// Two facts may come from one line.
static Outcome each_place_once(Outcome outcome) {
  for (Finding& f : outcome.findings) {
    std::vector<Location> places;
    for (Location& l : f.locations) {
      const bool there = std::any_of(places.begin(), places.end(), [&](const Location& p) {
        return p.file == l.file && p.line == l.line && p.key == l.key && p.tensor == l.tensor;
      });
      if (!there) places.push_back(std::move(l));
    }
    f.locations = std::move(places);
  }
  return outcome;
}

RunResult audit_run(LoadedRun run, const EngineOptions& options) {
  RunResult result;
  result.name = std::move(run.name);
  result.facts = std::move(run.facts);
  result.inputs = std::move(run.inputs);
  result.problems = std::move(run.problems);

  MeasureContext context{result.facts,    run.model,       run.base,         run.adapter,    run.hidden_states,
                         options.threads, options.replays, options.progress, result.measures, options.full,  run.trace.get(),
                         options.device,  run.rollout.get()};
  Measures measures(context);
  if (options.measure_everything) {
    Names all;
    for (int i = 0; i < kNumMeasures; ++i) all.insert(kMeasures[i]->supplies.begin(), kMeasures[i]->supplies.end());
    measures.run_for(all);
  }

  // A rule is a pure function of facts, so it is simply asked again once the facts it missed have been measured.
  const std::vector<const Rule*> rules = select_rules(options);
  for (bool again = true; again;) {
    result.rules.clear();
    Names wanted;
    for (const Rule* rule : rules) {
      Facts facts(result.facts);
      result.rules.push_back({rule->id, rule->name, each_place_once(rule->check(facts)), rule->severity, rule->summary, rule->doc});
      wanted.insert(facts.asked_unknown().begin(), facts.asked_unknown().end());
    }
    again = measures.run_for(wanted);
  }
  if (!options.comments) run.suppressions.clear();
  suppress(&result, run.suppressions, options.baseline);
  return result;
}

namespace {

struct Tally {
  bool judged = false;       // some rule passed or found something
  bool cannot_tell = false;
  bool finding = false;
  Severity worst = Severity::kNote;
};

Tally count(const RunResult& run) {
  Tally tally;
  for (const RuleResult& rule : run.rules) {
    switch (rule.outcome.kind) {
      case Outcome::Kind::kPass: tally.judged = true; break;
      case Outcome::Kind::kCannotTell: tally.cannot_tell = true; break;
      case Outcome::Kind::kNotApplicable: break;
      case Outcome::Kind::kFinding:
        tally.judged = true;
        tally.finding |= !rule.outcome.findings.empty();
        for (const Finding& f : rule.outcome.findings) tally.worst = std::max(tally.worst, f.severity);
    }
  }
  return tally;
}

bool reaches(Severity worst, FailOn limit) {
  switch (limit) {
    case FailOn::kError: return worst == Severity::kError;
    case FailOn::kWarning: return worst >= Severity::kWarning;
    case FailOn::kNote: return true;
    case FailOn::kNever: return false;
  }
  return false;
}

/// Why a run could not be judged; empty if it could.
std::string obstacle(const RunResult& run, const Tally& tally) {
  for (const InputProblem& problem : run.problems) {
    if (problem.fatal) return problem.file.empty() ? problem.what : problem.file + ": " + problem.what;
  }
  if (run.facts.has_moe.known() && !run.facts.has_moe.value()) {
    return "no Mixture-of-Experts model found in " + run.name + ": " + to_text(run.facts.has_moe.source()) +
           " has no routed experts";
  }
  if (!tally.judged) {
    return tally.cannot_tell ? "no rule had the facts it needs; see what could not be judged" : "no rule applied";
  }
  return {};
}

/// Entries that no finding matched although their rule was judged.
std::vector<BaselineEntry> stale(const Baseline& baseline, const std::vector<RunResult>& runs) {
  std::set<int> used;
  std::set<std::string_view> judged;
  for (const RunResult& run : runs) {
    for (const Suppressed& s : run.suppressed) used.insert(s.baseline_entry);
    for (const RuleResult& rule : run.rules) {
      if (rule.outcome.kind != Outcome::Kind::kCannotTell) judged.insert(rule.id);
    }
  }
  std::vector<BaselineEntry> out;
  for (std::size_t i = 0; i < baseline.entries.size(); ++i) {
    const BaselineEntry& entry = baseline.entries[i];
    if (judged.count(entry.rule) && !used.count(static_cast<int>(i))) out.push_back(entry);
  }
  return out;
}

}  // namespace

AuditResult conclude(std::vector<RunResult> runs, const EngineOptions& options) {
  AuditResult result;
  result.stale_baseline = stale(options.baseline, runs);
  result.baseline = options.baseline.file;
  result.tool_version = MOE_AUDIT_VERSION;
  bool finding = false, over_limit = false, cannot_tell = false;
  for (const RunResult& run : runs) {
    const Tally tally = count(run);
    finding |= tally.finding;
    over_limit |= tally.finding && reaches(tally.worst, options.fail_on);
    cannot_tell |= tally.cannot_tell;
    if (result.could_not_judge.empty()) result.could_not_judge = obstacle(run, tally);
  }
  if (runs.empty()) result.could_not_judge = "nothing to audit";
  const bool judged = result.could_not_judge.empty();
  result.verdict = !judged ? Verdict::kCouldNotJudge : finding ? Verdict::kFindings : Verdict::kPassed;
  result.exit_code = (!judged || (options.strict && cannot_tell)) ? 2 : over_limit ? 1 : 0;
  result.runs = std::move(runs);
  return result;
}

}  // namespace moeaudit
