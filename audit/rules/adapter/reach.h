// What an adapter reaches, for the rules of this folder.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit::adapter {

inline bool reaches(const AdapterModules& modules, Part part) {
  return std::find(modules.part.begin(), modules.part.end(), part) != modules.part.end();
}

/// Stacks of a second set of experts, which the family knows by name alone (ERNIE-4.5-VL's for images).
inline bool reaches_second_set(const AdapterModules& modules) {
  for (std::size_t i = 0; i < modules.part.size(); ++i) {
    if (modules.part[i] == Part::kOther && i < modules.copies.size() && modules.copies[i] > 1) return true;
  }
  return false;
}

/// Row `i` names projections of routed experts, and no routed expert is reached by anything: AD003 reports it, so AD004
/// does not report it again when it also matches nothing.
inline bool missed_experts(const AdapterTargets& targets, std::size_t i, const AdapterModules& modules) {
  return targets.names_experts[i] && targets.field[i] != "exclude_modules" && targets.field[i] != "modules_to_save" &&
         targets.entry[i] != "all-linear" && !reaches(modules, Part::kRoutedExpert) && !reaches_second_set(modules);
}

/// Why an adapter rule has no subject, if facts prove it.
inline bool no_adapter(Facts& f) {
  const bool* present = f.require(f->has_adapter);
  return present && !*present;
}
inline constexpr const char* kNoAdapter = "the run trains no adapter";

/// Place of row `i` as the user wrote it.
inline Location place_of(Facts& f, const AdapterTargets& targets, std::size_t i) {
  const Source& source = targets.field[i] == "target_parameters" ? f->target_parameters.source()
                         : targets.field[i] == "modules_to_save" ? f->modules_to_save.source()
                                                                 : f->target_modules.source();
  Location where = location_of(source);
  if (!targets.file[i].empty()) where.file = targets.file[i];
  if (targets.line[i] > 0) where.line = targets.line[i];
  return where;
}

/// Entries of `field` without those of `drop`.
inline std::vector<std::string> without(const AdapterTargets& targets, const std::string& field,
                                        const std::vector<std::string>& drop) {
  std::vector<std::string> kept;
  for (std::size_t i = 0; i < targets.entry.size(); ++i) {
    if (targets.field[i] != field) continue;
    if (std::find(drop.begin(), drop.end(), targets.entry[i]) == drop.end()) kept.push_back(targets.entry[i]);
  }
  return kept;
}

}  // namespace moeaudit::adapter
