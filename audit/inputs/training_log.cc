// Logs of training as a table by step: JSON lines of metrics, CSV, and the text that Megatron-LM prints. Frameworks
// call one thing by many names; the rows below say which is which. "lm loss" is the cross-entropy alone.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include "audit/inputs/files.h"
#include "audit/inputs/readers.h"
#include "audit/traces/line_reader.h"

namespace moeaudit {
namespace {

constexpr std::size_t kMostRows = 2'000'000;
constexpr int kLinesLookedAt = 5000;  // to find out what a file is; Megatron-LM prints a thousand of arguments first

enum class Column {
  kNone,
  kStep,
  kLoss,
  kCrossEntropy,
  kAuxLoss,
  kZLoss,
  kGradNorm,
  kEvalLoss,
  kLearningRate,
  kOtherAux
};

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
    {"current_steps", Column::kStep},          // LLaMA-Factory trainer_log.jsonl
    {"global_step_max_steps", Column::kStep},  // ms-swift logging.jsonl: "1/369"
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
    {"load_balancing_loss", Column::kAuxLoss},       // Megatron-LM
    {"seq_load_balancing_loss", Column::kOtherAux},  // Megatron-LM prints load_balancing_loss, too, and then it is 0
    {"global_load_balancing_loss", Column::kOtherAux},
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
  std::array<std::optional<double>, 10> value;
  int aux_digits = 0;
  void set(Column column, std::optional<double> v, std::string_view text = {}) {
    auto& slot = value[static_cast<std::size_t>(column)];
    if (column == Column::kNone || !v || slot) return;
    slot = v;
    if (column == Column::kAuxLoss || column == Column::kOtherAux)
      aux_digits = std::max(aux_digits, significant_digits(text));
  }
  bool says(Column column) const { return value[static_cast<std::size_t>(column)].has_value(); }
  bool something() const {
    return says(Column::kStep) && (says(Column::kLoss) || says(Column::kCrossEntropy) || says(Column::kAuxLoss) ||
                                   says(Column::kZLoss) || says(Column::kGradNorm) || says(Column::kEvalLoss));
  }
};

void append(Entry e, int line, LogTable* log) {
  auto& aux = e.value[static_cast<std::size_t>(Column::kAuxLoss)];
  if (!aux || *aux == 0.0) {
    if (const auto& other = e.value[static_cast<std::size_t>(Column::kOtherAux)]) aux = other;
  }
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
  log->aux_digits = std::max(log->aux_digits, e.aux_digits);
}

// ---- the three formats: a line -> an entry
// ---------------------------------------------------------------------------

bool json_entry(std::string_view line, Entry* entry) {
  Node root;
  TextError error;
  TextLimits limits;
  limits.max_nodes = 20'000;
  if (!parse_json(line, &root, nullptr, &error, limits) || !root.is_map()) return false;
  for (std::size_t i = 0; i < root.keys.size(); ++i) {
    const Column column = column_of(root.keys[i]);
    const Node& item = root.items[i];
    if (column == Column::kStep && item.is_string())
      entry->set(column, number(std::string_view(item.text).substr(0, item.text.find('/'))));
    else
      entry->set(column, item.as_double(), item.text);
  }
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
      entry->set(column_of(key), number(piece.substr(colon + 1)), piece.substr(colon + 1));
    }
    begin = end + 1;
  }
  return true;
}

/// What Megatron-LM prints of its arguments before it trains (megatron/training/arguments.py `_print_args` at d98e8a6):
/// "  micro_batch_size ................................ 4".
class MegatronArguments {
 public:
  void read(std::string_view line, int at) {
    if (line.find("- end of arguments -") != std::string_view::npos) inside_ = false;
    if (inside_) take(line, at);
    if (line.find("- arguments -") != std::string_view::npos) inside_ = true;
  }
  /// Settings under Hugging Face's names where it has them, "log.<name>" otherwise.
  void state(const std::string& file, Material* material) const {
    const auto put = [&](const char* name, const char* key) {
      if (const Argument* a = find(key))
        material->settings.push_back({name, node(a->text), source(file, key, a->line)});
    };
    put("per_device_train_batch_size", "micro_batch_size");
    put("world_size", "data_parallel_size");
    put("log.num_experts", "num_experts");
    put("log.top_k", "moe_router_topk");
    put("log.expert_parallel", "expert_model_parallel_size");
    put("log.z_coefficient", "moe_z_loss_coeff");
    put("log.recompute", "recompute_granularity");
    const Argument* type = find("moe_router_load_balancing_type");
    if (type && type->text.find("aux_loss") != std::string::npos) put("log.aux_coefficient", "moe_aux_loss_coeff");
    const auto batch = value("global_batch_size"), micro = value("micro_batch_size"),
               ranks = value("data_parallel_size");
    if (!batch || !micro || !ranks || !(*micro * *ranks >= 1) || !(*batch <= 1e9)) return;
    if (std::fmod(*batch, *micro * *ranks) != 0) return;
    material->settings.push_back({"gradient_accumulation_steps",
                                  node(std::to_string(static_cast<std::int64_t>(*batch / (*micro * *ranks)))),
                                  source(file, "global_batch_size", find("global_batch_size")->line)});
  }

