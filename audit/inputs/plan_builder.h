// Internal to discovery: puts files into the slots of one run's plan, and says where two contradict.
#pragma once

#include <string>
#include <vector>

#include "audit/inputs/discover.h"
#include "audit/inputs/files.h"

namespace moeaudit {

class PlanBuilder {
 public:
  explicit PlanBuilder(RunPlan* plan) : plan_(*plan) {}

  void problem(const std::string& file, std::string what, std::string remedy, bool fatal = true);
  void keep_problems(const Folder& folder);
  /// Fills the slot, or notes which of two was not read; two of equal rank are a problem.
  void claim(Slot* slot, const std::string& path, Slot::Rank rank, const std::string& what);

  /// config.json and weights of a model: of the base, or written by the run.
  void claim_model(const Folder& folder, bool run_wrote, Slot::Rank rank);
  /// trainer_state.json, training_args.bin and the versions in README.md, where a trainer wrote the folder.
  void claim_trainer_files(const Folder& folder, Slot::Rank rank);
  /// A folder with an adapter, trainer files, or the name checkpoint-N. config.json beside an adapter is a copy of the
  /// base model's with the run's overrides; it tells the version that wrote it only where trainer files lie beside it.
  void take_checkpoint(const Folder& folder, bool run_wrote, Slot::Rank rank);
  /// What a checkpoint does not hold itself: config, versions, training_args.bin of the folder above it.
  void fill_from_run_folder(const Folder& folder);
  /// The training config among the files of a folder. Several: the user must choose. False if there is none.
  bool choose_config(const Folder& folder);
  void add_version_files(const Folder& folder);

  bool has_weights() const;

 private:
  RunPlan& plan_;
};

/// "; its weights (pytorch_model.bin, 2 more) are in formats that moe-audit does not read", or "".
std::string unread_weights_of(const Folder& folder);

}  // namespace moeaudit
