// One stored vector in float64 on LibTorch: from named inputs and options to named outputs, and how far two right
// computations of an output may be apart.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>

namespace moeaudit::reference {

using Json = nlohmann::ordered_json;
using Inputs = std::map<std::string, at::Tensor>;

/// Two computations that each make at most `roundings` / 2 of them between the inputs and a value, on terms whose
/// magnitudes add up to `scale`, differ by no more than n u / (1 - n u) scale, u = 2^-53. 0: they are equal.
struct Output {
  at::Tensor values;
  double roundings = 0, scale = 0;
};
using Outputs = std::map<std::string, Output>;

/// Throws std::runtime_error for an operation that is not known, c10::Error for inputs that do not fit.
Outputs compute(const std::string& operation, const Json& options, const Inputs& inputs);

}  // namespace moeaudit::reference
