// Stable rank ||W||_F^2 / ||W||_2^2 of routed experts' matrices, from a block of each: 1 for a matrix of rank 1, about
// m n / (sqrt(m) + sqrt(n))^2 for random numbers.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>

#include "audit/measures/measure.h"
#include "audit/measures/router_inputs.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"weights.stable_ranks"};
constexpr std::array<std::string_view, 1> kWants = {"weights.scan"};

// A block of at most kRows evenly spaced rows, and of kSegments evenly spaced runs of kRun columns. A matrix of rank r
// has no block of a higher rank, so what is collapsed as a whole shows in it; and experts are compared in the same
// block.
constexpr std::int64_t kRows = 256, kSegments = 4, kRun = 64;
constexpr int kIterations = 24;
constexpr double kSettled = 1e-3;  // relative growth of the estimate at which the iteration ends
// So many matrices, or evenly spaced layers that have about so many: about 1 ms each on one core.
constexpr std::size_t kMatrices = 20'000, kMatricesUnasked = 500;

std::vector<std::int64_t> chosen_columns(std::int64_t columns) {
  std::vector<std::int64_t> chosen;
  if (columns <= kSegments * kRun) {
    for (std::int64_t c = 0; c < columns; ++c) chosen.push_back(c);
    return chosen;
  }
  for (std::int64_t s = 0; s < kSegments; ++s) {
    const std::int64_t from = s * (columns - kRun) / (kSegments - 1);
    for (std::int64_t c = from; c < from + kRun; ++c) chosen.push_back(c);
  }
  return chosen;
}

/// Row-major block of the matrix that begins at `first`; empty if it cannot be decoded.
std::vector<double> read_block(const TensorView& t, std::int64_t first, std::int64_t rows, std::int64_t columns,
                               std::int64_t taken) {
  const std::vector<std::int64_t> chosen = chosen_columns(columns);
  std::vector<double> block(static_cast<std::size_t>(taken) * chosen.size());
  double* out = block.data();
  for (std::int64_t r = 0; r < taken; ++r) {
    const std::int64_t row = first + r * rows / taken * columns;
    for (std::size_t c = 0; c < chosen.size();) {
      std::size_t end = c + 1;
      while (end < chosen.size() && chosen[end] == chosen[end - 1] + 1) ++end;
      if (!decode(t, row + chosen[c], static_cast<std::int64_t>(end - c), out)) return {};
      out += end - c;
      c = end;
    }
  }
  return block;
}

