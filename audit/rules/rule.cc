#include "audit/rules/rule.h"

#include <algorithm>
#include <vector>

#include "audit/rules/advisory.h"

namespace moeaudit {

std::span<const Rule* const> all_rules() {
  static const std::vector<const Rule*> all = [] {
    std::vector<const Rule*> rules(kRules, kRules + kNumRules);
    for (int i = 0; i < kNumAdvisories; ++i) rules.push_back(&kAdvisoryRules[i]);
    std::sort(rules.begin(), rules.end(), [](const Rule* a, const Rule* b) { return a->id < b->id; });
    return rules;
  }();
  return all;
}

const Rule* find_rule(std::string_view id_or_name) {
  for (const Rule* rule : all_rules()) {
    if (rule->id == id_or_name || rule->name == id_or_name) return rule;
  }
  return nullptr;
}

}  // namespace moeaudit
