// What `moe-audit health` reports. Types only; audit/measures/expert_health.cc fills them, docs/health.md defines every
// number.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/facts/values.h"

namespace moeaudit {

/// One number, and what to hold beside it. NaN: there is no such thing, or it was not measured.
struct HealthMetric {
  static constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  std::string name;        // "max_violation_pooled": the scope is in the name
  double value = kNone;
  double chance = kNone;   // of a router that spreads tokens at random, with tokens without end
  double floor = kNone;    // what independent tokens of such a router show in so few tokens
  double low = kNone, high = kNone;  // 95 % interval
  std::string cannot_tell;  // why the value must not be judged; empty: it may
};

/// Two experts that are chosen together. lift: how often, relative to independent choices at the same loads.
struct CoActivation {
  int first = 0, second = 0;
  std::int64_t together = 0;
  double lift = 0;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("first", s.first);
    f("second", s.second);
    f("together", s.together);
    f("lift", s.lift);
  }
};

struct LayerHealth {
  int layer = 0;
  std::string module;
  std::int64_t experts = 0, top_k = 0;  // top_k 0: unknown
  std::int64_t tokens = 0;              // without padding; 0: not known, counts without k
  std::int64_t choices = 0;             // that are an expert
  std::int64_t blocks = 0;              // that the intervals were drawn from
  std::string choices_from;             // "selected_experts", "tokens_per_expert", "top k of the logits"
  std::vector<HealthMetric> metrics;    // in the order of docs/health.md
  // one value an expert
  std::vector<std::int64_t> load;       // n_e
  std::vector<double> utilisation;      // u_e = n_e / fair share
  std::vector<std::pair<double, double>> utilisation_interval;  // 95 %; empty without blocks enough
  std::vector<double> importance;       // router probability of e over all tokens / fair share; empty without logits
  std::vector<double> gate_mass;        // routing weight that e got / fair share; empty without weights
  std::vector<std::int64_t> dropped;    // choices of e that were dropped; empty where drops are not recorded
  std::vector<CoActivation> together;   // the pairs of the largest lift
  double lift_chance = 0;               // lift of k different experts chosen at random
  std::vector<std::int64_t> co_activation;  // [E, E]; the diagonal is n_e; only where asked for
  std::vector<std::int64_t> load_by_source;  // [R, E] by the rank of the token in its group of R; for the forecast alone

  const HealthMetric* find(std::string_view name) const {
    for (const HealthMetric& m : metrics) {
      if (m.name == name) return &m;
    }
    return nullptr;
  }
};

/// One metric over the layers, those that may be judged. Percentiles are nearest ranks.
struct AcrossLayers {
  std::string name;
  std::int64_t layers = 0;
  double mean = 0, p50 = 0, p75 = 0, p90 = 0, p95 = 0, worst = 0;
  int worst_layer = -1;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("name", s.name);
    f("layers", s.layers);
    f("mean", s.mean);
    f("p50", s.p50);
    f("p75", s.p75);
    f("p90", s.p90);
    f("p95", s.p95);
    f("worst", s.worst);
    f("worst_layer", s.worst_layer);
  }
};

/// One layer on expert-parallel ranks.
struct PlacementLayer {
  int layer = 0;
  std::int64_t slowest_rank = -1;
  double max_over_mean = HealthMetric::kNone;    // time of the slowest rank / time if work were divided as the speeds are
  double even_router = HealthMetric::kNone;      // the same of an even router on these ranks, in so few tokens
  double leaving = HealthMetric::kNone;          // share of the choices whose expert is on another rank than the token
  double bytes_per_token = HealthMetric::kNone;  // to other ranks and back
  double bytes = HealthMetric::kNone;            // of all measured tokens
  std::vector<double> load;                      // choices of each rank / their mean

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("slowest_rank", s.slowest_rank);
    f("max_over_mean", s.max_over_mean);
    f("even_router", s.even_router);
    f("leaving", s.leaving);
    f("bytes_per_token", s.bytes_per_token);
    f("bytes", s.bytes);
    f("load", s.load);
  }
};

/// Measured loads on expert-parallel ranks. NaN and no layers: they could not be placed, and a problem says why.
struct PlacementForecast {
  std::int64_t ranks = 0;  // 0: not asked for
  std::string map;         // "contiguous runs", or the file
  std::vector<double> speeds;     // empty: all alike
  bool recorded_sources = false;  // the trace has tokens of each rank; else they are taken for evenly spread
  std::int64_t hidden_size = 0, bytes_per_value = 0;  // hidden_size 0: not known, and no bytes
  double straggler_factor = HealthMetric::kNone;  // sum over layers of the slowest rank's time / of the ideal time
  double worst = HealthMetric::kNone;             // largest max_over_mean
  int worst_layer = -1;
  double bytes_per_token = HealthMetric::kNone, bytes = HealthMetric::kNone;  // of all layers
  std::vector<PlacementLayer> layers;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("ranks", s.ranks);
    f("map", s.map);
    f("speeds", s.speeds);
    f("recorded_sources", s.recorded_sources);
    f("hidden_size", s.hidden_size);
    f("bytes_per_value", s.bytes_per_value);
    f("straggler_factor", s.straggler_factor);
    f("worst", s.worst);
    f("worst_layer", s.worst_layer);
    f("bytes_per_token", s.bytes_per_token);
    f("bytes", s.bytes);
    f("layers", s.layers);
  }
};

struct HealthReport {
  std::string path, format, recorder;
  std::string model;                  // class or type of the model; empty if unknown
  std::string score, score_from;      // "softmax"; "family", "given", "assumed"
  std::string note;                   // what was supposed
  std::string compared_with;          // the other trace, if one was given
  std::string backend, warning;       // "host avx2"; a device that failed, and what was done instead
  std::int64_t steps = 0, micro_batches = 0, ranks = 0;
  std::vector<LayerHealth> layers;
  std::vector<AcrossLayers> across;
  PlacementForecast placement;
  std::vector<InputProblem> problems;         // of trace.json and records
  std::vector<WeightProblem> weight_problems;  // of tensors
};

}  // namespace moeaudit
