// moe-audit facts for people: what the trainer would really do, then every fact with its origin and what it shadowed.
#include <ostream>

#include "reports/page.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

std::string balance_line(const FactSheet& f) {
  if (!f.balance.known()) return {};
  if (f.balance.value() != Balance::kAuxLoss) return "this family has no balance loss in its training code";
  const std::string coefficient = f.aux_coefficient.known() ? to_text(f.aux_coefficient.value()) : "an unknown coefficient";
  if (!f.aux_added.known()) return "whether the balance loss is added is unknown: " + f.aux_added.why_unknown();
  if (!f.aux_added.value()) return "no balance loss is added to the loss (coefficient " + coefficient + " has no effect)";
  std::string line = "adds " + coefficient + " x balance loss";
  if (f.aux_multiplier.known() && f.aux_multiplier.value() != 1.0) {
    line += ", which accumulation and processes turn into " + to_text(f.aux_effective.known() ? f.aux_effective.value() : 0.0) +
            " relative to the cross-entropy (x " + to_text(f.aux_multiplier.value()) + ")";
  } else if (!f.aux_multiplier.known()) {
    line += "; the factor that accumulation brings is unknown: " + f.aux_multiplier.why_unknown();
  }
  return line;
}

std::string loss_line(const FactSheet& f) {
  if (!f.accumulation.known()) return {};
  std::string line = "accumulates " + to_text(f.accumulation.value()) + " micro-batches";
  if (!f.loss_factor.known()) return line + "; whether the loss is scaled right is unknown: " + f.loss_factor.why_unknown();
  if (f.loss_factor.value() == 1.0) return line + ", and scales the loss right";
  return line + ", and scales the gradient of the loss by " + to_text(f.loss_factor.value());
}

std::string router_line(const FactSheet& f) {
  std::string line;
  if (f.router_dtype.known()) line = "computes the gate in " + std::string(name_of(f.router_dtype.value()));
  if (f.router_trains.known()) line += std::string(line.empty() ? "" : "; ") + (f.router_trains.value() ? "trains the router" : "leaves the router frozen");
  if (f.experts_train.known()) line += std::string(line.empty() ? "" : "; ") + (f.experts_train.value() ? "trains routed experts" : "leaves the routed experts frozen");
  if (f.router_quantised.known() && f.router_quantised.value()) line += "; quantises the router";
  return line;
}

template <class T>
void write_fact(const Fact<T>& fact, const Paint& paint, int width, std::vector<std::string>& unknown, std::ostream& out) {
  if (!fact.known()) {
    unknown.push_back(std::string(fact.info().name) + (fact.why_unknown().empty() ? "" : ": " + fact.why_unknown()));
    return;
  }
  const std::string name(fact.info().name);
  out << "  " << paint.bold(name) << " = " << to_text(fact.value()) << "\n";
  std::string from = name_of(fact.origin());
  const std::string where = to_text(fact.source());
  if (!where.empty()) from += ", " + where;
  if (!fact.source().cite.empty() && where != fact.source().cite) from += " [" + fact.source().cite + "]";
  fill(out, from, 6, width);
  for (const auto& s : fact.shadowed()) {
    fill(out, "instead of " + to_text(s.value) + ": " + name_of(s.origin) + ", " + to_text(s.source), 6, width);
  }
}

}  // namespace

void write_facts_text(const AuditResult& result, const WriterOptions& options, std::ostream& out) {
  const Paint paint(options.color);
  for (const RunResult& run : result.runs) {
    out << paint.bold(run.name) << "\n";
    for (const InputFile& i : run.inputs) {
      out << "  " << i.kind << ": " << i.path << (i.note.empty() ? "" : " (" + i.note + ")") << "\n";
    }
    write_problems(run, paint, options.width, out);
    out << "\n" << paint.bold("What the trainer would really do") << "\n";
    for (const std::string& line : {router_line(run.facts), loss_line(run.facts), balance_line(run.facts)}) {
      if (!line.empty()) fill(out, line, 2, options.width);
    }
    out << "\n" << paint.bold("Facts") << "\n";
    std::vector<std::string> unknown;
    run.facts.visit([&](const auto& fact) { write_fact(fact, paint, options.width, unknown, out); });
    out << "\n" << paint.bold("Unknown") << "\n";
    for (const std::string& line : unknown) fill(out, line, 2, options.width);
    write_keys(run, paint, options.width, out);
  }
}

}  // namespace moeaudit
