// The step of loss-free balancing: the selection bias after one optimizer step. Host kernels.
#pragma once

#include <cstdint>

#include "kernels/host/router.h"

namespace moeaudit::kernels {

enum class BiasStep {
  kSign,          // b_e += rate sign(mean c - c_e); arXiv 2408.15664 algorithm 1, DeepSeek-V3, Megatron-LM
  kProportional,  // b_e += rate (mean c - c_e); arXiv 2408.15664 table 3
};
enum class Centre {
  kNothing,  // Megatron-LM, DeepSeek-V3
  kStep,     // the mean of the step over the experts is taken from it; torchtitan
  kBias,     // the mean of the new bias is taken from it
};

struct BiasUpdateArgs {
  const double* bias = nullptr;    // [layers, experts], before the step
  const double* counts = nullptr;  // [ranks, micro_batches, layers, experts], tokens an expert got; or their sums
  std::int64_t ranks = 1, micro_batches = 1;
  std::int64_t layers = 1;
  std::int64_t experts = 0;
  double rate = 0.001;
  BiasStep step = BiasStep::kSign;
  Centre centre = Centre::kNothing;
  /// What the counters are stored in: a rank's own after every micro-batch, the sum over ranks after every rank, the
  /// sum over experts, their mean and the distance from it. bfloat16 holds integers to 256.
  Float counts_dtype = Float::kF64;
  Float step_dtype = Float::kF64;  // what the step is rounded to: in bfloat16 0.001 is 0.00099945068359375
  Float bias_dtype = Float::kF64;  // what the bias is stored in
};

/// bias [layers, experts], may be args.bias. Ranks, their micro-batches and the experts of a layer are added up in
/// their order, in float64. The step is the same where the bias multiplies the scores, from 1 on, as where it is added
/// to them from 0 on (arXiv 2408.15664 table 3 has both): which of the two is the router's affair (router.h,
/// bias_multiplies). An expert at the mean does not move. kBadShape, kNullPointer; kBadOption for a rate that is not
/// finite.
Status bias_update(const BiasUpdateArgs& args, double* bias);
Status check_bias_update(const BiasUpdateArgs& args, const double* bias);

/// Tokens of expert e of a layer, as the counters hold them.
MOE_AUDIT_HOST_DEVICE inline double total_count(const BiasUpdateArgs& a, std::int64_t layer, std::int64_t e) {
  const double* at = a.counts + layer * a.experts + e;
  double total = 0;
  for (std::int64_t r = 0; r < a.ranks; ++r) {
    double own = 0;
    for (std::int64_t m = 0; m < a.micro_batches; ++m, at += a.layers * a.experts)
      own = round_to(own + round_to(*at, a.counts_dtype), a.counts_dtype);
    total = round_to(total + own, a.counts_dtype);
  }
  return total;
}

/// The step of an expert with that count, before it is centred.
MOE_AUDIT_HOST_DEVICE inline double bias_step(const BiasUpdateArgs& a, double mean, double count) {
  const double off = round_to(mean - count, a.counts_dtype);
  const double step = a.step == BiasStep::kProportional ? off : off > 0.0 ? 1.0 : off < 0.0 ? -1.0 : off;  // NaN stays
  return round_to(a.rate * step, a.step_dtype);
}

/// One layer. Everything is done in float64 and rounded where the arguments say.
MOE_AUDIT_HOST_DEVICE inline void update_layer(const BiasUpdateArgs& a, std::int64_t layer, double* out) {
  const double* bias = a.bias + layer * a.experts;
  const double n = static_cast<double>(a.experts);
  double total = 0, steps = 0, biases = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) total += total_count(a, layer, e);
  const double mean = round_to(round_to(total, a.counts_dtype) / n, a.counts_dtype);
  for (std::int64_t e = 0; e < a.experts; ++e) steps += bias_step(a, mean, total_count(a, layer, e));
  const double shift = a.centre == Centre::kStep ? steps / n : 0.0;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    out[e] = bias[e] + (bias_step(a, mean, total_count(a, layer, e)) - shift);
    biases += out[e];
  }
  const double centre = a.centre == Centre::kBias ? biases / n : 0.0;
  for (std::int64_t e = 0; e < a.experts; ++e) out[e] = round_to(out[e] - centre, a.bias_dtype);
}

}  // namespace moeaudit::kernels
