// Fact sheets for tests, from JSON: { "router.top_k": 9, "balance.aux_coefficient": {"value": 0.02, "origin": "stated",
// "role": "training_config", "file": "axolotl.yml", "line": 4}, "balance.aux_multiplier": {"unknown": "why"} }.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "audit/facts/fact_sheet.h"

namespace moeaudit::testing {

/// Sets one fact per key. A value alone has origin stated and role training_config. Words are spelt as name_of() spells
/// them; columns are objects of arrays whose missing columns are filled with the type's blank value; vectors of rows
/// are arrays of objects. An object with "value" may add origin, role, file, line, key, tensor, cite and "shadowed", a
/// list of such objects, oldest first. null leaves the fact unknown; {"unknown": "why"} does too and says why. Throws
/// std::runtime_error, with the name of the fact, on anything it does not know.
FactSheet facts_from_json(const nlohmann::json& facts);

}  // namespace moeaudit::testing
