// Logs of training as a table by step: JSON lines of metrics, CSV, and the text that Megatron-LM prints. Frameworks
// call one thing by many names; the rows below say which is which. "lm loss" is the cross-entropy alone.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <optional>

#include "audit/inputs/files.h"
#include "audit/inputs/readers.h"
#include "audit/traces/line_reader.h"

namespace moeaudit {
namespace {

constexpr std::size_t kMostRows = 2'000'000;
constexpr int kLinesLookedAt = 200;  // to find out what a file is

enum class Column { kNone, kStep, kLoss, kCrossEntropy, kAuxLoss, kZLoss, kGradNorm, kEvalLoss, kLearningRate };

struct Name {
  std::string_view name;
  Column column;
};
constexpr Name kNames[] = {
    {"step", Column::kStep},
    {"global_step", Column::kStep},
    {"_step", Column::kStep},
    {"iteration", Column::kStep},
    {"iter", Column::kStep},
    {"loss", Column::kLoss},
    {"total_loss", Column::kLoss},
    {"ce_loss", Column::kCrossEntropy},
    {"ce", Column::kCrossEntropy},
    {"cross_entropy", Column::kCrossEntropy},
    {"cross_entropy_loss", Column::kCrossEntropy},
    {"nll_loss", Column::kCrossEntropy},
    {"lm_loss", Column::kCrossEntropy},  // Megatron-LM
    {"aux_loss", Column::kAuxLoss},      // TRL
    {"router_aux_loss", Column::kAuxLoss},
    {"load_balancing_loss", Column::kAuxLoss},  // Megatron-LM
    {"moe_aux_loss", Column::kAuxLoss},
    {"lb_loss", Column::kAuxLoss},
    {"balance_loss", Column::kAuxLoss},
    {"z_loss", Column::kZLoss},  // Megatron-LM
    {"router_z_loss", Column::kZLoss},
    {"grad_norm", Column::kGradNorm},
    {"gradient_norm", Column::kGradNorm},
    {"total_grad_norm", Column::kGradNorm},
    {"eval_loss", Column::kEvalLoss},
    {"val_loss", Column::kEvalLoss},
    {"validation_loss", Column::kEvalLoss},
    {"learning_rate", Column::kLearningRate},
    {"lr", Column::kLearningRate},
};

/// "train/Grad norm" -> "grad_norm", "eval/loss" -> "eval_loss", "moe/z_loss" -> "z_loss", "my run - train/loss" ->
/// "loss".
Column column_of(std::string_view key) {
  if (const std::size_t run = key.rfind(" - "); run != std::string_view::npos) key.remove_prefix(run + 3);
  std::string name;
  for (const char c : key)
    name += c == ' ' || c == '-' || c == '/' || c == '.'
                ? '_'
                : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  while (!name.empty() && name.back() == '_') name.pop_back();
  for (const std::string_view prefix : {"trainer_", "train_", "training_", "optim_", "moe_"}) {
    if (key.size() > prefix.size() && key[prefix.size() - 1] == '/' && name.starts_with(prefix))
      name.erase(0, prefix.size());
  }
  for (const Name& n : kNames) {
    if (n.name == name) return n.column;
  }
  return Column::kNone;
}

std::optional<double> number(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '+')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\r')) text.remove_suffix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || end != text.data() + text.size()) return std::nullopt;
  if (error == std::errc::result_out_of_range)
    return text.find("e-") != std::string_view::npos || text.find("E-") != std::string_view::npos ? 0.0 : HUGE_VAL;
  return error == std::errc() ? std::optional(value) : std::nullopt;
}

/// One entry of a log: what was found under the names above. A written NaN is a value.
struct Entry {
  std::array<std::optional<double>, 9> value;
  void set(Column column, std::optional<double> v) {
    auto& slot = value[static_cast<std::size_t>(column)];
    if (column != Column::kNone && v && !slot) slot = v;
  }
  bool says(Column column) const { return value[static_cast<std::size_t>(column)].has_value(); }
  bool something() const {
    return says(Column::kStep) && (says(Column::kLoss) || says(Column::kCrossEntropy) || says(Column::kAuxLoss) ||
                                   says(Column::kZLoss) || says(Column::kGradNorm) || says(Column::kEvalLoss));
  }
};

void append(const Entry& e, int line, LogTable* log) {
  const auto put = [&](Column column, std::vector<double>* values, std::vector<char>* has) {
    const auto& v = e.value[static_cast<std::size_t>(column)];
    values->push_back(v.value_or(std::numeric_limits<double>::quiet_NaN()));
    if (has) has->push_back(v.has_value());
  };
  const double step = *e.value[static_cast<std::size_t>(Column::kStep)];
  log->step.push_back(step >= 0 && step < 1e15 ? static_cast<std::int64_t>(step) : -1);
  put(Column::kLoss, &log->loss, &log->has_loss);
  put(Column::kCrossEntropy, &log->ce, &log->has_ce);
  put(Column::kAuxLoss, &log->aux_loss, &log->has_aux_loss);
  put(Column::kZLoss, &log->z_loss, &log->has_z_loss);
  put(Column::kGradNorm, &log->grad_norm, &log->has_grad_norm);
  put(Column::kEvalLoss, &log->eval_loss, &log->has_eval_loss);
  put(Column::kLearningRate, &log->learning_rate, nullptr);
  log->line.push_back(line);
}

// ---- the three formats: a line -> an entry
// ---------------------------------------------------------------------------

bool json_entry(std::string_view line, Entry* entry) {
  Node root;
  TextError error;
  TextLimits limits;
  limits.max_nodes = 20'000;
  if (!parse_json(line, &root, nullptr, &error, limits) || !root.is_map()) return false;
  for (std::size_t i = 0; i < root.keys.size(); ++i) entry->set(column_of(root.keys[i]), root.items[i].as_double());
  return true;
}

/// "... iteration       10/     100 | lm loss: 1.0E+01 | load_balancing_loss: 1.0E+00 | grad norm: 1.2 |"
bool megatron_entry(std::string_view line, Entry* entry) {
  const std::size_t at = line.find("iteration ");
  const std::size_t bar = line.find('|');
  if (at == std::string_view::npos || bar == std::string_view::npos || bar < at) return false;
  const std::string_view head = line.substr(at + 10, bar - at - 10);
  const std::size_t slash = head.find('/');
  if (slash == std::string_view::npos) return false;
  entry->set(Column::kStep, number(head.substr(0, slash)));
  if (!entry->says(Column::kStep)) return false;
  for (std::size_t begin = bar + 1; begin < line.size();) {
    const std::size_t end = std::min(line.find('|', begin), line.size());
    const std::string_view piece = line.substr(begin, end - begin);
    const std::size_t colon = piece.rfind(':');
    if (colon != std::string_view::npos) {
      std::string_view key = piece.substr(0, colon);
      while (!key.empty() && key.front() == ' ') key.remove_prefix(1);
      entry->set(column_of(key), number(piece.substr(colon + 1)));
    }
    begin = end + 1;
  }
  return true;
}

/// Fields of a line of CSV; a quoted field may hold commas, and "" for a quote.
std::vector<std::string> csv_fields(std::string_view line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (std::size_t i = 0; i < line.size() && fields.size() < 10'000; ++i) {
    const char c = line[i];
    if (quoted && c == '"' && i + 1 < line.size() && line[i + 1] == '"')
      fields.back() += line[++i];
    else if (c == '"')
      quoted = !quoted;
    else if (c == ',' && !quoted)
      fields.emplace_back();
    else if (c != '\r')
      fields.back() += c;
  }
  return fields;
}

enum class LogFormat { kNone, kJsonLines, kMegatron, kCsv };

std::vector<Column> csv_columns(std::string_view header) {
  std::vector<Column> columns;
  for (const std::string& field : csv_fields(header)) columns.push_back(column_of(field));
  return columns;
}

bool csv_header(std::string_view line) {
  Entry entry;
  for (const Column c : csv_columns(line)) entry.set(c, 0.0);
  return entry.something();
}

LogFormat format_of(const std::string& path) {
  LineReader lines;
  std::string why;
  std::string_view line;
  if (!lines.open(path, &why)) return LogFormat::kNone;
  for (int i = 0; i < kLinesLookedAt && lines.next(&line); ++i) {
    Entry entry;
    if (i == 0 && csv_header(line)) return LogFormat::kCsv;
    if (line.find_first_not_of(" \t") != std::string_view::npos && line[line.find_first_not_of(" \t")] == '{') {
      if (json_entry(line, &entry) && entry.something()) return LogFormat::kJsonLines;
    } else if (megatron_entry(line, &entry) && entry.something()) {
      return LogFormat::kMegatron;
    }
  }
  return LogFormat::kNone;
}

}  // namespace

