// Where a fact comes from. Types only; no I/O.
#pragma once

#include <string>

namespace moeaudit {

/// How a value became known. The order is the order of the report, not of trust: which source wins is decided
/// where facts are resolved (audit/inputs/resolve.cc), and the loser is kept in Fact::shadowed().
enum class Origin {
  kUnknown,           // nobody said; Fact::why_unknown() may say what would
  kStated,            // a file of the user says it in so many words
  kFrameworkDefault,  // the user's file is silent; the framework at this version fills it in
  kFamily,            // known of the model family
  kDerived,           // follows from other facts
  kMeasured,          // computed from tensors, logs or a trace
  kAssumed,           // the user said so on the command line (--assume, --world-size, ...)
  kAbsent,            // looked for, and proven not to be there
};

/// What kind of input a value was read from. BL001 and others judge a value that the user's own training config
/// states more sharply than one that merely came along with the base model.
enum class Role {
  kNone,
  kCommandLine,
  kTrainingConfig,     // Axolotl / TRL / TrainingArguments / LLaMA-Factory YAML or JSON, written by the user
  kTrainingArguments,  // training_args.bin: what the trainer really ran with
  kAdapterConfig,      // adapter_config.json
  kCheckpointConfig,   // config.json that the run itself wrote
  kBaseModelConfig,    // config.json of the model that is being fine-tuned
  kTrainerState,       // trainer_state.json
  kVersions,           // pip freeze, requirements, uv.lock, generated README.md
  kModelWeights,
  kAdapterWeights,
  kHiddenStates,
  kTrace,              // trace.json, or another recorded trace
  kFamilyTable,        // audit/families/*.yaml
  kBehaviourTable,     // audit/behaviours/*.yaml
};

/// The place a value was read from. Empty and zero fields are unknown. Lines and columns count from 1.
struct Source {
  Role role = Role::kNone;
  std::string file;    // as the user wrote the path, never made absolute
  int line = 0;
  int column = 0;
  std::string key;     // dotted path of the key, e.g. "text_config.num_experts"
  std::string tensor;  // tensor name, for values read from weights
  std::string cite;    // for tables: repository file at a commit, paper equation, or fixtures/oracle row
};

const char* name_of(Origin origin);
const char* name_of(Role role);

/// "config.json:12 (router_aux_loss_coef)"; empty when nothing is known.
std::string to_text(const Source& source);

}  // namespace moeaudit
