// Expert health for people: one table a subject, a row a layer. A value in brackets must not be judged, and the lines
// below the table say why.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>
#include <ostream>

#include "reports/page.h"
#include "reports/writer.h"

namespace moeaudit {
namespace {

std::string number(double v) {
  if (std::isnan(v)) return "-";
  char text[32];
  std::snprintf(text, sizeof text, std::fabs(v) < 0.0005 && v != 0 ? "%.1e" : std::fabs(v) < 10 ? "%.3f" : "%.1f", v);
  return text;
}

std::string percent(double v) {
  if (std::isnan(v)) return "-";
  char text[32];
  std::snprintf(text, sizeof text, v != 0 && std::fabs(v) < 0.0001 ? "%.1e %%" : "%.2f %%", 100 * v);
  return text;
}

std::string count(double v) { return std::isnan(v) ? "-" : std::to_string(static_cast<std::int64_t>(v)); }

using Show = std::string (*)(double);

struct Column {
  const char* head;
  const char* metric;
  Show show;
  bool interval = false, floor = false, chance = false;  // shown beside it
};

/// Right-aligned columns.
void write_table(const std::vector<std::vector<std::string>>& rows, const Paint& paint, std::ostream& out) {
  std::vector<std::size_t> widths(rows.front().size());
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    std::string line = " ";
    for (std::size_t i = 0; i < rows[r].size(); ++i)
      line += " " + std::string(widths[i] - rows[r][i].size(), ' ') + rows[r][i] + " ";
    while (!line.empty() && line.back() == ' ') line.pop_back();
    out << (r == 0 ? paint.dim(line) : line) << "\n";
  }
}

std::string layer_list(const std::vector<int>& layers) {
  std::string text;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    std::size_t last = i;
    while (last + 1 < layers.size() && layers[last + 1] == layers[last] + 1) ++last;
    text +=
        (text.empty() ? "" : ", ") + std::to_string(layers[i]) + (last > i ? "-" + std::to_string(layers[last]) : "");
    i = last;
  }
  return text;
}

/// A table of those columns that any layer has; nothing where none has one.
void write_section(const char* title, const std::vector<Column>& columns, const HealthReport& r, const Paint& paint,
                   int width, std::ostream& out) {
  std::vector<Column> used;
  for (const Column& c : columns) {
    const bool there = std::any_of(r.layers.begin(), r.layers.end(), [&](const LayerHealth& l) {
      const HealthMetric* m = l.find(c.metric);
      return m && !std::isnan(m->value);
    });
    if (there) used.push_back(c);
  }
  if (used.empty()) return;
  std::vector<std::vector<std::string>> rows(1, {"layer"});
  for (const Column& c : used) {
    const auto any = [&](double HealthMetric::*field) {
      return std::any_of(r.layers.begin(), r.layers.end(), [&](const LayerHealth& l) {
        const HealthMetric* m = l.find(c.metric);
        return m && !std::isnan(m->*field);
      });
    };
    rows[0].push_back(c.head);
    if (c.interval && any(&HealthMetric::low)) rows[0].push_back("95 %");
    if (c.floor) rows[0].push_back("floor");
    if (c.chance) rows[0].push_back("chance");
    for (std::size_t i = 0; i < r.layers.size(); ++i) {
      if (rows.size() <= i + 1) rows.push_back({std::to_string(r.layers[i].layer)});
      const HealthMetric* m = r.layers[i].find(c.metric);
      const HealthMetric none;
      if (!m) m = &none;
      const std::string value = c.show(m->value);
      rows[i + 1].push_back(m->cannot_tell.empty() ? value : "(" + value + ")");
      if (c.interval && any(&HealthMetric::low))
        rows[i + 1].push_back(std::isnan(m->low) ? "-" : c.show(m->low) + " to " + c.show(m->high));
      if (c.floor) rows[i + 1].push_back(c.show(m->floor));
      if (c.chance) rows[i + 1].push_back(c.show(m->chance));
    }
  }
  out << "\n" << paint.bold(title) << "\n";
  write_table(rows, paint, out);
  std::map<std::string, std::vector<int>> reasons;
  for (const LayerHealth& l : r.layers) {
    for (const Column& c : used) {
      const HealthMetric* m = l.find(c.metric);
      if (!m || m->cannot_tell.empty() || std::isnan(m->value)) continue;
      auto& layers = reasons[m->cannot_tell];
      if (layers.empty() || layers.back() != l.layer) layers.push_back(l.layer);
    }
  }
  for (const auto& [why, layers] : reasons)
    fill(out, "( ) cannot tell, layer " + layer_list(layers) + ": " + why + ".", 2, width);
}

