#include "audit/measures/replay/weight_sums.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/host/bounds.h"
#include "kernels/host/elementary.h"

namespace moeaudit::replay {

void replay_weight_sums(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l) {
  // A softmax's chosen scores sum to k / E at least: no epsilon is as large.
  if (!ctx->routing || !ctx->routing->renormalise || !(ctx->routing->scaling > 0) || !t.routing_weights ||
      ctx->routing->renormalise_norm != 1 || ctx->routing->renormalise_floor > 0 || !ctx->routing->expert_scale_tensor.empty() || l.chosen.empty() || l.score == k::Score::kSoftmax)
    return;
  std::vector<double> weights(l.chosen.size());
  if (!read_values(*t.routing_weights, 0, l.tokens * l.top_k, weights.data())) return;
  Row& r = ctx->row("weight_sum", t.layer);
  r.held_to = "1: weights over their sum";
  // What the family's own epsilon takes from scores that sum to 1e-3 or more is no loss of weight.
  const double band = k::bounds::gamma(static_cast<double>(l.top_k) + 5, unit(float_of(t.routing_weights->dtype))) +
                      1e3 * ctx->routing->renormalise_eps;
  for (std::int64_t token = 0; token < l.tokens; ++token) {
    if (!l.valid.empty() && !l.valid[static_cast<std::size_t>(token)]) continue;
    double sum = 0, scores = 0;
    bool whole = true;
    for (std::int64_t j = token * l.top_k; j < (token + 1) * l.top_k; ++j) {
      const std::int32_t e = l.chosen[static_cast<std::size_t>(j)];
      whole = whole && e >= 0;
      if (!whole) break;
      const double z = l.logits[static_cast<std::size_t>(token * l.experts + e)];
      sum += weights[static_cast<std::size_t>(j)] / ctx->routing->scaling;
      scores += l.score == k::Score::kSigmoid ? k::sigmoid_exact_order(z) : k::sqrt_softplus_exact_order(z);
    }
    if (!whole || !r.add(sum, 1, band, ctx->place_of(m)) || !(sum > 0) || sum > 1) continue;
    // sum = scores / (scores + eps), solved for eps.
    const double eps = scores * (1 / sum - 1);
    char text[80];
    std::snprintf(text, sizeof text, "divided by the sum of the scores plus %.1g, which is no smaller", eps);
    if (r.differing == 1) r.name.found = true, r.name.id = "W6", r.name.name = text;
    r.name.found = r.name.found && r.name.name == text;  // one epsilon for all tokens, or no name
  }
}

}  // namespace moeaudit::replay