/// In four accumulators, combined in this order: the same bits everywhere.
double dot(const double* a, const double* b, std::size_t n) {
  double s[4] = {};
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (std::size_t j = 0; j < 4; ++j) s[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) s[0] += a[i] * b[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

/// Power iteration on W^T W from a fixed start. The estimate of the largest squared singular value grows towards it and
/// never passes it (but for rounding), so the stable rank is never too small. Expected shortfall from a random start:
/// at most 0.871 ln(n) / (iterations - 1) of the value (Kuczynski, Wozniakowski 1992); where one direction dominates,
/// which is what is looked for, it shrinks geometrically.
double stable_rank(const std::vector<double>& w, std::size_t rows) {
  const std::size_t n = w.size() / rows;
  double total = 0;
  for (std::size_t r = 0; r < rows; ++r) total += dot(&w[r * n], &w[r * n], n);
  if (!(total > 0) || !std::isfinite(total)) return 0;
  std::vector<double> v(n), next(n);
  std::uint64_t state = 0x9e3779b97f4a7c15;
  for (double& x : v) {  // splitmix64, to (-0.5, 0.5)
    std::uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    x = static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53 - 0.5;
  }
  double largest = 0;
  for (int k = 0; k < kIterations; ++k) {
    const double length = std::sqrt(dot(v.data(), v.data(), n));
    if (!(length > 0)) break;
    for (double& x : v) x /= length;
    std::fill(next.begin(), next.end(), 0.0);
    double value = 0;  // |W v|^2
    for (std::size_t r = 0; r < rows; ++r) {
      const double y = dot(&w[r * n], v.data(), n);
      value += y * y;
      for (std::size_t c = 0; c < n; ++c) next[c] += y * w[r * n + c];
    }
    const bool settled = value <= largest * (1 + kSettled);
    largest = std::max(largest, value);
    if (settled) break;
    v.swap(next);
  }
  return largest > 0 ? total / largest : 0;
}

bool is_float(DType d) { return d == DType::kF64 || d == DType::kF32 || d == DType::kBF16 || d == DType::kF16; }

/// Matrices of routed experts, of all layers, or of evenly spaced ones if there are too many.
std::vector<std::size_t> choose(const WeightScan& scan, std::size_t most, std::size_t* layers, std::size_t* of) {
  std::map<int, std::vector<std::size_t>> by_layer;
  std::size_t count = 0;
  for (std::size_t i = 0; i < scan.tensor.size(); ++i) {
    const bool matrix = scan.columns[i] > 0 && scan.elements[i] > scan.columns[i] && is_float(scan.dtype[i]);
    if (scan.part[i] != Part::kRoutedExpert || scan.expert[i] < 0 || !matrix) continue;
    if (scan.non_finite[i] > 0 || scan.zeros[i] == scan.elements[i]) continue;
    by_layer[scan.layer[i]].push_back(i);
    ++count;
  }
  *of = by_layer.size();
  *layers = count <= most ? *of : std::max<std::size_t>(1, *of * most / count);
  std::vector<std::size_t> chosen;
  std::size_t n = 0;
  for (const auto& [layer, units] : by_layer) {
    // Layer n is taken if a multiple of of/layers falls on it.
    if (n * *layers / *of != (n + 1) * *layers / *of) chosen.insert(chosen.end(), units.begin(), units.end());
    ++n;
  }
  return chosen;
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (!f.weight_scan.known()) {
    f.stable_ranks.explain_unknown(f.weight_scan.why_unknown());
    return;
  }
  const WeightScan& scan = f.weight_scan.value();
  std::size_t layers = 0, of = 0;
  const std::vector<std::size_t> units = choose(scan, context.full ? kMatrices : kMatricesUnasked, &layers, &of);
  std::vector<double> ranks(units.size());
  std::vector<std::int64_t> rows(units.size()), columns(units.size());
  parallel_for(context.threads, static_cast<std::int64_t>(units.size()), [&](std::int64_t k, int) {
    const std::size_t at = static_cast<std::size_t>(k), i = units[at];
    const TensorView* t = context.model.find(scan.tensor[i]);
    if (!t) return;
    rows[at] = std::min(kRows, scan.elements[i] / scan.columns[i]);
    const std::vector<double> block =
        read_block(*t, scan.first[i], scan.elements[i] / scan.columns[i], scan.columns[i], rows[at]);
    if (block.empty()) return;
    columns[at] = static_cast<std::int64_t>(block.size()) / rows[at];
    ranks[at] = stable_rank(block, static_cast<std::size_t>(rows[at]));
  });
  StableRanks out;
  for (std::size_t k = 0; k < units.size(); ++k) {
    if (!(ranks[k] > 0)) continue;
    const std::size_t i = units[k];
    out.layer.push_back(scan.layer[i]);
    out.expert.push_back(scan.expert[i]);
    out.tensor.push_back(scan.tensor[i]);
    out.file.push_back(scan.file[i]);
    out.projection.push_back(scan.projection[i]);
    out.rows.push_back(rows[k]);
    out.columns.push_back(columns[k]);
    out.stable_rank.push_back(ranks[k]);
  }
  context.records.push_back({"stable_ranks", "host float64",
                             std::to_string(out.layer.size()) + " matrices of experts in " + std::to_string(layers) +
                                 " of " + std::to_string(of) + " layers"});
  f.stable_ranks.set(std::move(out), Origin::kMeasured, f.weight_scan.source());
}

}  // namespace

extern const Measure measure_stable_ranks;
const Measure measure_stable_ranks = {.name = "stable_ranks", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit
