// Replays one router on given inputs in several precisions and counts what changes against float64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/values.h"
#include "audit/tensors/tensor_store.h"
#include "kernels/backend.h"
#include "kernels/host/router.h"

namespace moeaudit {

/// Memory aligned to 64 bytes, as the kernels like it.
template <class T>
class Aligned {
 public:
  explicit Aligned(std::int64_t count = 0) : storage_(static_cast<std::size_t>(count) + 64 / sizeof(T)) {}
  T* data() const {
    const auto at = reinterpret_cast<std::uintptr_t>(storage_.data());
    return const_cast<T*>(storage_.data()) + ((at + 63) / 64 * 64 - at) / sizeof(T);
  }

 private:
  std::vector<T> storage_;
};

/// One router of a checkpoint. Vectors that the family does not have are empty.
struct Router {
  int layer = 0;
  std::string tensor;
  std::int64_t experts = 0;
  std::int64_t always = 0;  // rows of w behind those of the experts: experts that every token has
  std::int64_t hidden = 0;
  float global_scale = 1;
  std::vector<float> w, linear_bias, correction_bias, expert_scale, norm;
  std::int64_t rows() const { return experts + always; }
};

/// Logits of n tokens as the gate gives them, [n, rows], to [n, experts] in place and [n, always].
template <class T>
void split_rows(const Router& router, std::int64_t n, T* logits, T* of_always) {
  for (std::int64_t t = 0; router.always > 0 && t < n; ++t) {
    const T* row = logits + t * router.rows();
    std::copy(row + router.experts, row + router.rows(), of_always + t * router.always);
    std::copy(row, row + router.experts, logits + t * router.experts);
  }
}

/// "model.layers.{L}.gate" of layer 3: "model.layers.3.gate".
std::string with_layer(std::string pattern, int layer);
/// The tensor that stands to `router` as `pattern` stands to `weight` in the family; "" if their names do not say.
std::string beside(const std::string& router, std::string_view weight, std::string_view pattern);
/// Weight and biases of the router in a row of the table; its norm stays empty. Empty, or what is wrong with them.
std::string read_router(const TensorStore& model, const RouterTable& table, const Routing& routing, std::size_t row,
                        Router* out);

enum class Trip { kNone, kNf4, kInt8 };

struct Mode {
  std::string name;
  kernels::Float dtype = kernels::Float::kF32;   // of the gate matmul: its inputs and its output
  kernels::Float loaded = kernels::Float::kF64;  // dtype the weight is loaded in, before anything else; kF64: as stored
  Trip trip = Trip::kNone;
  std::vector<double> correction = {};  // not empty: everything as the truth, but for this correction bias
};

/// What one mode did, over some tokens. Counts and maxima: merged in any order they give the same.
struct Tally {
  std::int64_t flipped = 0, near_ties = 0, overflowed = 0;
  double weight_error = 0;
  void add(const Tally& o) {
    flipped += o.flipped;
    near_ties += o.near_ties;
    overflowed += o.overflowed;
    weight_error = std::max(weight_error, o.weight_error);
  }
};
struct TileTally {
  std::int64_t tokens = 0;
  double max_abs_logit = 0;
  std::vector<Tally> modes;
};

/// One thread's memory for one tile of up to `tile` tokens.
struct Scratch {
  static constexpr std::int64_t kTile = 48;  // on the host: their x fits the second-level cache
  Scratch(const Router& router, std::int64_t top_k, std::int64_t tile)
      : x(tile * router.hidden),
        rounded_x(tile * router.hidden),
        wide(tile * router.rows()),
        truth(tile * router.rows()),
        narrow(tile * router.rows()),
        wide_always(static_cast<std::size_t>(tile * router.always)),
        truth_always(wide_always.size()),
        narrow_always(wide_always.size()),
        choice(static_cast<std::size_t>(tile * router.experts)),
        weights(static_cast<std::size_t>(tile * top_k)),
        narrow_weights(static_cast<std::size_t>(tile * top_k)),
        mode_weights(static_cast<std::size_t>(tile * top_k)),
        chosen(static_cast<std::size_t>(tile * top_k)),
        mode_chosen(static_cast<std::size_t>(tile * top_k)),
        runner_up(static_cast<std::size_t>(tile)) {}
  Aligned<float> x, rounded_x;
  Aligned<double> wide, truth;
  Aligned<float> narrow;
  std::vector<double> wide_always, truth_always;
  std::vector<float> narrow_always;
  std::vector<double> choice, weights;
  std::vector<float> narrow_weights;
  std::vector<double> mode_weights;
  std::vector<std::int32_t> chosen, mode_chosen, runner_up;
};

/// A mode made ready for one router: weights in its dtype, packed.
struct ReadyMode {
  Mode mode;
  bool same_weights = false;  // as the truth has them: the logits can be rounded from the truth's
  Aligned<float> packed_float;
  Aligned<double> packed_wide;
  std::vector<float> bias_float;
  std::vector<double> bias_wide;
};

/// The kernels' arguments for a family's conventions; pointers and sizes other than experts and top_k are left open.
template <class T>
kernels::RouteArgs<T> route_args(const Routing& routing, std::int64_t experts, std::int64_t top_k);
/// The same of one router, with what its checkpoint adds: the scale of all weights, the number of experts that every
/// token has.
template <class T>
kernels::RouteArgs<T> route_args(const Routing& routing, const Router& router, std::int64_t top_k);

/// Backend::route(), or what SparseMixer picks and weighs at an evaluation, where the family has that; its logits are of `logits`.
template <class T>
kernels::Status route_by(kernels::Backend& backend, const Routing& routing, const kernels::RouteArgs<T>& args,
                         const kernels::RouteResult<T>& result, kernels::Float logits);

/// True if rounding to `dtype` leaves the router's weight and bias as they are.
bool survives(const Router& router, kernels::Float dtype);

/// All modes of one router. run() may be called from several threads at a time, each with its own Scratch.
class RouterReplay {
 public:
  /// `router` and `backend` must outlive the replay.
  RouterReplay(const Router& router, const Routing& routing, std::int64_t top_k, kernels::Float activations,
               const std::vector<Mode>& modes, kernels::Backend& backend);
  const std::vector<ReadyMode>& modes() const { return modes_; }
  /// The n tokens in s.x [n, hidden], already rounded to the dtype of the activations.
  void run(std::int64_t n, Scratch& s, TileTally* out) const;

 private:
  void mode_logits(const ReadyMode& ready, std::int64_t n, Scratch& s) const;
  void run_mode(const ReadyMode& ready, std::int64_t n, Scratch& s, Tally* tally) const;
  void run_correction(const ReadyMode& ready, std::int64_t n, Scratch& s, Tally* tally) const;
  void compare_token(std::int64_t t, Scratch& s, Tally* tally) const;
  bool near_tie(kernels::Float dtype, const double* logits, const double* choice, std::int32_t last,
                std::int32_t next) const;

  const Router& router_;
  kernels::Backend& backend_;
  Routing routing_;
  std::int64_t top_k_;
  kernels::Float activations_;
  Aligned<double> truth_w_;
  std::vector<double> truth_bias_, correction_wide_, scale_wide_;
  std::vector<ReadyMode> modes_;
};

}  // namespace moeaudit
