// Gradients of the routers: whether there is one, whether it is the balance loss's alone, and how large the balance
// loss's part of it is.
#pragma once

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class Gradients {
 public:
  explicit Gradients(Context* ctx) : ctx_(*ctx) {}

  void read(const StepTensors& tensors);                 // into router_grad and router_grad_ce
  void add(const MicroBatch& mb, const Shared& shared);  // into router_grad_ce, from the logits' gradient
  void step(const std::vector<StepTensors>& of_ranks);   // into router_grad_aux; starts the next step
  void finish();                                         // once all steps are in

 private:
  /// The balance loss's part of one step by the logits and hidden states, of one rank.
  struct Part {
    std::vector<double> gradient, absolute;  // [E, d]; absolute: of the terms' sizes, for the band
    std::int64_t hidden = 0, micro_batches = 0;
    Float dtype = Float::kF32;  // the narrowest of its inputs
    double tokens = 0;
  };

  void split(const MicroBatchRecord& m, const LayerTensors& t, const std::vector<double>& of_balance, const std::vector<double>& band);
  void sum(const MicroBatchRecord& m, const LayerTensors& t, const std::vector<double>& of_balance);

  Context& ctx_;
  std::set<int> wanted_;                                // layers whose router_grad_aux was recorded in this step
  std::map<std::pair<std::int64_t, int>, Part> parts_;  // by rank and layer
  std::size_t split_ = 0;
};

}  // namespace moeaudit::replay
