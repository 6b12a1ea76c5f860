// What a replay of a trace found. Types only; audit/measures/replay fills them, docs/replay.md says what each quantity
// is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moeaudit {

/// One row a quantity, and where it has layers one a layer: what was recorded against what the reference computes from
/// the same trace.
struct ReplayTable {
  std::vector<std::string> quantity;              // "aux_loss"; the names are those of docs/replay.md
  std::vector<int> layer;                         // -1: of the whole model
  std::vector<std::int64_t> compared, differing;  // numbers compared, and how many of them lie outside their band
  std::vector<double> recorded, expected;         // of the one that lies farthest outside
  std::vector<double> band;  // how far rounding alone can carry it: inputs moved by one rounding of their dtype, and
                             // the arithmetic of the framework
  std::vector<double> distance;                       // |recorded - expected| / band
  std::vector<std::int64_t> step, micro_batch, rank;  // where that one is; -1: of all
  std::vector<std::string> held_to;                   // the formula behind `expected`
  std::vector<std::string> formula, name;             // what was computed, by the catalogue: "A8"; "" unknown
  std::vector<std::string> factor;                    // "M = 8"; "" 1
  std::vector<double> factor_value;
  std::vector<double> fit;             // how far that formula is from what was recorded, in bands
  std::vector<std::string> also;       // names that fit as well, and what would tell them apart
  std::vector<std::string> runner_up;  // the best of those that do not fit
  std::vector<double> runner_up_fit;
  std::vector<std::string> missing;  // not compared (compared = 0): what the trace lacks
  std::vector<std::string> file;     // of the record that says it
  std::vector<int> line;

  // Of the trace as a whole.
  std::string path, framework, trainer, model_type, model_class;
  std::string packages;              // "torch 2.13.0, transformers 4.57.6"
  std::string output_router_logits;  // "true", "false"; "" not known
  double aux_coefficient = 0;        // NaN: not known
  std::int64_t steps = 0, micro_batches = 0, ranks = 0;
  std::int64_t accumulation = 0;  // M: micro-batches of one step on one rank

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("quantity", s.quantity);
    f("layer", s.layer);
    f("compared", s.compared);
    f("differing", s.differing);
    f("recorded", s.recorded);
    f("expected", s.expected);
    f("band", s.band);
    f("distance", s.distance);
    f("step", s.step);
    f("micro_batch", s.micro_batch);
    f("rank", s.rank);
    f("held_to", s.held_to);
    f("formula", s.formula);
    f("name", s.name);
    f("factor", s.factor);
    f("factor_value", s.factor_value);
    f("fit", s.fit);
    f("also", s.also);
    f("runner_up", s.runner_up);
    f("runner_up_fit", s.runner_up_fit);
    f("missing", s.missing);
    f("file", s.file);
    f("line", s.line);
    f("path", s.path);
    f("framework", s.framework);
    f("trainer", s.trainer);
    f("model_type", s.model_type);
    f("model_class", s.model_class);
    f("packages", s.packages);
    f("output_router_logits", s.output_router_logits);
    f("aux_coefficient", s.aux_coefficient);
    f("steps", s.steps);
    f("micro_batches", s.micro_batches);
    f("ranks", s.ranks);
    f("accumulation", s.accumulation);
  }
};

}  // namespace moeaudit
