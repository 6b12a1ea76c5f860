// The inputs x that routers are replayed on: a probe, or the user's hidden states.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "audit/facts/values.h"
#include "audit/tensors/tensor_store.h"
#include "kernels/host/low_precision.h"

namespace moeaudit {

/// Whole tensor as float32, or (returned) what is wrong with it: absent, another size, quantised, not finite.
std::string read_floats(const TensorStore& store, const std::string& name, std::int64_t count, std::vector<float>* out);

/// The router of a row of the table as [experts, hidden], whichever way round it is stored.
std::string read_gate(const TensorStore& store, const RouterTable& table, std::size_t row, const std::string& name, std::vector<float>* out);
/// A correction bias: [experts], or the first row of [n, experts], whose others are of other sets of experts.
std::string read_correction_bias(const TensorStore& store, const std::string& name, std::int64_t experts, std::vector<float>* out);

/// f(index, worker) for every index below count, on up to `threads` threads. Each index owns its results, so who
/// computed what does not show.
void parallel_for(int threads, std::int64_t count, const std::function<void(std::int64_t, int)>& f);

/// Probe: row t is a unit Gaussian row (kernels/host/gaussian.h, seed kProbeSeed, stream t), scaled to unit RMS; for a
/// layer it is multiplied by the weight of the RMSNorm in front of the MoE block. All layers share the rows. A probe
/// knows the router and the norm; it does not know what real tokens look like.
///
/// Hidden states: a safetensors file with one tensor [..., hidden] that all layers share, or one tensor a layer, named
/// "layer.N", "layers.N" or "model.layers.N", bare or followed by ".anything"; float64, float32, bfloat16 or float16.
/// With more rows than are wanted, evenly spaced rows are taken.
class RouterInputs {
 public:
  static constexpr std::uint64_t kProbeSeed = 20240607;

  /// No hidden states (an empty store): a probe. x is rounded once to `activations`.
  RouterInputs(const TensorStore& hidden_states, kernels::Float activations)
      : store_(hidden_states), activations_(activations) {}
  bool probe() const { return store_.empty(); }

  /// Makes the rows of the probe, unless they are there already.
  void make_probe(std::int64_t tokens, std::int64_t hidden, int threads);

  /// The hidden states for a layer; nullptr if there are none.
  const TensorView* tensor_of(int layer) const;
  /// Rows of such a tensor; 0 if it does not have this width or dtype.
  static std::int64_t rows_of(const TensorView& view, std::int64_t hidden);

  /// Rows first .. first + count of `of` wanted rows into x [count, hidden]: of the probe times `norm` [hidden], or,
  /// with a view, of the hidden states. Rows that are not finite are left out; returns how many were written.
  std::int64_t fill(const float* norm, const TensorView* view, std::int64_t hidden, std::int64_t first,
                    std::int64_t count, std::int64_t of, float* x) const;

 private:
  const TensorStore& store_;
  kernels::Float activations_;
  std::vector<float> rows_;
  std::int64_t probe_hidden_ = 0;
};

}  // namespace moeaudit
