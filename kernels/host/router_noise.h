// The noise that routers are trained with, from given numbers: noisy logits and jittered inputs, and their gradients.
// Host kernels. The draw itself belongs to the framework; given its numbers, everything here is exact.
#pragma once

#include <cstdint>

#include "kernels/host/normal.h"
#include "kernels/host/router.h"

namespace moeaudit::kernels {

/// out[t, e] = logits[t, e] + noise[t, e] deviation[t, e], with
///   deviation = softplus(noise_logits[t, e]) + eps   Shazeer et al., arXiv 1701.06538 equation 4 (eps 0);
///   tensor2tensor
///               expert_utils.py noisy_top_k_gating and its ports have eps = noise_epsilon = 1e-2
///             | scale                                 without noise_logits: V-MoE's fixed 1 / E (arXiv 2106.05974)
/// `noise` is a draw of the standard normal. Computed in float64, rounded once to T. At evaluation there is none of it.
template <class T>
struct NoisyLogitsArgs {
  const T* logits = nullptr;        // [tokens, experts]
  const T* noise = nullptr;         // [tokens, experts]
  const T* noise_logits = nullptr;  // [tokens, experts], or null
  std::int64_t tokens = 0, experts = 0;
  double eps = 0, scale = 0;
};
/// kBadShape, kNullPointer.
Status noisy_logits(const NoisyLogitsArgs<float>& args, float* out);
Status noisy_logits(const NoisyLogitsArgs<double>& args, double* out);

/// d_noise_logits = upstream noise sigmoid(noise_logits), in float64; d_logits is the upstream itself. kBadOption
/// without noise_logits.
Status noisy_logits_backward(const NoisyLogitsArgs<float>& args, const double* upstream, double* d_noise_logits);
Status noisy_logits_backward(const NoisyLogitsArgs<double>& args, const double* upstream, double* d_noise_logits);

/// out[i] = x[i] factor[i], rounded once to `dtype`: input jitter, with a factor of uniform(1 - e, 1 + e) for every
/// element of the hidden states. Switch (arXiv 2101.03961 table 4: the copy that the router sees); transformers'
/// mixtral, phimoe and switch_transformers with router_jitter_noise multiply the hidden states themselves, so that the
/// experts see them, too. Its gradient is the upstream times factor: the same function. In place is allowed. kBadShape,
/// kNullPointer.
Status jitter(const float* x, const float* factor, std::int64_t count, Float dtype, float* out);
Status jitter(const double* x, const double* factor, std::int64_t count, Float dtype, double* out);

template <class T>
MOE_AUDIT_HOST_DEVICE inline T noisy_logit(const NoisyLogitsArgs<T>& a, std::int64_t i) {
  const double deviation =
      a.noise_logits != nullptr ? softplus_exact_order(static_cast<double>(a.noise_logits[i])) + a.eps : a.scale;
  return static_cast<T>(static_cast<double>(a.logits[i]) + static_cast<double>(a.noise[i]) * deviation);
}
template <class T>
MOE_AUDIT_HOST_DEVICE inline double noise_slope(const NoisyLogitsArgs<T>& a, std::int64_t i, double upstream) {
  return upstream * static_cast<double>(a.noise[i]) *
         softplus_slope_exact_order(static_cast<double>(a.noise_logits[i]));
}
template <class T>
MOE_AUDIT_HOST_DEVICE inline T jittered(T x, T factor, Float dtype) {
  const T product = x * factor;  // of two numbers of a narrower dtype: exact in T, so this is one rounding
  return dtype == Float::kF64 ? product : static_cast<T>(round_to(static_cast<double>(product), dtype));
}

template <class T>
Status check_noisy_logits(const NoisyLogitsArgs<T>& a, const void* out) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  return a.tokens > 0 && (a.logits == nullptr || a.noise == nullptr || out == nullptr) ? Status::kNullPointer
                                                                                       : Status::kOk;
}
template <class T>
Status check_noisy_logits_backward(const NoisyLogitsArgs<T>& a, const double* upstream, const double* out) {
  if (const Status status = check_noisy_logits(a, out); status != Status::kOk) return status;
  if (a.noise_logits == nullptr) return Status::kBadOption;
  return a.tokens > 0 && upstream == nullptr ? Status::kNullPointer : Status::kOk;
}

}  // namespace moeaudit::kernels
