#include "audit/measures/replay/gradients.h"

#include <algorithm>
#include <cmath>

namespace moeaudit::replay {

void replay_gradients(Context* ctx, const StepTensors& tensors) {
  for (const StepLayerTensors& t : tensors.layers) {
    const TraceLayer* stated = ctx->facts.layer(t.layer);
    if (stated && stated->trainable && !*stated->trainable) continue;
    const auto largest = [&](const TensorView& g) {
      std::int64_t n = 1;
      for (const std::int64_t d : g.shape) n *= d;
      std::vector<double> values(static_cast<std::size_t>(n));
      double most = 0;
      if (!read_values(g, 0, n, values.data())) return kNan;
      for (const double x : values) most = std::max(most, std::fabs(x));
      return most;
    };
    const auto judge = [&](std::string_view quantity, const TensorView& g) {
      const double most = largest(g);
      if (std::isnan(most)) return;
      Row& r = ctx->row(quantity, t.layer);
      ++r.compared;
      r.held_to = "a gradient that is not zero";
      r.differing += most == 0.0;
      if (r.compared == 1 || most == 0.0) r.place = ctx->place_of(*tensors.record);
      r.recorded = r.compared == 1 ? most : std::min(r.recorded, most);
    };
    if (t.router_grad) judge("router_grad", *t.router_grad);
    if (t.router_grad_ce) judge("router_grad_ce", *t.router_grad_ce);
  }
}

}  // namespace moeaudit::replay