bool is_training_log(const std::string& path) {
  const bool named = has_ending(path, ".jsonl") || has_ending(path, ".ndjson") || has_ending(path, ".csv") ||
                     has_ending(path, ".log") || has_ending(path, ".out") || has_ending(path, ".txt");
  return named && format_of(path) != LogFormat::kNone;
}

void read_training_log(const std::string& path, Material* material) {
  const auto problem = [&](int line, std::string what, bool fatal) {
    material->problems.push_back({path, line, 0, std::move(what),
                                  "give trainer_state.json, JSON lines or CSV with a column step and losses, or the "
                                  "text that Megatron-LM prints",
                                  fatal});
  };
  const LogFormat format = format_of(path);
  LineReader lines;
  std::string why;
  if (!lines.open(path, &why)) return problem(0, why, true);
  if (format == LogFormat::kNone) return problem(0, "is no training log that moe-audit knows", true);
  LogTable log;
  log.file = path;
  std::string_view line;
  std::vector<Column> columns;
  int first_bad = 0, bad = 0;
  while (lines.next(&line)) {
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    if (format == LogFormat::kCsv && columns.empty()) {
      columns = csv_columns(line);
      continue;
    }
    Entry entry;
    switch (format) {
      case LogFormat::kJsonLines:
        if (!json_entry(line, &entry) && lines.complete()) {
          first_bad = bad++ == 0 ? lines.number() : first_bad;
        }
        break;
      case LogFormat::kMegatron: megatron_entry(line, &entry); break;
      default: {
        const std::vector<std::string> fields = csv_fields(line);
        for (std::size_t i = 0; i < std::min(fields.size(), columns.size()); ++i)
          entry.set(columns[i], number(fields[i]));
      }
    }
    if (!entry.something()) continue;
    append(entry, lines.number(), &log);
    if (log.step.size() < kMostRows) continue;
    problem(lines.number(), "more than 2,000,000 entries: the rest is left out", false);
    break;
  }
  if (!lines.error().empty()) problem(lines.number(), lines.error(), true);
  if (bad > 0) problem(first_bad, std::to_string(bad) + " lines are no JSON objects; this is the first", false);
  material->log = std::move(log);
  material->log_source = {};
  material->log_source.role = Role::kTrainerState;
  material->log_source.file = path;
}

}  // namespace moeaudit
