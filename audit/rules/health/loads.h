// What the rules about the loads of a trace share.
#pragma once

#include <string>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit::loads {

/// The loads, or nullptr with `otherwise` set: no trace was given, or it holds none.
const TraceLoads* table(Facts& f, Outcome* otherwise);

/// exp of the entropy of the loads: as many evenly loaded experts would have it.
double effective_experts(const TraceLoads& t, std::size_t i);

/// Where the effective experts lie between those of full collapse, k (an unknown k counts as 1), and all: 0 to 1.
/// NaN where every token takes every expert.
double evenness(const TraceLoads& t, std::size_t i);

/// Evenness under which routing counts as collapsed; HE002's documentation says where it comes from.
inline constexpr double kCollapsed = 0.2;

/// Only where the sample lets one judge.
bool collapsed(const TraceLoads& t, std::size_t i);

/// Tokens that `choices` an expert take, with k known; else choices.
std::string sample_for(const TraceLoads& t, std::size_t i, double choices);

/// cannot_tell for the sake of too small a sample in these layers.
Outcome too_few(const Facts& f, const TraceLoads& t, const std::vector<std::size_t>& rows, double choices);

std::string rounded(double v);  // a measured ratio: three digits
std::string layers_of(const TraceLoads& t, const std::vector<std::size_t>& rows);  // "layers 0-3"
Evidence evidence(const Facts& f, const TraceLoads& t, std::size_t i, const std::string& name, std::string value);
std::string show(const Facts& f);  // the command that shows the loads, indented for a remedy

}  // namespace moeaudit::loads
