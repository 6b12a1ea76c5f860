// How the cross-entropy and the balance loss entered what was back-propagated.
#pragma once

#include <map>
#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class StepLosses {
 public:
  explicit StepLosses(Context* ctx) : ctx_(*ctx) {}

  void add(const MicroBatch& mb);   // sums its token losses
  void add(const TraceStep& step);  // after its micro-batches
  void finish();                    // into the rows aux_in_loss, aux_weight and loss_weight

 private:
  /// What the model's loss divides its sum by: the count that the trainer handed over, or its own labels.
  enum class Divided { kItems, kLabels };
  struct TokenLoss {
    double sum = 0;
    std::int64_t labels = 0;
  };
  struct Step {
    std::vector<const MicroBatchRecord*> micro_batches;  // that train, ordered by micro-batch, then rank
    bool all_ranks = true;
  };

  double divisor(const MicroBatchRecord& m, Divided d) const;
  Row try_returned_loss(Divided d) const;
  void loss_weights(Divided d);
  void aux_weights();

  Context& ctx_;
  double loss_factor_ = 1;
  std::map<const MicroBatchRecord*, TokenLoss> token_losses_;
  std::vector<Step> steps_;
};

}  // namespace moeaudit::replay
