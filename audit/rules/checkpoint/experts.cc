#include "audit/rules/checkpoint/experts.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

namespace moeaudit::experts {

std::vector<Layer> layers(const WeightScan& scan) {
  std::map<std::pair<std::string, int>, Layer> found;
  for (std::size_t i = 0; i < scan.tensor.size(); ++i) {
    if (scan.part[i] != Part::kRoutedExpert || scan.expert[i] < 0 || scan.elements[i] == 0) continue;
    const std::string& projection = scan.projection[i];
    const std::size_t number = projection.find("{L}");
    const std::string stack = number == std::string::npos ? "" : projection.substr(0, number);
    Layer& layer = found[{stack, scan.layer[i]}];
    layer.stack = stack;
    layer.layer = scan.layer[i];
    layer.units[scan.expert[i]].push_back(i);
  }
  std::vector<Layer> out;
  for (auto& [key, layer] : found) {
    if (layer.units.size() < 2) continue;
    for (auto& [expert, units] : layer.units) {
      std::sort(units.begin(), units.end(),
                [&](std::size_t a, std::size_t b) { return scan.projection[a] < scan.projection[b]; });
    }
    out.push_back(std::move(layer));
  }
  return out;
}

bool tells_apart(const WeightScan& scan, std::size_t unit) {
  constexpr std::int64_t kEnough = 64;  // values: scales of single tensors collide, 64 values of a weight do not
  const bool vector = scan.columns[unit] > 0 && scan.elements[unit] <= scan.columns[unit];
  return !vector && scan.elements[unit] >= kEnough && scan.min[unit] < scan.max[unit];
}

bool is_matrix(const WeightScan& scan, std::size_t unit) {
  return scan.columns[unit] > 0 && scan.elements[unit] > scan.columns[unit];
}

std::vector<std::vector<int>> identical(const WeightScan& scan, const Layer& layer) {
  std::map<std::string, std::vector<int>> by_content;
  for (const auto& [expert, units] : layer.units) {
    std::string content;
    bool distinct = false;
    for (std::size_t i : units) {
      content += scan.projection[i] + ' ' + std::to_string(scan.elements[i]) + ' ' + scan.hash[i] + '\n';
      distinct |= tells_apart(scan, i) || scan.columns[i] == 0;  // codes: equal as a whole, or not at all
    }
    if (distinct) by_content[content].push_back(expert);
  }
  std::vector<std::vector<int>> groups;
  for (auto& [content, experts] : by_content) {
    if (experts.size() > 1) groups.push_back(std::move(experts));
  }
  std::sort(groups.begin(), groups.end());
  return groups;
}

std::string short_name(const std::string& projection) {
  for (const char* mark : {"{e}.", "experts."}) {
    const std::size_t at = projection.rfind(mark);
    if (at != std::string::npos) return projection.substr(at + std::string(mark).size());
  }
  return projection;
}

std::string list(const std::vector<std::vector<int>>& groups) {
  constexpr std::size_t kMost = 4;
  std::string text;
  for (std::size_t g = 0; g < groups.size() && g < kMost; ++g) {
    text += g == 0 ? "" : "; ";
    for (std::size_t i = 0; i < groups[g].size(); ++i) {
      text += (i == 0 ? "" : i + 1 < groups[g].size() ? ", " : " and ") + std::to_string(groups[g][i]);
    }
  }
  if (groups.size() > kMost) text += " and " + std::to_string(groups.size() - kMost) + " more groups";
  return text;
}

std::string rounded(double v) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.3g", v);
  return buffer;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const std::size_t half = values.size() / 2;
  std::sort(values.begin(), values.end());
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

Centre centre(const std::vector<double>& logarithms) {
  Centre out;
  out.median = median(logarithms);
  std::vector<double> distances;
  for (double v : logarithms) distances.push_back(std::fabs(v - out.median));
  out.deviation = 1.4826 * median(std::move(distances));
  return out;
}

}  // namespace moeaudit::experts
