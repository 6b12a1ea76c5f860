#include "audit/measures/placement.h"

#include <algorithm>
#include <cmath>

#include "kernels/host/routing_metrics.h"

namespace moeaudit {
namespace {

/// Contiguous runs of one size, or the map's row of this layer; nullptr with a problem if there is none that fits.
class Rows {
 public:
  Rows(const std::vector<LayerHealth>& layers, const PlacementOptions& options, std::vector<InputProblem>* problems)
      : layers_(layers), options_(options), problems_(problems) {}

  const ExpertMap::Row* of(std::size_t index) {
    const LayerHealth& l = layers_[index];
    return options_.map ? of_map(index, l) : contiguous(l);
  }

 private:
  std::nullptr_t refuse(int line, std::string what, std::string remedy) {
    problems_->push_back(
        {options_.map ? options_.map->path : "--expert-parallel", line, 0, std::move(what), std::move(remedy)});
    return nullptr;
  }

  const ExpertMap::Row* contiguous(const LayerHealth& l) {
    const std::int64_t ranks = options_.ranks;
    if (l.experts % ranks != 0) {
      return refuse(0,
                    "the " + std::to_string(l.experts) + " experts of layer " + std::to_string(l.layer) +
                        " do not divide into " + std::to_string(ranks) + " runs of one size",
                    "give a divisor of " + std::to_string(l.experts) + ", or where the experts lie with --expert-map FILE");
    }
    runs_ = {};
    for (std::int64_t e = 0; e < l.experts; ++e) {
      runs_.expert.push_back(static_cast<std::int32_t>(e));
      runs_.rank.push_back(static_cast<std::int32_t>(e / (l.experts / ranks)));
    }
    return &runs_;
  }

  /// One row serves all layers; as many rows as measured layers are theirs in order; more are of all layers of the model.
  const ExpertMap::Row* of_map(std::size_t index, const LayerHealth& l) {
    const auto& rows = options_.map->rows;
    const std::size_t at = rows.size() == 1                ? 0
                           : rows.size() == layers_.size() ? index
                                                           : static_cast<std::size_t>(l.layer);
    if (at >= rows.size()) {
      return refuse(0,
                    "has " + std::to_string(rows.size()) + " layers; " + std::to_string(layers_.size()) +
                        " were measured, among them layer " + std::to_string(l.layer),
                    "give one list for all, one for each measured layer, or one for each layer of the model");
    }
    const ExpertMap::Row& row = rows[at];
    std::vector<char> there(static_cast<std::size_t>(l.experts));
    for (const std::int32_t e : row.expert) {
      if (e >= l.experts) {
        return refuse(row.line,
                      "names expert " + std::to_string(e) + "; layer " + std::to_string(l.layer) + " has " +
                          std::to_string(l.experts),
                      "give the map of this model");
      }
      there[static_cast<std::size_t>(e)] = 1;
    }
    const auto missing = std::find(there.begin(), there.end(), 0);
    if (missing != there.end()) {
      return refuse(row.line,
                    "puts expert " + std::to_string(missing - there.begin()) + " of layer " + std::to_string(l.layer) +
                        " on no rank",
                    "give the map of this model");
    }
    return &row;
  }

  const std::vector<LayerHealth>& layers_;
  const PlacementOptions& options_;
  std::vector<InputProblem>* problems_;
  ExpertMap::Row runs_;
};

/// Share of the choices whose expert is on another rank than the token. Where the tokens' ranks are not known they are
/// taken for evenly spread, and then 1 - 1 / ranks leave, wherever the experts are.
double leaving(const LayerHealth& l, const ExpertMap::Row& row, std::int64_t ranks) {
  if (l.load_by_source.empty()) return 1 - 1 / static_cast<double>(ranks);
  std::vector<double> copies(static_cast<std::size_t>(l.experts));
  for (const std::int32_t e : row.expert) ++copies[static_cast<std::size_t>(e)];
  double staying = 0;
  for (std::size_t i = 0; i < row.expert.size(); ++i) {
    const auto e = static_cast<std::size_t>(row.expert[i]);
    staying += static_cast<double>(l.load_by_source[static_cast<std::size_t>(row.rank[i]) * copies.size() + e]) / copies[e];
  }
  return 1 - staying / static_cast<double>(l.choices);
}

}  // namespace

PlacementForecast forecast_placement(const std::vector<LayerHealth>& layers, const PlacementOptions& options,
                                     std::vector<InputProblem>* problems) {
  PlacementForecast out;
  out.ranks = options.size();
  out.map = options.map ? options.map->path : "contiguous runs";
  out.speeds = options.speeds;
  out.hidden_size = options.hidden_size;
  out.bytes_per_value = options.bytes_per_value;
  if (!options.speeds.empty() && static_cast<std::int64_t>(options.speeds.size()) != out.ranks) {
    problems->push_back({"--device-speeds", 0, 0,
                         std::to_string(options.speeds.size()) + " speeds for " + std::to_string(out.ranks) + " ranks",
                         "give one for each rank"});
    return out;
  }
  Rows rows(layers, options, problems);
  double slowest = 0, ideal = 0, bytes = 0, bytes_per_token = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerHealth& l = layers[i];
    if (l.choices == 0) continue;
    const ExpertMap::Row* row = rows.of(i);
    if (!row) return out.layers.clear(), out;
    kernels::PlacementArgs a;
    a.counts = l.load.data(), a.experts = l.experts, a.ranks = out.ranks, a.tokens = l.tokens;
    a.slot_expert = row->expert.data(), a.slot_rank = row->rank.data();
    a.slots = static_cast<std::int64_t>(row->expert.size());
    a.speed = options.speeds.empty() ? nullptr : options.speeds.data();
    a.top_k = std::max<std::int64_t>(l.top_k, 1);
    PlacementLayer layer;
    layer.layer = l.layer;
    layer.load.resize(static_cast<std::size_t>(out.ranks));
    kernels::Placement p;
    if (kernels::placement_load(a, layer.load.data(), &p) != kernels::Status::kOk) return out.layers.clear(), out;
    const double mean = static_cast<double>(l.choices) / static_cast<double>(out.ranks);
    for (double& load : layer.load) load /= mean;
    layer.slowest_rank = p.slowest_rank;
    layer.max_over_mean = p.max_over_mean;
    layer.even_router = p.even_router;
    layer.leaving = leaving(l, *row, out.ranks);
    out.recorded_sources = !l.load_by_source.empty();
    if (options.hidden_size > 0) {
      layer.bytes = 2.0 * layer.leaving * static_cast<double>(l.choices) * static_cast<double>(options.hidden_size) *
                    options.bytes_per_value;
      if (l.tokens > 0) layer.bytes_per_token = layer.bytes / static_cast<double>(l.tokens);
    }
    slowest += p.slowest, ideal += p.ideal, bytes += layer.bytes, bytes_per_token += layer.bytes_per_token;
    if (!(layer.max_over_mean <= out.worst)) {
      out.worst = layer.max_over_mean;
      out.worst_layer = l.layer;
    }
    out.layers.push_back(std::move(layer));
  }
  if (out.layers.empty()) return out;
  out.straggler_factor = slowest / ideal;
  out.bytes = bytes;
  out.bytes_per_token = bytes_per_token;
  return out;
}

}  // namespace moeaudit
