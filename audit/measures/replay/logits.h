// Router logits recomputed from the router's input and weight.
#pragma once

#include <map>
#include <mutex>
#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class Logits {
 public:
  explicit Logits(Context* ctx) : ctx_(*ctx) {}

  /// Fills the rows logits (in training) and evaluation_logits of the layer.
  void add(const MicroBatch& mb, const LayerTensors& t);
  void finish();  // names what differs

 private:
  /// Residuals r of one row, and a = the length of the vector of products x_i w_i behind each.
  struct Residuals {
    double n = 0, r = 0, r2 = 0, ratio2 = 0, log_a = 0;
    std::map<Float, double> narrow;  // the largest distance, in bands, of logits computed in a narrower dtype
  };

  Residuals& residuals(bool training, int layer) {
    const std::scoped_lock lock(mutex_);
    return residuals_[{training, layer}];
  }

  Context& ctx_;
  std::mutex mutex_;  // layers run side by side, each with residuals of its own
  std::map<std::pair<bool, int>, Residuals> residuals_;  // by training, and layer
};

/// hidden_states x router_weight of the layer, and how far the framework's arithmetic may be off each; false, with why
/// not, where the trace lacks one of them or the product is not what this router computes.
struct Recomputed {
  std::vector<double> logits, band;
  std::vector<double> length;            // root of the sum of the squares of the products
  std::vector<float> x;                  // [tokens, hidden]
  std::vector<float> w;                  // [experts, hidden]
  std::int64_t hidden = 0;
  Float stated = Float::kF32;            // the dtype that the framework computes them in
};
bool recompute_logits(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, bool after_the_step,
                      Recomputed* out, std::string* why);

}  // namespace moeaudit::replay
