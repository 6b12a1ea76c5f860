// trainer_state.json: what the Trainer logged (transformers/trainer_callback.py TrainerState). Python's json writes NaN
// and Infinity as they are; a written NaN is kept apart from an absent number.
#include <algorithm>
#include <limits>

#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

constexpr Row kRows[] = {
    {"max_steps", "max_steps"},  // as the Trainer worked it out; TrainingArguments has -1 unless the user gave it
    {"log_history", ""},
    {"global_step", ""},
};

void append(const Node& entry, const char* key, std::vector<double>* values, std::vector<char>* has) {
  const Node* node = entry.find(key);
  const auto value = node ? node->as_double() : std::nullopt;
  values->push_back(value.value_or(std::numeric_limits<double>::quiet_NaN()));
  if (has) has->push_back(value ? 1 : 0);
}

void append_entry(const Node& entry, LogTable* log) {
  const Node* step = entry.find("step");
  log->step.push_back(step ? step->as_int().value_or(-1) : -1);
  append(entry, "loss", &log->loss, &log->has_loss);
  append(entry, "grad_norm", &log->grad_norm, &log->has_grad_norm);
  append(entry, "eval_loss", &log->eval_loss, &log->has_eval_loss);
  append(entry, "aux_loss", &log->aux_loss, &log->has_aux_loss);
  append(entry, "learning_rate", &log->learning_rate, nullptr);
  append(entry, "ce_loss", &log->ce, &log->has_ce);
  append(entry, "z_loss", &log->z_loss, &log->has_z_loss);
  if (const Node* aux = entry.find("aux_loss"); aux && aux->is_number())
    log->aux_digits = std::max(log->aux_digits, significant_digits(aux->text));
  log->line.push_back(entry.line);
}

}  // namespace

void read_trainer_state(const std::string& path, Material* material) {
  Node root;
  if (!read_tree(path, &root, material)) return;
  const ConfigFile file{path, Role::kTrainerState, &root};
  const Node* history = root.find("log_history");
  if (!history || !history->is_list()) {
    material->problems.push_back({path, root.line, root.column,
                                  "no list \"log_history\": this is no trainer_state.json",
                                  "give the trainer_state.json that the Trainer left in the checkpoint folder"});
    return;
  }
  read_rows(file, kRows, Unread::kNone, material);
  material->log = LogTable{};
  material->log.file = path;
  for (const Node& entry : history->items) {
    if (entry.is_map()) append_entry(entry, &material->log);
  }
  material->log_source = place_of(file, root, "log_history", "log_history");
  const Node* step = root.find("global_step");
  if (const auto n = step ? step->as_int() : std::nullopt) material->global_step = *n;
}

}  // namespace moeaudit
