// Two models of one lineage, matrix by matrix, whatever the layout of their experts: one tensor an expert (transformers 4 and
// hub files) or one stack a layer (transformers 5 in memory).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/families/family.h"
#include "audit/tensors/tensor_store.h"
#include "kernels/host/low_precision.h"

namespace moeaudit {

/// A matrix inside a tensor: element (r, c) is at first + r * row_stride + c * column_stride.
struct Matrix {
  const TensorView* tensor = nullptr;
  std::int64_t first = 0, rows = 0, columns = 0, row_stride = 0, column_stride = 1;
  std::int64_t elements() const { return rows * columns; }
  bool contiguous() const { return column_stride == 1 && row_stride == columns; }
};
/// Rows [row, row + count) as double, row-major.
bool read_rows(const Matrix& m, std::int64_t row, std::int64_t count, double* out);

struct WeightUnit {
  std::string key;  // the same for the same matrix of the network in every layout
  NamedPart part;
  Matrix matrix;    // experts: [out, in]
};

/// Cuts tensors into units. A family that is stored one tensor an expert and held as stacks (its YAML has rows of both
/// kinds) gives gate, up and down matrices from either; gate_up_proj is gate above up (transformers
/// src/transformers/conversion_mapping.py, MergeModulelist(dim=0), Concatenate(dim=1)). Of other stacks each expert's slice
/// is one unit, as stored.
class UnitNames {
 public:
  /// `family` may be null; `experts` 0 if unknown.
  UnitNames(const Family* family, std::int64_t experts);
  /// False for a tensor whose elements cannot be addressed (no shape).
  bool cut(const TensorView& tensor, std::vector<WeightUnit>* out) const;
  /// Key of a tensor that is one unit.
  std::string key_of(std::string_view tensor) const;
  /// Keys of the matrices that stand above each other in one expert's slice of the stack `parameter`.
  std::vector<std::string> stack_keys(std::string_view parameter, int expert) const;
  NamedPart part_of(std::string_view tensor) const;
  /// A stack that one of the family's layouts stores [E, in, out] and the other [E, out, in], under one name.
  bool either_way_round(std::string_view stack) const;

 private:
  struct Place {
    NamedPart part;
    int layer_at = -1, expert_at = -1;  // which of the numbers in the name
  };
  std::string expert_key(const NamedPart& part, std::string_view role) const;
  std::string in_memory(std::string_view name) const;

  const Family* family_;
  std::int64_t experts_;
  bool second_set_ = false;   // experts_ and what numbers behind them are two sets
  bool two_layouts_ = false;
  std::vector<std::string> input_major_;  // leaves of stacks that are [E, in, out]
  std::vector<std::pair<std::string, std::string>> renamed_;  // endings of names: hub -> memory
  std::vector<std::pair<std::string, std::string>> fronts_;   // what stands before the layer's number, likewise
  mutable std::vector<std::pair<std::string, Place>> places_; // by pattern of the name, sorted
};

struct WeightPair {
  WeightUnit base, trained;
};

struct WeightPairs {
  std::vector<WeightPair> pairs;           // in the order of the trained model's files
  std::vector<std::string> only_base, only_trained;  // tensors
  std::vector<std::string> other_shape;    // tensors, with both shapes
};
WeightPairs pair_weights(const TensorStore& base, const TensorStore& trained, const UnitNames& names);

/// The dtype that a base value takes on when it is loaded as `trained`: nullopt where that changes nothing.
std::optional<kernels::Float> rounding(DType base, DType trained);

/// Floating point that decode() reads without scales.
bool is_plain_float(DType d);

struct PairSums {
  std::int64_t changed = 0;                // elements with another value; NaN equals NaN
  double base_squares = 0, change_squares = 0, dot = 0;  // over elements finite in both; dot = <W1 - W0, W0>
  bool read = true;
  void add(const PairSums& o);
};
/// One result per entry of `pairs`. The base is rounded as rounding() says, or to `through` if given. Sums run in a fixed order: the same for any number of threads.
std::vector<PairSums> compare(const std::vector<const WeightPair*>& pairs, int threads,
                              const std::function<void(double)>& progress,
                              std::optional<kernels::Float> through = {});

}  // namespace moeaudit
