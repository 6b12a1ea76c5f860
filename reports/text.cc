// The report for people: verdict first, findings by rule, then what was checked and what could not be judged.
#include <algorithm>
#include <cstdio>
#include <map>
#include <ostream>

#include "reports/page.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

std::string place(const Location& l) {
  Source s;
  s.file = l.file;
  s.line = l.line;
  s.key = l.key;
  s.tensor = l.tensor;
  return to_text(s);
}

struct Counts {
  int errors = 0, warnings = 0, notes = 0, suppressed = 0;
};

Counts count(const std::vector<RunResult>& runs) {
  Counts c;
  for (const RunResult& run : runs) {
    c.suppressed += static_cast<int>(run.suppressed.size());
    for (const RuleResult& rule : run.rules) {
      for (const Finding& f : rule.outcome.findings) {
        (f.severity == Severity::kError ? c.errors : f.severity == Severity::kWarning ? c.warnings : c.notes)++;
      }
    }
  }
  return c;
}

std::string plural(int n, const char* one, const char* many) { return std::to_string(n) + " " + (n == 1 ? one : many); }
std::string plural(int n, const std::string& what) { return plural(n, what.c_str(), (what + (what.ends_with("s") ? "es" : "s")).c_str()); }

void write_verdict(const AuditResult& result, const Paint& paint, std::ostream& out) {
  const Counts c = count(result.runs);
  std::string counts = plural(c.errors, "error") + ", " + plural(c.warnings, "warning") + ", " + plural(c.notes, "note");
  switch (result.verdict) {
    case Verdict::kPassed: out << paint.green("PASSED") << "  no findings" << (c.suppressed ? " that count" : ""); break;
    case Verdict::kFindings: {
      const Severity worst = c.errors ? Severity::kError : c.warnings ? Severity::kWarning : Severity::kNote;
      out << paint.of(worst, "FINDINGS") << "  " << counts;
      break;
    }
    case Verdict::kCouldNotJudge:
      out << paint.of(Severity::kError, "COULD NOT JUDGE") << "  " << result.could_not_judge;
      if (c.errors + c.warnings + c.notes > 0) out << "; " << counts;
  }
  if (c.suppressed) out << ", " << c.suppressed << " suppressed";
  out << "  (exit code " << result.exit_code << ")\n";
}

/// One line that says what was audited, from the facts.
std::string subject(const FactSheet& f) {
  std::vector<std::string> parts;
  auto add = [&](std::string s) { parts.push_back(std::move(s)); };
  const bool stranger = f.family.known() && f.family.value() == "unknown";
  if (f.model_type.known()) add(f.model_type.value() + (stranger ? ", no family that moe-audit knows: what depends on it is not judged" : ""));
  if (f.num_experts.known() && f.top_k.known()) {
    add(std::to_string(f.num_experts.value()) + " experts, top-" + std::to_string(f.top_k.value()));
  }
  if (f.moe_layers.known()) add(plural(static_cast<int>(f.moe_layers.value().size()), "MoE layer"));
  if (f.method.known()) {
    std::string method = name_of(f.method.value());
    if (f.method.value() == Method::kFull) method = "full fine-tuning";
    if (f.adapter_rank.known() && f.method.value() != Method::kFull) method += " r=" + std::to_string(f.adapter_rank.value());
    add(method);
  }
  if (f.accumulation.known()) add("accumulation " + std::to_string(f.accumulation.value()));
  for (const auto& [name, versions] : {std::pair{"transformers", &f.transformers}, {"peft", &f.peft}, {"trl", &f.trl}, {"axolotl", &f.axolotl}}) {
    if (versions->known()) add(std::string(name) + " " + to_text(versions->value()));
  }
  return join(parts, "; ");
}

void write_finding(const RuleResult& rule, const Finding& f, const Paint& paint, int width, std::ostream& out) {
  out << "\n" << paint.of(f.severity, name_of(f.severity)) << " " << paint.bold(std::string(rule.id)) << " " << rule.name << "\n";
  fill(out, f.message, 2, width);
  std::size_t longest = 0;
  for (const Evidence& e : f.evidence) longest = std::max(longest, std::min<std::size_t>(60, e.name.size() + e.value.size() + 3));
  for (const Evidence& e : f.evidence) {
    const std::string text = e.name + " = " + e.value;
    out << "    " << text;
    const std::string where = place(e.where);
    if (!where.empty()) out << std::string(longest > text.size() ? longest - text.size() : 0, ' ') << "  " << paint.dim(where);
    out << "\n";
  }
  for (const Location& l : f.locations) {
    if (!l.file.empty()) out << "  at " << place(l) << "\n";
  }
  if (!f.remedy.empty()) {
    out << "  " << paint.bold("Change") << "\n";
    fill(out, f.remedy, 4, width);
  }
  if (!f.does_not_show.empty()) fill(out, "Does not show: " + f.does_not_show, 2, width);
  if (!f.sources.empty()) fill(out, "Sources: " + join(f.sources, "; "), 2, width);
}

