// The balance loss and the z-loss that the model reported.
#pragma once

#include <optional>
#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class BalanceLosses {
 public:
  explicit BalanceLosses(Context* ctx) : ctx_(*ctx) {}

  /// What one layer adds.
  struct LayerSums {
    v::BalanceSum loss, up, down;
    double z = 0, z_error = 0, range = 0;
    Float dtype = Float::kF32;
    std::int64_t experts = 1;
  };

  /// One micro-batch.
  class Sums {
   public:
    Sums(BalanceLosses* of, const MicroBatch& mb);
    LayerSums of(const v::RoutedLayer& l) const;         // layers may run side by side
    LayerSums of_nothing() const;                        // a router that saw no token
    void add(const std::optional<LayerSums>& of_layer);  // in the order of the layers; nothing: it could not be read
    void finish();                                       // into the rows aux_loss and z_loss

   private:
    void finish_aux();
    void finish_z();

    BalanceLosses& of_;
    const MicroBatchRecord& m_;
    double layers_;
    LayerSums sum_;
    bool all_;
  };

  void name();  // second pass over a few micro-batches, with every form

 private:
  v::BalanceForm right() const { return v::held_to(ctx_.balance); }
  void load_step(std::int64_t step);
  void add_loads(const MicroBatchRecord& m, int layer, v::RoutedLayer* l) const;
  void name_aux(Row* r);
  void name_z(Row* r);

  Context& ctx_;
  double moved_ = 0;
  std::vector<const MicroBatchRecord*> balance_seen_, z_seen_;
};

}  // namespace moeaudit::replay
