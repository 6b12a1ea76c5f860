// What each path on the command line is, and which files make up one run. Looks at names and, where a name does not
// tell, at the first keys of a small file; reads nothing else. load.cc reads what is found here.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/inputs/inputs.h"

namespace moeaudit {

/// One place of a run that exactly one file or folder fills. Explicit options outrank paths, paths outrank what was
/// found inside a folder; two of equal rank are a contradiction that the user must settle.
struct Slot {
  enum class Rank { kEmpty, kFound, kPath, kOption };
  std::string path;
  Rank rank = Rank::kEmpty;
  bool empty() const { return rank == Rank::kEmpty; }
};

/// The files of one run, by what they are for.
struct RunPlan {
  std::string name;                // of the run, as the user would say it: the checkpoint, folder or config
  Slot base_config, base_weights;  // the model that is fine-tuned
  Slot run_config, run_weights;    // config.json and weights that the run wrote (full fine-tuning)
  bool run_config_states_version = false;
  Slot adapter_config, adapter_weights;
  Slot trainer_state, training_args;
  Slot base_id;  // a hub id instead of a path
  Slot hidden_states, trace, rollout;
  std::vector<std::string> training_configs;
  std::vector<std::string> version_files;        // found in a run's folder
  std::vector<std::string> model_cards;          // README.md with framework versions, written by the run
  std::vector<std::string> given_version_files;  // --env, or a path of its own
  std::vector<std::string> folders;              // where a relative base model may lie: run folder, checkpoint
  std::vector<InputFile> inputs;
  std::vector<InputProblem> problems;
};

/// One plan, or with options.all_checkpoints one a checkpoint. Never empty: problems need a run to be listed in.
std::vector<RunPlan> discover(const RunOptions& options);

/// What a path accepts, for messages.
extern const char* const kAcceptedInputs;

}  // namespace moeaudit
