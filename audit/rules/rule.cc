#include "audit/rules/rule.h"

namespace moeaudit {

const Rule* find_rule(std::string_view id_or_name) {
  for (int i = 0; i < kNumRules; ++i) {
    if (kRules[i]->id == id_or_name || kRules[i]->name == id_or_name) return kRules[i];
  }
  return nullptr;
}

}  // namespace moeaudit
