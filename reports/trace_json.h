// What the JSON reports on traces share.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit {

/// A number; JSON has no NaN and no infinities, so these are strings.
inline nlohmann::ordered_json number_json(double v) {
  if (std::isfinite(v)) return v;
  return std::isnan(v) ? "nan" : v > 0 ? "inf" : "-inf";
}

/// What could not be read.
inline nlohmann::ordered_json problems_json(const std::vector<InputProblem>& inputs,
                                            const std::vector<WeightProblem>& tensors) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const InputProblem& p : inputs) {
    nlohmann::ordered_json object = {{"file", p.file}};
    if (p.line > 0) object["line"] = p.line;
    if (p.column > 0) object["column"] = p.column;
    object["what"] = p.what;
    object["remedy"] = p.remedy;
    object["fatal"] = p.fatal;
    list.push_back(std::move(object));
  }
  for (const WeightProblem& p : tensors) {
    nlohmann::ordered_json object = {{"file", p.file}};
    if (p.offset >= 0) object["offset"] = p.offset;
    if (!p.tensor.empty()) object["tensor"] = p.tensor;
    object["what"] = p.what;
    object["remedy"] = "record the run again; what else is in the file was used";
    object["fatal"] = true;
    list.push_back(std::move(object));
  }
  return list;
}

}  // namespace moeaudit
