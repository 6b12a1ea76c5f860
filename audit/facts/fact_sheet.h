// Everything known about one run. The list of facts is fact_list.inc.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "audit/facts/fact.h"
#include "audit/facts/replay.h"
#include "audit/facts/rollout.h"
#include "audit/facts/values.h"
#include "audit/facts/version.h"

namespace moeaudit {

// clang-format off
namespace fact_info {
#define FACT(member, type, name, meaning, supply) inline constexpr FactInfo member{name, meaning, supply};
#include "audit/facts/fact_list.inc"
#undef FACT
}  // namespace fact_info

// clang-format on

struct FactSheet {
#define FACT(member, type, name, meaning, supply) Fact<type> member{&fact_info::member};
#include "audit/facts/fact_list.inc"
#undef FACT

  /// Calls f(fact) for every fact, in the order of fact_list.inc.
  template <class F>
  void visit(F&& f) {
#define FACT(member, type, name, meaning, supply) f(member);
#include "audit/facts/fact_list.inc"
#undef FACT
  }
  template <class F>
  void visit(F&& f) const {
#define FACT(member, type, name, meaning, supply) f(member);
#include "audit/facts/fact_list.inc"
#undef FACT
  }
};

/// Calls f(package, fact) for every fact that holds the versions of a package: "versions.trl" -> "trl".
template <class Sheet, class F>
void visit_versions(Sheet& sheet, F&& f) {
  sheet.visit([&](auto& fact) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(fact)>, Fact<VersionSet>>) {
      f(fact.info().name.substr(std::string_view("versions.").size()), fact);
    }
  });
}

/// Short text of a value for people: numbers as written by hand, columns as a count of rows.
std::string to_text(bool v);
std::string to_text(std::int64_t v);
std::string to_text(double v);  // shortest text that reads back to the same double
std::string to_text(const std::string& v);
std::string to_text(const std::vector<std::int64_t>& v);  // runs collapsed: "0-3, 5"
std::string to_text(const std::vector<std::string>& v);
inline std::string to_text(DType v) { return name_of(v); }
inline std::string to_text(Scoring v) { return name_of(v); }
inline std::string to_text(Method v) { return name_of(v); }
inline std::string to_text(Precision v) { return name_of(v); }
inline std::string to_text(AuxEffect v) { return name_of(v); }
inline std::string to_text(Balance v) { return name_of(v); }
std::string to_text(const Routing& v);  // "softmax, top-2, renormalised"
std::string to_text(const RouterTable& v);
std::string to_text(const RouterValues& v);
std::string to_text(const WeightScan& v);
std::string to_text(const RouterRows& v);
std::string to_text(const StableRanks& v);
std::string to_text(const UnfrozenTargets& v);
std::string to_text(const TensorDiff& v);
std::string to_text(const ShapeTable& v);
std::string to_text(const CorrectionBias& v);
std::string to_text(const ExpertStorage& v);
std::string to_text(const TraceLoads& v);
std::string to_text(const PrecisionTable& v);
std::string to_text(const AdapterModules& v);
std::string to_text(const AdapterTargets& v);
std::string to_text(const AdapterTensors& v);
std::string to_text(const BaseChanges& v);
std::string to_text(const RoutingKept& v);
std::string to_text(const DTypePairs& v);
std::string to_text(const BiasChanges& v);
std::string to_text(const ConfigChanges& v);  // "top_k 2 -> 4"
std::string to_text(const MergeTable& v);
std::string to_text(const AdapterLayout& v);
std::string to_text(const ReplayTable& v);
std::string to_text(const RolloutAgreement& v);
std::string to_text(const LogTable& v);
std::string to_text(const LogColumns& v);
std::string to_text(const LogBalance& v);  // "0.16 to 0.1603"
std::string to_text(const std::vector<WeightProblem>& v);
std::string to_text(const std::vector<IgnoredKey>& v);
std::string to_text(const std::vector<UnreadKey>& v);
std::string to_text(const std::vector<SettingConflict>& v);

}  // namespace moeaudit