/// One line a mode: the layer in which most tokens change experts.
void write_precision(const PrecisionTable& t, bool quantised, int width, std::ostream& out) {
  std::vector<std::string> modes;
  std::map<std::string, std::size_t> worst;  // mode -> row
  for (std::size_t i = 0; i < t.mode.size(); ++i) {
    const auto [it, fresh] = worst.emplace(t.mode[i], i);
    if (fresh) modes.push_back(t.mode[i]);
    else if (t.flipped[i] > t.flipped[it->second]) it->second = i;
  }
  for (const std::string& mode : modes) {
    const std::size_t i = worst[mode];
    char share[96];
    std::snprintf(share, sizeof share, "%.3g %% of %lld tokens change experts (95 %% interval %.3g to %.3g)", 100 * t.flipped[i],
                  static_cast<long long>(t.tokens[i]), 100 * t.low[i], 100 * t.high[i]);
    const std::string as_executed = quantised ? "router as executed, its quantisation apart: " : "router as executed: ";
    fill(out, (mode == "executed" ? as_executed : "router in " + mode + ": ") + share + ", layer " + std::to_string(t.layer[i]) + ", the worst of " +
                  std::to_string(t.mode.size() / modes.size()), 4, width);
  }
}

/// The layer of the trace whose busiest expert got most, and what chance alone would show.
void write_loads(const TraceLoads& t, int width, std::ostream& out) {
  if (t.layer.empty()) return;
  const auto worst = static_cast<std::size_t>(std::max_element(t.max_violation.begin(), t.max_violation.end()) - t.max_violation.begin());
  char text[240];
  std::snprintf(text, sizeof text, "experts in the trace: MaxVio %.3g in layer %d, the worst of %zu (an even router shows %.2g in so few tokens)%s; moe-audit health says more",
                t.max_violation[worst], t.layer[worst], t.layer.size(), t.max_violation_floor[worst],
                t.can_judge[worst] ? "" : ", from fewer than 100 choices an expert: cannot tell");
  fill(out, text, 4, width);
}

/// What does not count, and who said so: nothing disappears.
void write_suppressed(const RunResult& run, const Paint& paint, int width, std::ostream& out) {
  if (run.suppressed.empty()) return;
  out << "\n" << paint.bold("Suppressed") << "\n";
  for (const Suppressed& s : run.suppressed) {
    const std::string where = s.finding.locations.empty() ? "" : " at " + place(s.finding.locations.front());
    fill(out, std::string(name_of(s.finding.severity)) + " " + std::string(s.rule) + where + ", by " + place(s.by) +
                  (s.reason.empty() ? "" : ": " + s.reason), 2, width);
  }
}

/// Smallest and largest ||W1 - W0|| / ||W0|| of some rows, and how many did not move.
std::string moved(const BaseChanges& c, bool routers) {
  double low = -1, high = -1;
  long long rows = 0, same = 0;
  for (std::size_t i = 0; i < c.part.size(); ++i) {
    if (c.is_buffer[i] || c.part[i] != (routers ? Part::kRouter : Part::kRoutedExpert) || c.base_norm[i] <= 0) continue;
    const double relative = c.change_norm[i] / c.base_norm[i];
    low = rows == 0 ? relative : std::min(low, relative);
    high = std::max(high, relative);
    same += c.changed[i] == 0;
    ++rows;
  }
  if (rows == 0) return {};
  char text[160];
  std::snprintf(text, sizeof text, "%s moved by %.3g to %.3g (||W1 - W0|| / ||W0||), %lld of %lld not at all", routers ? "routers" : "experts", low, high, same, rows);
  return text;
}