 private:
  struct Argument {
    std::string text;
    int line = 0;
  };
  void take(std::string_view line, int at) {
    const std::size_t name = line.find_first_not_of(' '), dots = line.find(" .");
    if (name == std::string_view::npos || dots == std::string_view::npos || dots <= name) return;
    const std::size_t text = line.find_first_not_of('.', dots + 1);
    if (text == std::string_view::npos || text + 1 >= line.size() || of_.size() >= 5000) return;
    std::string_view value = line.substr(text + 1);
    if (!value.empty() && value.back() == '\r') value.remove_suffix(1);
    of_.emplace(std::string(line.substr(name, dots - name)), Argument{std::string(value), at});
  }
  const Argument* find(const char* key) const {
    const auto it = of_.find(key);
    return it == of_.end() ? nullptr : &it->second;
  }
  std::optional<double> value(const char* key) const {
    const Argument* a = find(key);
    return a ? number(a->text) : std::nullopt;
  }
  static Node node(const std::string& text) {
    Node n;
    n.kind = number(text) ? Node::Kind::kNumber : Node::Kind::kString;
    n.text = text;
    return n;
  }
  static Source source(const std::string& file, const char* key, int line) {
    Source s;
    s.role = Role::kTrainerState;
    s.file = file;
    s.key = key;
    s.line = line;
    return s;
  }

  std::map<std::string, Argument, std::less<>> of_;
  bool inside_ = false;
};

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

/// What writers put where they have no number.
bool blank(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  for (const std::string_view nothing : {"", "None", "null", "N/A", "-", "--"}) {
    if (text == nothing) return true;
  }
  return false;
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

int significant_digits(std::string_view text) {
  int digits = 0;
  for (const char c : text.substr(0, text.find_first_of("eE")))
    digits += (c >= '1' && c <= '9') || (c == '0' && digits > 0);
  return digits;
}

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
  MegatronArguments arguments;
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
      case LogFormat::kMegatron:
        arguments.read(line, lines.number());
        megatron_entry(line, &entry);
        break;
      default: {
        const std::vector<std::string> fields = csv_fields(line);
        bool sound = fields.size() == columns.size();
        for (std::size_t i = 0; i < std::min(fields.size(), columns.size()); ++i) {
          const std::optional<double> value = number(fields[i]);
          entry.set(columns[i], value, fields[i]);
          sound = sound && (columns[i] == Column::kNone || value || blank(fields[i]));
        }
        if (!sound && lines.complete()) first_bad = bad++ == 0 ? lines.number() : first_bad;
      }
    }
    if (!entry.something()) continue;
    append(entry, lines.number(), &log);
    if (log.step.size() < kMostRows) continue;
    problem(lines.number(), "more than 2,000,000 entries: the rest is left out", false);
    break;
  }
  if (!lines.error().empty()) problem(lines.number(), lines.error(), true);
  if (bad > 0) {
    const bool one = bad == 1, csv = format == LogFormat::kCsv;
    problem(first_bad,
            (one ? "1 line " : std::to_string(bad) + " lines ") +
                (csv ? std::string(one ? "has" : "have") + " another number of fields than the header, or a word for a number"
                     : one ? "is no JSON object" : "are no JSON objects") +
                (one ? "" : "; this is the first"),
            false);
  }
  arguments.state(path, material);
  material->log = std::move(log);
  material->log_source = {};
  material->log_source.role = Role::kTrainerState;
  material->log_source.file = path;
}

}  // namespace moeaudit
