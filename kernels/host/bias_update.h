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
  const double* bias = nullptr;  // [layers, experts], before the step
  const double* counts =
      nullptr;  // [layers, experts], tokens an expert got over all ranks and micro-batches of the step
  std::int64_t layers = 1;
  std::int64_t experts = 0;
  double rate = 0.001;
  BiasStep step = BiasStep::kSign;
  Centre centre = Centre::kNothing;
  Float counts_dtype =
      Float::kF64;                 // what counts and their mean are rounded to: bfloat16 counters hold integers to 256
  Float step_dtype = Float::kF64;  // what the step is rounded to: in bfloat16 0.001 is 0.00099945068359375
  Float bias_dtype = Float::kF64;  // what the bias is stored in
};

/// bias [layers, experts], may be args.bias. Means run over the experts of a layer in their order, in float64; whether
/// the bias multiplies the scores or is added to them (arXiv 2408.15664 table 3 has both) is the router's affair. An
/// expert at the mean does not move. kBadShape, kNullPointer; kBadOption for a rate that is not finite.
Status bias_update(const BiasUpdateArgs& args, double* bias);
Status check_bias_update(const BiasUpdateArgs& args, const double* bias);

/// The step of expert e, before it is centred.
MOE_AUDIT_HOST_DEVICE inline double bias_step(const BiasUpdateArgs& a, double mean, double count) {
  const double off = mean - round_to(count, a.counts_dtype);
  const double step = a.step == BiasStep::kProportional ? off : off > 0.0 ? 1.0 : off < 0.0 ? -1.0 : off;  // NaN stays
  return round_to(a.rate * step, a.step_dtype);
}

/// One layer. Everything is done in float64 and rounded where the arguments say.
MOE_AUDIT_HOST_DEVICE inline void update_layer(const BiasUpdateArgs& a, const double* bias, const double* counts,
                                               double* out) {
  const double n = static_cast<double>(a.experts);
  double total = 0, steps = 0, biases = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) total += round_to(counts[e], a.counts_dtype);
  const double mean = round_to(total / n, a.counts_dtype);
  for (std::int64_t e = 0; e < a.experts; ++e) steps += bias_step(a, mean, counts[e]);
  const double shift = a.centre == Centre::kStep ? steps / n : 0.0;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    out[e] = bias[e] + (bias_step(a, mean, counts[e]) - shift);
    biases += out[e];
  }
  const double centre = a.centre == Centre::kBias ? biases / n : 0.0;
  for (std::int64_t e = 0; e < a.experts; ++e) out[e] = round_to(out[e] - centre, a.bias_dtype);
}

}  // namespace moeaudit::kernels
