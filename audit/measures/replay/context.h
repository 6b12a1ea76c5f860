// What the parts of a trace's replay share: the rows that they fill, the conventions, and reading the trace.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/replay.h"
#include "audit/families/family.h"
#include "audit/tensors/tensor_store.h"
#include "audit/traces/trace.h"
#include "audit/variants/forms.h"
#include "audit/variants/naming.h"

namespace moeaudit::replay {

namespace k = kernels;
namespace v = variants;
using k::Float;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kTellsNothing = 0.5;  // relative: a band from here on hides what it should show
constexpr std::int32_t kNoSuchExpert = -2;  // an id of E or more; -1: no choice
constexpr double kInf = std::numeric_limits<double>::infinity();

Float float_of(DType d);
double unit(Float f);

/// Relative error of a framework's float32 reduction of n terms: blocks and trees on every backend, so no term goes
/// through more than 128 + log2 n additions (torch's cascade_sum: 4 levels of at most n^(1/4) terms).
double reduction(double n);

struct Place {
  std::int64_t step = -1, micro_batch = -1, rank = -1;
  std::string file;
  int line = 0;
};

/// One row of the table while it grows.
struct Row {
  std::string quantity, held_to, missing;
  int layer = -1;
  std::int64_t compared = 0, differing = 0;
  double recorded = kNan, expected = kNan, band = kNan, distance = 0;
  Place place;
  v::Name name;
  std::vector<double> all_recorded, all_expected, all_band;  // relative bands; of the observations that names must fit

  /// `band`: absolute. Returns whether it lies outside.
  bool add(double got, double want, double by, const Place& where);
  void observe(double got, double want, double relative, const Place& where);
};

/// Loads of one layer in one micro-batch on one rank.
struct Loads {
  std::vector<std::int64_t> valid, all, kept;  // [experts]: of tokens that are not padding, of all, after drops
  std::int64_t tokens = 0;                     // not padding
};
using StepLoads = std::map<std::pair<std::int64_t, std::int64_t>, Loads>;  // by micro-batch and rank
void add(const Loads& more, Loads* sum);

/// What the layers of a micro-batch share.
struct Shared {
  std::vector<std::uint8_t> valid;
  std::int64_t sequences = 1;
};

class Context {
 public:
  Context(const Trace& trace, std::vector<WeightProblem>* problems);

  // Of the following, row(), read_layer() and count_loads() may be called for several layers at a time.

  /// Rows come out in the order of the report: by quantity, then by layer. A reference stays good.
  Row& row(std::string_view quantity, int layer = -1);
  Row* find(std::string_view quantity);  // of the whole model; nullptr: there is none
  std::vector<Row*> layers_of(std::string_view quantity);
  ReplayTable table();  // of all rows, which are gone then

  static bool trains(const MicroBatchRecord& m) { return m.training.value_or(true); }
  Place place_of(const MicroBatchRecord& m) const;
  Place place_of(const StepRecord& s) const;

  /// False, with a problem where the trace is at fault: this layer cannot be replayed.
  bool read_layer(const MicroBatchRecord& m, const Shared& shared, const LayerTensors& t, v::RoutedLayer* l);
  Shared shared_of(const MicroBatch& mb) const;
  /// Of the rows that a layer's router saw.
  static Shared seen_of(const Shared& all, const LayerTensors& t);

  /// Numbers that a bug could multiply by: of a gradient's weight, or of a loss.
  std::vector<v::Symbol> symbols(bool of_gradient) const;

  k::Backend* backend = &k::on_host();
  const Trace& trace;
  const TraceFacts& facts;
  std::vector<WeightProblem>* const problems;
  std::optional<Routing> routing;  // as the family routes; nullopt: why_not_routed
  std::string why_not_routed;
  std::string may_be_zero;  // why the router's gradient may be, or nobody knows whether; "": it may not
  bool masks_with_zero = false;  // groups that are not chosen, by the family's order: whatever wins against 0 is right
  v::BalanceFamily balance = v::BalanceFamily::kPerLayer;  // what this framework means by its balance loss
  bool balance_known = false;                              // else: what it is first compared with
  std::string_view counted_twice;                          // modules whose routers are in it twice; "": none
  std::int64_t accumulation = 0;            // M: micro-batches of one step on one rank

  // Of the step at hand.
  void begin_step(std::int64_t number);
  std::int64_t step = -1;
  std::map<std::pair<std::int64_t, int>, std::vector<double>> biases;  // before it, by rank and layer
  std::map<int, StepLoads> loads;                                      // by layer
  std::map<int, StepLoads> evaluation, evaluation_before;              // of what does not train; of the step before
  std::map<int, StepLoads> earlier;  // of the steps before, summed under micro-batch 0
  void count_loads(const MicroBatchRecord& m, const Shared& shared, const LayerTensors& t);
  const Loads* loads_of(const MicroBatchRecord& m, int layer);  // nullptr: not counted
  /// The routers' weights before the step, or after it; nullptr: not recorded.
  const TensorView* router_weight(const MicroBatchRecord& m, int layer, bool after) const;
  std::map<std::pair<std::int64_t, int>, TensorView> weights, weights_after;  // by rank and layer

 private:
  void fault(const MicroBatchRecord& m, const TensorView& view, const char* what);
  std::string records_file(std::int64_t rank) const;

  std::mutex mutex_;  // of rows_, loads and problems while layers run side by side
  std::string folder_;
  std::set<std::int64_t> ranks_;
  std::map<std::pair<int, int>, Row> rows_;  // by place in the report, and layer
};

}  // namespace moeaudit::replay