void write_extremes(const LayerHealth& l, std::ostream& out) {
  std::vector<std::size_t> order(l.load.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return l.load[a] > l.load[b]; });
  const auto some = [&](auto begin, auto end) {
    std::string text;
    for (auto it = begin; it != end; ++it)
      text += (text.empty() ? "" : ", ") + std::to_string(*it) + " (" + number(l.utilisation[*it]) + ")";
    return text;
  };
  const auto n = static_cast<std::ptrdiff_t>(std::min<std::size_t>(5, order.size()));
  out << "  layer " << l.layer << ": busiest " << some(order.begin(), order.begin() + n) << "; least "
      << some(order.rbegin(), order.rbegin() + n) << "\n";
  if (l.together.empty()) return;
  out << "    together more often than their loads explain:";
  for (std::size_t i = 0; i < std::min<std::size_t>(3, l.together.size()); ++i) {
    const CoActivation& c = l.together[i];
    out << (i ? ", " : " ") << c.first << "+" << c.second << " " << number(c.lift) << " times (" << c.together
        << " tokens)";
  }
  out << "\n";
}

std::string bytes(double v) {
  if (std::isnan(v)) return "-";
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
  std::size_t unit = 0;
  for (; v >= 1000 && unit + 1 < std::size(kUnits); ++unit) v /= 1000;
  char text[32];
  std::snprintf(text, sizeof text, "%.3g %s", v, kUnits[unit]);
  return text;
}

void write_placement(const PlacementForecast& p, const Paint& paint, int width, std::ostream& out) {
  if (p.layers.empty()) return;
  const bool sent = p.hidden_size > 0;
  out << "\n" << paint.bold("Forecast: " + std::to_string(p.ranks) + " expert-parallel ranks, " + p.map) << "\n";
  std::vector<std::vector<std::string>> rows = {{"layer", "slowest rank", "its time / mean", "even router", "choices that leave"}};
  if (sent) rows[0].insert(rows[0].end(), {"sent a token", "sent in all"});
  for (const PlacementLayer& l : p.layers) {
    rows.push_back({std::to_string(l.layer), std::to_string(l.slowest_rank), number(l.max_over_mean), number(l.even_router),
                    percent(l.leaving)});
    if (sent) rows.back().insert(rows.back().end(), {bytes(l.bytes_per_token), bytes(l.bytes)});
  }
  if (sent && p.layers.size() > 1) rows.push_back({"all", "", number(p.straggler_factor), "", "", bytes(p.bytes_per_token), bytes(p.bytes)});
  write_table(rows, paint, out);
  std::string speeds;
  for (const double s : p.speeds) speeds += (speeds.empty() ? "" : ",") + number(s);
  fill(out,
       "Straggler factor " + number(p.straggler_factor) + ": expert work takes so many times as long as if it were divided " +
           (speeds.empty() ? "evenly" : "as the speeds are (" + speeds + ")") + ", since every layer waits for its slowest rank. " +
           (p.recorded_sources ? "Tokens start on the ranks that recorded them. " : "Tokens are supposed to start evenly on all ranks. ") +
           (sent ? "Sent: each choice by itself to its expert's rank and back, d = " + std::to_string(p.hidden_size) + ", " +
                       std::to_string(p.bytes_per_value) + " bytes a value."
                 : "--hidden-size D adds the bytes between ranks."),
       2, width);
}

}  // namespace

