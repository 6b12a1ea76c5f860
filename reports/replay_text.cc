// A replay for people: one line a quantity; below those that differ, what was computed instead.
#include <cmath>
#include <cstdio>
#include <ostream>

#include "reports/page.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

std::string number(double v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.7g", v);
  return text;
}

std::string bands(double v) {
  char text[32];
  std::snprintf(text, sizeof text, v < 10 ? "%.2f" : "%.3g", v);
  return std::string(text) + (v == 1 ? " band" : " bands");
}

/// Quantities that count tokens or say zero or not, and so have no recorded and expected number.
bool counts(const std::string& quantity) {
  return quantity == "selection" || quantity == "recomputed_selection" || quantity == "group_limit" ||
         quantity == "drop_order" || quantity.starts_with("router_grad") || quantity.starts_with("finite_");
}

void write_row(const ReplayTable& t, std::size_t i, const Paint& paint, int width, std::ostream& out) {
  std::string name = t.quantity[i] + (t.layer[i] >= 0 ? ", layer " + std::to_string(t.layer[i]) : "");
  if (t.compared[i] == 0) return fill(out, "cannot tell  " + name + ": " + t.missing[i], 2, width);
  const bool differs = t.differing[i] > 0;
  std::string line = (differs ? "differs      " : "agrees       ") + name + ": ";
  const std::string n = std::to_string(t.compared[i]);
  if (counts(t.quantity[i])) {
    line += differs ? std::to_string(t.differing[i]) + " of " + n +
                          (t.quantity[i].starts_with("router_grad") ? " are zero"
                           : t.quantity[i] == "finite_logits"       ? " tokens are not"
                           : t.quantity[i].starts_with("finite_")   ? " are not"
                           : t.quantity[i] == "drop_order"          ? " micro-batches"
                                                                    : " tokens")
                    : n + " compared";
  } else {
    line += number(t.recorded[i]) + ", expected " + number(t.expected[i]) + " +- " + number(t.band[i]) + " (" +
            bands(t.distance[i]) + ", " +
            (differs ? std::to_string(t.differing[i]) + " of " + n + " outside" : n + " compared") + ")";
  }
  fill(out, differs ? paint.bold(line) : line, 2, width);
  if (!differs) return;
  fill(out,
       "held to " + t.held_to[i] +
           (t.file[i].empty() ? "" : "; " + t.file[i] + (t.line[i] > 0 ? ":" + std::to_string(t.line[i]) : "")),
       15, width);
  if (!t.name[i].empty()) {
    fill(out,
         "it is " + (t.formula[i].empty() ? "" : t.formula[i] + ": ") + t.name[i] +
             (t.factor[i].empty() ? "" : ", times " + t.factor[i] + " = " + number(t.factor_value[i])) +
             (t.also[i].empty() ? "" : "; this trace cannot tell it from: " + t.also[i]),
         15, width);
  } else if (!counts(t.quantity[i]) || !t.runner_up[i].empty()) {
    fill(out, "no formula of the catalogue gives it", 15, width);
  }
  if (!t.runner_up[i].empty()) {
    fill(out,
         (t.name[i].empty() ? "nearest: " : "next: ") + t.runner_up[i] + ", " +
             (counts(t.quantity[i]) ? number(t.runner_up_fit[i]) + " tokens" : bands(t.runner_up_fit[i])) + " off",
         15, width);
  }
}

}  // namespace

void write_replay_text(const ReplayReport& r, const WriterOptions& options, std::ostream& out) {
  const Paint paint{options.color};
  const ReplayTable& t = r.table;
  out << paint.bold("replay") << "  " << t.path << "\n";
  std::string subject = t.model_class.empty() ? t.model_type : t.model_class;
  if (!t.trainer.empty()) subject += (subject.empty() ? "" : "; ") + t.trainer;
  if (!t.packages.empty()) subject += (subject.empty() ? "" : "; ") + t.packages;
  subject += (subject.empty() ? "" : "; ") + std::string("steps ") + std::to_string(t.steps) + ", micro-batches " +
             std::to_string(t.micro_batches) + ", ranks " + std::to_string(t.ranks);
  fill(out, subject, 2, options.width);
  if (!r.backend.empty()) fill(out, "computed on: " + r.backend, 2, options.width);
  if (!r.warning.empty()) fill(out, "warning: " + r.warning, 2, options.width);
  for (const InputProblem& p : r.problems) {
    Source s;
    s.file = p.file;
    s.line = p.line;
    fill(out, std::string(p.fatal ? "problem: " : "note: ") + to_text(s) + ": " + p.what + "; " + p.remedy, 2,
         options.width);
  }
  for (const WeightProblem& p : r.weight_problems) {
    fill(out,
         "problem: " + p.file + (p.offset >= 0 ? " byte " + std::to_string(p.offset) : "") +
             (p.tensor.empty() ? "" : ", " + p.tensor) + ": " + p.what + "; left out",
         2, options.width);
  }
  out << "\n";
  for (std::size_t i = 0; i < t.quantity.size(); ++i) {
    // Layers that say the same as the one before are summed up.
    std::size_t same = i;
    while (!options.verbose && t.layer[i] >= 0 && same + 1 < t.quantity.size() &&
           t.quantity[same + 1] == t.quantity[i] && t.differing[same + 1] == 0 && t.differing[i] == 0 &&
           (t.compared[same + 1] > 0) == (t.compared[i] > 0)) {
      ++same;
    }
    write_row(t, i, paint, options.width, out);
    if (same > i) fill(out, "and so do layers to " + std::to_string(t.layer[same]), 15, options.width);
    i = same;
  }
  if (t.quantity.empty()) fill(out, "Nothing to compare: the trace has neither logits nor losses.", 2, options.width);
  out << "\n";
  fill(out,
       "A band is what rounding alone can do: the recorded inputs moved by one rounding of their dtype, and the "
       "framework's arithmetic. docs/replay.md says what each quantity is.",
       2, options.width);
}

}  // namespace moeaudit
