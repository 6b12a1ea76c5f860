// The correction bias: its step against the loads of the step, and whether it is kept between steps.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class Biases {
 public:
  explicit Biases(Context* ctx) : ctx_(*ctx) {}

  /// Biases before the step, into the context (routing needs them), and into the rows bias_kept.
  void read(const StepTensors& tensors);
  void step(const StepTensors& tensors);  // into the rows bias_step; the loads of the step are counted
  void finish();                          // once all steps are in

 private:
  struct Kept {
    std::int64_t step = 0;
    std::vector<double> before, after;
    Float stored = Float::kF32;
  };

  void keep(const StepRecord& s, int layer, const std::vector<double>& before, Float stored);
  void name(const StepRecord& s, int layer, const Kept& moved, double rate, bool still, Row* r);

  Context& ctx_;
  std::map<std::pair<std::int64_t, int>, Kept> last_;  // by rank and layer
  std::map<int, std::vector<v::Name>> fits_;           // by layer: every name that fits each of its steps that differ
};

}  // namespace moeaudit::replay
