// Config files that belong to a training run and that moe-audit knows by sight but does not read: it says so, and names
// what the user can state instead.
#include "audit/inputs/reader.h"

namespace moeaudit {
namespace {

Match recognises(const Node& root) {
  return root.find_path("model._component_") || root.find_path("tokenizer._component_") ? Match::kSure : Match::kNo;
}

}  // namespace

extern const ConfigReader config_reader_other_configs;
const ConfigReader config_reader_other_configs{
    "", "torchtune config", recognises, nullptr,
    "state the number of processes with --world-size N, and give the model with --model DIR"};

}  // namespace moeaudit
