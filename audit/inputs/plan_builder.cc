// Slots of a run's plan, and the contents of folders that a trainer left behind.
#include "audit/inputs/plan_builder.h"

#include <algorithm>

#include "audit/inputs/readers.h"

namespace moeaudit {
namespace {

using Rank = Slot::Rank;

void add(std::vector<std::string>* list, const std::string& path) {
  if (!path.empty() && std::find(list->begin(), list->end(), path) == list->end()) list->push_back(path);
}

/// What a YAML or JSON file in a folder is.
struct Sniffed {
  const ConfigReader* reader = nullptr;
  bool broken = false;  // does not parse, and has keys as training configs have them
};

Sniffed sniff_config(const std::string& path) {
  Material quiet;
  Node root;
  Sniffed out;
  if (read_tree(path, &root, &quiet)) {
    out.reader = find_config_reader(root);
    return out;
  }
  std::string text, error;
  if (!read_file(path, &text, &error, std::size_t{1} << 20)) return out;
  for (const char* key :
       {"base_model", "model_name_or_path", "micro_batch_size", "per_device_train_batch_size", "finetuning_type"}) {
    out.broken |= text.find(std::string(key) + ":") != std::string::npos ||
                  text.find("\"" + std::string(key) + "\"") != std::string::npos;
  }
  return out;
}

std::string listed(const std::vector<std::string>& paths) {
  std::string out;
  for (std::size_t i = 0; i < paths.size() && i < 4; ++i) out += (i ? ", " : "") + file_name_of(paths[i]);
  if (paths.size() > 4) out += " and " + std::to_string(paths.size() - 4) + " more";
  return out;
}

}  // namespace

std::string unread_weights_of(const Folder& folder) {
  if (folder.other_weights.empty()) return {};
  return "; it has weights in formats that moe-audit does not read: " + listed(folder.other_weights);
}

void PlanBuilder::problem(const std::string& file, std::string what, std::string remedy, bool fatal) {
  plan_.problems.push_back({file, 0, 0, std::move(what), std::move(remedy), fatal});
}

void PlanBuilder::keep_problems(const Folder& folder) {
  plan_.problems.insert(plan_.problems.end(), folder.problems.begin(), folder.problems.end());
}

void PlanBuilder::claim(Slot* slot, const std::string& path, Rank rank, const std::string& what) {
  if (path.empty() || slot->path == path) return;
  if (slot->rank == rank) {
    problem(path, "is a second " + what + " beside " + slot->path + ": one invocation audits one run",
            "give one of the two, or say with --base, --model, --adapter or --config which is which");
  } else if (slot->rank < rank) {
    if (!slot->empty()) plan_.inputs.push_back({slot->path, what, "not read: " + path + " was given"});
    *slot = {path, rank};
  } else {
    plan_.inputs.push_back({path, what, "not read: " + slot->path + " was given"});
  }
}

void PlanBuilder::claim_model(const Folder& folder, bool run_wrote, Rank rank) {
  const std::string what = run_wrote ? "trained model" : "base model";
  claim(run_wrote ? &plan_.run_config : &plan_.base_config, folder.config, rank, what);
  claim(run_wrote ? &plan_.run_weights : &plan_.base_weights, folder.weights, rank, what);
  if (run_wrote && !folder.config.empty()) plan_.run_config_states_version = true;
}

void PlanBuilder::claim_trainer_files(const Folder& folder, Rank rank) {
  claim(&plan_.trainer_state, folder.trainer_state, rank, "log");
  claim(&plan_.training_args, folder.training_args, rank, "training_args.bin");
  add(&plan_.model_cards, folder.model_card);
}

void PlanBuilder::take_checkpoint(const Folder& folder, bool run_wrote, Rank rank) {
  claim(&plan_.adapter_config, folder.adapter_config, rank, "adapter");
  claim(&plan_.adapter_weights, folder.adapter_weights, rank, "adapter");
  // What lies beside a folder that an option names is stronger than what is found elsewhere, weaker than other options.
  const Rank beside = rank == Rank::kOption ? Rank::kPath : rank;
  Folder config, weights;
  config.config = folder.config;
  weights.weights = folder.weights;
  const bool copy_of_base = folder.has_adapter() && folder.weights.empty();
  if (run_wrote || !copy_of_base) {
    claim_model(config, run_wrote, beside);
  } else {
    claim(&plan_.run_config, folder.config, beside, "config of the run");
  }
  claim_model(weights, run_wrote && !folder.has_adapter(), beside);  // beside an adapter lie the base's weights
  claim_trainer_files(folder, beside);
  add(&plan_.folders, folder.path);
}

void PlanBuilder::fill_from_run_folder(const Folder& folder) {
  auto fill = [&](Slot* slot, const std::string& path) {
    if (slot->empty() && !path.empty()) *slot = {path, Rank::kFound};
  };
  if (plan_.run_config.empty() && !folder.config.empty()) plan_.run_config_states_version = true;
  fill(&plan_.run_config, folder.config);
  fill(&plan_.training_args, folder.training_args);
  fill(&plan_.adapter_config, folder.adapter_config);
  if (!has_weights()) {
    fill(&plan_.adapter_weights, folder.adapter_weights);
    if (folder.adapter_weights.empty()) fill(&plan_.run_weights, folder.weights);
  } else if (!folder.adapter_weights.empty() || !folder.weights.empty()) {
    plan_.inputs.push_back(
        {folder.path, "final weights", "not read: the checkpoint is audited; audit them with --adapter or --model"});
  }
  add(&plan_.model_cards, folder.model_card);
  add(&plan_.folders, folder.path);
  add_version_files(folder);
  choose_config(folder);
}

void PlanBuilder::add_version_files(const Folder& folder) {
  for (const std::string& file : folder.version_files) add(&plan_.version_files, file);
}

bool PlanBuilder::choose_config(const Folder& folder) {
  std::vector<std::string> found, launchers;
  for (const std::string& path : folder.maybe_configs) {
    const Sniffed sniffed = sniff_config(path);
    if (sniffed.broken || (sniffed.reader && sniffed.reader->read && !sniffed.reader->framework.empty())) {
      found.push_back(path);
    } else if (sniffed.reader && sniffed.reader->read) {  // Accelerate, DeepSpeed: they say nothing of who trains
      launchers.push_back(path);
    } else if (sniffed.reader) {
      problem(path, "is a " + std::string(sniffed.reader->kind) + ", which moe-audit does not read",
              std::string(sniffed.reader->why_not_read), false);
    }
  }
  // Which of them a run used is known only if one of its files names it, or the user does.
  for (const std::string& path : launchers) {
    if (found.empty() && launchers.size() == 1) break;
    plan_.inputs.push_back({path, "launcher or engine config", "read only where a config names it, or with --config"});
  }
  if (found.empty() && launchers.size() == 1 && plan_.training_configs.empty()) found = launchers;
  if (found.empty()) return false;
  if (!plan_.training_configs.empty()) {
    for (const std::string& path : found) {
      const auto& given = plan_.training_configs;
      if (std::find(given.begin(), given.end(), path) != given.end()) continue;
      plan_.inputs.push_back({path, "training config", "not read: " + given.front() + " was given"});
    }
  } else if (found.size() == 1) {
    plan_.training_configs = found;
  } else {
    problem(folder.path,
            "holds " + std::to_string(found.size()) + " training configs (" + listed(found) +
                "): which one the run used is unknown; none was read",
            "--config " + found.front(), false);
  }
  return true;
}

bool PlanBuilder::has_weights() const { return !plan_.adapter_weights.empty() || !plan_.run_weights.empty(); }

}  // namespace moeaudit
