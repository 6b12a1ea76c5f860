#include "audit/facts/origin.h"

namespace moeaudit {

const char* name_of(Origin origin) {
  switch (origin) {
    case Origin::kUnknown: return "unknown";
    case Origin::kStated: return "stated";
    case Origin::kFrameworkDefault: return "framework_default";
    case Origin::kFamily: return "family";
    case Origin::kDerived: return "derived";
    case Origin::kMeasured: return "measured";
    case Origin::kAssumed: return "assumed";
    case Origin::kAbsent: return "absent";
  }
  return "unknown";
}

const char* name_of(Role role) {
  switch (role) {
    case Role::kNone: return "none";
    case Role::kCommandLine: return "command_line";
    case Role::kTrainingConfig: return "training_config";
    case Role::kTrainingArguments: return "training_arguments";
    case Role::kAdapterConfig: return "adapter_config";
    case Role::kCheckpointConfig: return "checkpoint_config";
    case Role::kBaseModelConfig: return "base_model_config";
    case Role::kTrainerState: return "trainer_state";
    case Role::kVersions: return "versions";
    case Role::kModelWeights: return "model_weights";
    case Role::kAdapterWeights: return "adapter_weights";
    case Role::kHiddenStates: return "hidden_states";
    case Role::kTrace: return "trace";
    case Role::kFamilyTable: return "family_table";
    case Role::kBehaviourTable: return "behaviour_table";
  }
  return "none";
}

std::string to_text(const Source& source) {
  std::string text = source.file;
  if (source.line > 0) text += ":" + std::to_string(source.line);
  const std::string& inner = source.tensor.empty() ? source.key : source.tensor;
  if (!inner.empty()) text += text.empty() ? inner : " (" + inner + ")";
  if (text.empty()) text = source.cite;
  return text;
}

}  // namespace moeaudit