/// What the trained model is against its base.
void write_base(const FactSheet& f, int width, std::ostream& out) {
  if (const BaseChanges* c = f.base_changes.get()) {
    for (bool routers : {true, false}) {
      if (const std::string text = moved(*c, routers); !text.empty()) fill(out, "against the base: " + text, 4, width);
    }
    std::vector<std::string> others;
    for (std::size_t i = 0; i < c->part.size(); ++i) {
      if (c->part[i] == Part::kRouter || c->part[i] == Part::kRoutedExpert) continue;
      others.push_back(std::string(name_of(c->part[i])) + " " + std::to_string(c->changed[i]) + " of " + std::to_string(c->elements[i]));
    }
    if (!others.empty()) fill(out, "against the base: elements changed: " + join(others, ", "), 4, width);
  }
  if (const RoutingKept* r = f.base_routing.get(); r && !r->layer.empty()) {
    const std::size_t i = static_cast<std::size_t>(std::min_element(r->kept.begin(), r->kept.end()) - r->kept.begin());
    char share[200];
    std::snprintf(share, sizeof share, "routers keep %.3g %% of the base's choices (95 %% interval %.3g to %.3g, chance %.3g), layer %d, the lowest of %zu", 100 * r->kept[i],
                  100 * r->low[i], 100 * r->high[i], 100 * r->chance[i], r->layer[i], r->layer.size());
    fill(out, std::string("against the base: ") + share, 4, width);
  }
}

void write_checks(const RunResult& run, const Paint& paint, const WriterOptions& options, std::ostream& out) {
  const int width = options.width;
  std::vector<std::string> passed;
  std::vector<std::pair<std::string, std::string>> not_applicable;  // reason, rules
  int elsewhere = 0;  // advisories of releases and configurations that this run does not have
  std::map<std::string, std::vector<std::string>> waiting;  // what would settle it -> rules
  std::vector<const RuleResult*> undecided;
  for (const RuleResult& rule : run.rules) {
    const std::string id(rule.id);
    switch (rule.outcome.kind) {
      case Outcome::Kind::kPass: passed.push_back(id); break;
      case Outcome::Kind::kFinding: break;
      case Outcome::Kind::kNotApplicable: {
        if (is_advisory(rule.id)) {
          ++elsewhere;
          break;
        }
        const auto same = std::find_if(not_applicable.begin(), not_applicable.end(), [&](const auto& n) { return n.first == rule.outcome.reason; });
        if (same == not_applicable.end()) not_applicable.emplace_back(rule.outcome.reason, id);
        else same->second += " " + id;
        break;
      }
      case Outcome::Kind::kCannotTell: undecided.push_back(&rule); break;
    }
  }
  out << "\n" << paint.bold("Checked") << "\n";
  fill(out, passed.empty() ? "nothing passed" : "passed: " + join(passed, " "), 2, width);
  if (options.verbose) {
    for (const auto& [reason, ids] : not_applicable) fill(out, "not applicable: " + ids + " (" + reason + ")", 2, width);
  } else if (!not_applicable.empty()) {
    std::vector<std::string> all;
    for (const RuleResult& rule : run.rules) {
      if (rule.outcome.kind == Outcome::Kind::kNotApplicable && !is_advisory(rule.id)) all.emplace_back(rule.id);
    }
    fill(out, "not applicable: " + join(all, " ") + " (--verbose says why)", 2, width);
  }
  if (elsewhere > 0) {
    fill(out, "not applicable: " + plural(elsewhere, "advisory", "advisories") + " for other releases or configurations (AV)", 2, width);
  }
  for (const MeasureRecord& m : run.measures) {
    fill(out, "measured: " + m.name + (m.note.empty() ? "" : ", " + m.note) + (m.backend.empty() ? "" : " [" + m.backend + "]"), 2, width);
    if (!m.warning.empty()) fill(out, "warning: " + m.warning, 4, width);
  }
  if (run.facts.tokens_per_step.known()) {
    const FactSheet& f = run.facts;
    std::string text = "tokens a step: up to " + to_text(f.tokens_per_step.value()) + " (micro-batch " + to_text(f.micro_batch.value()) +
                       " x accumulation " + to_text(f.accumulation.value()) + " x " + plural(static_cast<int>(f.world_size.value()), "process") +
                       " x " + to_text(f.sequence_length.value()) + " tokens)";
    char each[48];
    if (f.tokens_per_expert.known() && std::snprintf(each, sizeof each, "%.6g", f.tokens_per_expert.value()) > 0) {
      text += std::string(", a mean of ") + each + " an expert";
    }
    fill(out, text, 4, width);
  }
  if (run.facts.router_precision.known()) write_precision(run.facts.router_precision.value(), run.facts.router_quantised.known() && run.facts.router_quantised.value(), width, out);
  if (run.facts.trace_loads.known()) write_loads(run.facts.trace_loads.value(), width, out);
  write_base(run.facts, width, out);
  if (undecided.empty()) return;
  out << "\n" << paint.bold("Could not be judged") << "\n";
  int advisories = 0, unheard = 0;
  const bool brief = !options.verbose && undecided.size() > 20;
  std::vector<std::pair<std::string, std::string>> lacking;  // what is missing, and the rules that lack just that
  for (const RuleResult* rule : undecided) {
    for (const Missing& m : rule->outcome.missing) {
      const bool nobody_knows = m.why.rfind("nothing is recorded", 0) == 0;  // of this release, whatever else is given
      if (!m.supply.empty() && !nobody_knows) waiting[m.supply].push_back(std::string(rule->id));
    }
    // Where little was given most rules lack what was not: what the inputs do not hold is worth a line, that is not.
    const bool not_given = std::all_of(rule->outcome.missing.begin(), rule->outcome.missing.end(), [](const Missing& m) {
      return m.supply.rfind("a trace", 0) != 0 && !m.supply.empty();
    });
    if (brief && not_given && !is_advisory(rule->id)) {
      ++unheard;
      continue;
    }
    std::vector<std::string> missing;
    std::string one_reason = rule->outcome.missing.empty() ? "" : rule->outcome.missing.front().why;
    for (const Missing& m : rule->outcome.missing) {
      missing.push_back(m.fact + (m.why.empty() ? "" : " (" + m.why + ")"));
      if (m.why != one_reason) one_reason.clear();
    }
    if (is_advisory(rule->id)) {
      ++advisories;
    } else {
      const std::string what = one_reason.empty() ? "unknown " + join(missing, ", ") : one_reason;
      const auto same = std::find_if(lacking.begin(), lacking.end(), [&](const auto& l) { return l.first == what; });
      if (same == lacking.end()) lacking.emplace_back(what, rule->id);
      else same->second += " " + std::string(rule->id);
    }
  }
  for (const auto& [what, rules] : lacking) fill(out, rules + ": " + what, 2, width);
  if (advisories > 0) {
    fill(out, plural(advisories, "advisory", "advisories") + " on faults of releases (AV): the report in JSON says what each lacks", 2, width);
  }
  if (unheard > 0) fill(out, plural(unheard, "rule") + " for what was not given (--verbose lists them)", 2, width);
  std::vector<std::pair<std::string, std::vector<std::string>>> supplies(waiting.begin(), waiting.end());
  for (auto& [supply, rules] : supplies) rules.erase(std::unique(rules.begin(), rules.end()), rules.end());
  if (brief) {  // the five that settle most
    std::stable_sort(supplies.begin(), supplies.end(), [](const auto& a, const auto& b) { return a.second.size() > b.second.size(); });
    if (supplies.size() > 5) supplies.resize(5);
  }
  for (const auto& [supply, rules] : supplies) {
    fill(out, "give " + supply + " to settle " + (brief ? plural(static_cast<int>(rules.size()), "rule") : join(rules, " ")), 2, width);
  }
}

