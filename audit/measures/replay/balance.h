// The balance loss and the z-loss that the model reported.
#pragma once

#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class BalanceLosses {
 public:
  explicit BalanceLosses(Context* ctx) : ctx_(*ctx) {}

  /// One micro-batch, a layer at a time.
  class Sums {
   public:
    Sums(BalanceLosses* of, const MicroBatch& mb);
    void add(const v::RoutedLayer& l);
    void incomplete() { all_ = false; }  // a layer could not be read
    void finish();                       // into the rows aux_loss and z_loss

   private:
    void finish_aux();
    void finish_z();

    BalanceLosses& of_;
    const MicroBatchRecord& m_;
    double layers_;
    v::BalanceSum loss_, up_, down_;
    double z_ = 0, z_error_ = 0, range_ = 0;
    bool all_;
    Float dtype_ = Float::kF32;
    std::int64_t experts_ = 1;
  };

  void name();  // second pass over a few micro-batches, with every form

 private:
  v::BalanceForm right() const { return v::held_to(ctx_.balance.value_or(v::BalanceFamily::kPerLayer)); }
  void load_step(std::int64_t step);
  void add_loads(const MicroBatchRecord& m, int layer, v::RoutedLayer* l) const;
  void name_aux(Row* r);
  void name_z(Row* r);

  Context& ctx_;
  double moved_ = 0;
  std::vector<const MicroBatchRecord*> balance_seen_, z_seen_;
};

}  // namespace moeaudit::replay
