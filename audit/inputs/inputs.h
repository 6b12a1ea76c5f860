// From paths on the command line to one run's facts: recognise what each path is, read it, resolve it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "audit/facts/fact_sheet.h"
#include "audit/facts/finding.h"
#include "audit/tensors/tensor_store.h"

namespace moeaudit {

class Trace;

/// The command line, as data.
struct RunOptions {
  std::vector<std::string> paths;         // positional; each is found out
  std::vector<std::string> models, bases, adapters, configs, envs, logs;  // explicit
  std::string hidden_states, trace, rollout;
  std::vector<std::pair<std::string, std::string>> assume;  // package -> version constraint, in order
  std::int64_t world_size = 0;            // 0: not given
  std::int64_t sequence_length = 0;       // 0: not given
  bool all_checkpoints = false;           // --all
};

/// One run, read and resolved. The stores own the memory maps that TensorViews point into.
struct LoadedRun {
  std::string name;
  FactSheet facts;
  TensorStore model, base, adapter, hidden_states;  // base: only beside weights that were trained from it
  std::shared_ptr<const Trace> trace;               // of this run; null: none was given
  std::shared_ptr<const Trace> rollout;             // of an inference engine, of the same tokens
  std::vector<InputFile> inputs;
  std::vector<InputProblem> problems;
  std::vector<Suppression> suppressions;
};

/// Reads everything the options name. One invocation is one run; a folder of checkpoints gives its latest, or with
/// all_checkpoints one run each. Never throws on bad input: what could not be read is in LoadedRun::problems.
std::vector<LoadedRun> load_runs(const RunOptions& options);

/// A baseline file, as `--format baseline=FILE` writes it. False with `problem` set.
bool read_baseline(const std::string& path, Baseline* baseline, InputProblem* problem);

}  // namespace moeaudit