void write_run(const RunResult& run, const WriterOptions& options, std::ostream& out) {
  const Paint paint(options.color);
  out << paint.bold(run.name) << "\n";
  const std::string what = subject(run.facts);
  if (!what.empty()) fill(out, what, 2, options.width);
  for (const InputFile& i : run.inputs) {
    out << "  " << paint.dim(i.kind + ": " + i.path + (i.note.empty() ? "" : " (" + i.note + ")")) << "\n";
  }
  write_problems(run, paint, options.width, out);
  for (Severity severity : {Severity::kError, Severity::kWarning, Severity::kNote}) {
    for (const RuleResult& rule : run.rules) {
      for (const Finding& f : rule.outcome.findings) {
        if (f.severity == severity) write_finding(rule, f, paint, options.width, out);
      }
    }
  }
  write_suppressed(run, paint, options.width, out);
  write_checks(run, paint, options, out);
  write_keys(run, paint, options.width, out);
}

void write(const AuditResult& result, const WriterOptions& options, std::ostream& out) {
  write_verdict(result, Paint(options.color), out);
  for (const RunResult& run : result.runs) {
    out << "\n";
    write_run(run, options, out);
  }
  if (result.stale_baseline.empty()) return;
  std::vector<std::string> entries;
  for (const BaselineEntry& e : result.stale_baseline) {
    const std::string where = place(e.where);
    entries.push_back(e.rule + (where.empty() ? "" : " at " + where));
  }
  out << "\n";
  fill(out, result.baseline + " accepts findings that are gone: " + join(entries, ", ") + ". Write it anew with --format baseline=" +
                result.baseline, 0, options.width);
}

}  // namespace

extern const Writer writer_text;
const Writer writer_text = {"text", write};

}  // namespace moeaudit
