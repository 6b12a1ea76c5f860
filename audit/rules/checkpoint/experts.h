// The full weight scan seen expert by expert: what the rules compare within a layer.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit::experts {

/// The routed experts of one layer. `stack` is what stands before the layer's number in the names of their tensors: an
/// encoder and a decoder differ in it.
struct Layer {
  std::string stack;
  int layer = -1;
  std::map<int, std::vector<std::size_t>> units;  // expert -> rows of the scan, in order of projection
};
/// Every layer with at least two experts, in order of stack and number.
std::vector<Layer> layers(const WeightScan& scan);

/// Can equal bits in this unit be no accident? Constant tensors, biases and scalar scales are often equal.
bool tells_apart(const WeightScan& scan, std::size_t unit);

/// A matrix of values (no bias, no packed codes): its root mean square can be compared with its siblings'.
bool is_matrix(const WeightScan& scan, std::size_t unit);

/// Experts of the layer that hold the same bits in all their tensors, two or more in a group, ascending.
std::vector<std::vector<int>> identical(const WeightScan& scan, const Layer& layer);

/// "up_proj.weight" of "model.layers.{L}.mlp.experts.{e}.up_proj.weight"
std::string short_name(const std::string& projection);

/// "2, 5 and 7; 3 and 4": each group, up to four of them.
std::string list(const std::vector<std::vector<int>>& groups);

/// Three significant digits: ratios and ranks are not known better.
std::string rounded(double v);

/// Median of a copy; 0 for none.
double median(std::vector<double> values);

/// Middle and robust spread of logarithms: median, and 1.4826 x the median distance from it, which estimates the
/// standard deviation of a normal population and does not see single outliers.
struct Centre {
  double median = 0, deviation = 0;
};
Centre centre(const std::vector<double>& logarithms);

}  // namespace moeaudit::experts