void write_health_text(const HealthReport& r, const WriterOptions& options, std::ostream& out) {
  const Paint paint{options.color};
  const int width = options.width;
  out << paint.bold("expert health") << "  " << r.path << "\n";
  std::string subject = r.format.empty() ? "no trace" : r.format;
  if (!r.recorder.empty()) subject += " by " + r.recorder;
  if (!r.model.empty()) subject += "; " + r.model;
  if (!r.layers.empty()) {
    const LayerHealth& l = r.layers.front();
    subject += "; " + std::to_string(l.experts) + " experts" + (l.top_k > 0 ? ", top-" + std::to_string(l.top_k) : "") +
               "; layers with choices: " + std::to_string(r.layers.size());
  }
  if (!r.layers.empty())
    subject += "; steps " + std::to_string(r.steps) + ", micro-batches " + std::to_string(r.micro_batches) +
               ", ranks " + std::to_string(r.ranks);
  fill(out, subject, 2, width);
  if (!r.note.empty()) fill(out, r.note, 2, width);
  if (!r.backend.empty()) fill(out, "measured on: " + r.backend, 2, width);
  if (!r.warning.empty()) fill(out, "warning: " + r.warning, 2, width);
  for (const InputProblem& p : r.problems) {
    Source s;
    s.file = p.file;
    s.line = p.line;
    fill(out, std::string(p.fatal ? "problem: " : "note: ") + to_text(s) + ": " + p.what + "; " + p.remedy, 2, width);
  }
  for (const WeightProblem& p : r.weight_problems) {
    fill(out,
         "problem: " + p.file + (p.offset >= 0 ? " byte " + std::to_string(p.offset) : "") +
             (p.tensor.empty() ? "" : ", " + p.tensor) + ": " + p.what + "; left out",
         2, width);
  }
  if (r.layers.empty()) {
    if (!r.format.empty())
      fill(out, "Nothing to measure: the trace has no choices, no counts, and no logits with a known k.", 2, width);
    return;
  }

  write_section("Load, all tokens together",
                {{"MaxVio", "max_violation_pooled", number, true, true},
                 {"MinVio", "min_violation_pooled", number},
                 {"CV (pop.)", "cv_population", number, true, true},
                 {"CV (N-1)", "cv_sample", number},
                 {"H/ln E", "normalised_entropy", number, true},
                 {"eff. experts", "effective_experts", number},
                 {"Gini", "gini", number},
                 {"busiest 1/8", "share_of_busiest_eighth", number, false, false, true},
                 {"idle", "idle_experts", count},
                 {"dead", "dead_experts", count},
                 {"cold", "cold_experts", count}},
                r, paint, width, out);
  const auto [least, most] = std::minmax_element(r.layers.begin(), r.layers.end(),
                                                 [](const auto& a, const auto& b) { return a.blocks < b.blocks; });
  if (most->blocks < 10) {
    fill(out,
         "No 95 % intervals: they are drawn from 10 blocks of tokens or more (sequences, pieces of micro-batches), and here are " +
             std::to_string(most->blocks) + ".",
         2, width);
  } else if (least->blocks >= 10) {
    fill(out, "95 %: from resamples of " + std::to_string(least->blocks) + " blocks of tokens, less what resampling adds: a value near its floor may lie above its own.", 2, width);
  }
  write_section("Load, MaxVio a window",
                {{"step, mean", "max_violation_step_mean", number, false, true},
                 {"worst", "max_violation_step_worst", number},
                 {"micro-batch, mean", "max_violation_micro_batch_mean", number, false, true},
                 {"worst", "max_violation_micro_batch_worst", number}},
                r, paint, width, out);
  write_section(("Router probabilities (" + r.score + ", " + r.score_from + ")").c_str(),
                {{"token entropy", "token_entropy", number, true},
                 {"of the mean", "mean_entropy", number},
                 {"mutual inf. (nats)", "mutual_information", number, true},
                 {"confidence", "confidence", number, true, false, true},
                 {"CV importance", "importance_cv_population", number, false, true},
                 {"CV gate mass", "gate_mass_cv_population", number, false, true}},
                r, paint, width, out);
  write_section("Choice and logits",
                {{"off the top k", "choices_off_the_top_k", percent},
                 {"Jaccard", "choice_jaccard", number, false, false, true},
                 {"margin p01", "margin_p01", number},
                 {"p10", "margin_p10", number},
                 {"p50", "margin_p50", number},
                 {"near ties", "near_ties_as_recorded", percent},
                 {"in bf16", "near_ties_in_bf16", percent, true},
                 {"non-finite", "tokens_with_non_finite_logits", percent}},
                r, paint, width, out);
  write_section("What became of the choices",
                {{"no expert", "choices_of_no_expert", percent},
                 {"one twice", "tokens_with_an_expert_twice", percent},
                 {"recompute differs", "recompute_changed", percent, true},
                 {"dropped", "dropped_choices", percent, true},
                 {"lost all", "tokens_with_all_dropped", percent},
                 {"saturation", "saturation", number, true, false, true},
                 {"changed", "routing_changed", percent, true}},
                r, paint, width, out);

  if (!r.across.empty()) {
    out << "\n" << paint.bold("Across layers") << paint.dim(" (that can be judged)") << "\n";
    std::vector<std::vector<std::string>> rows = {
        {"metric", "layers", "mean", "p50", "p90", "worst", "in layer"}};
    for (const AcrossLayers& a : r.across) {
      rows.push_back({a.name, std::to_string(a.layers), number(a.mean), number(a.p50), number(a.p90), number(a.worst),
                      std::to_string(a.worst_layer)});
    }
    write_table(rows, paint, out);
  }
  write_placement(r.placement, paint, width, out);
  if (options.verbose) {
    out << "\n" << paint.bold("Experts") << paint.dim(" (load relative to the fair share)") << "\n";
    for (const LayerHealth& l : r.layers) write_extremes(l, out);
  }
  out << "\n";
  fill(out,
       "MaxVio = max load / fair share - 1. floor: what independent tokens of a perfectly even router show in so few "
       "tokens. A load says nothing about how much an expert matters "
       "(arXiv 2606.10703), and one text is one text: a healthy model has idle experts on text of a single kind. "
       "docs/health.md defines every number.",
       2, width);
}

}  // namespace moeaudit
