#include "kernels/host/router_noise.h"

namespace moeaudit::kernels {
namespace {

template <class T>
Status run(const NoisyLogitsArgs<T>& a, T* out) {
  const Status status = check_noisy_logits(a, out);
  for (std::int64_t i = 0; status == Status::kOk && i < a.tokens * a.experts; ++i) out[i] = noisy_logit(a, i);
  return status;
}
template <class T>
Status run_backward(const NoisyLogitsArgs<T>& a, const double* upstream, double* out) {
  const Status status = check_noisy_logits_backward(a, upstream, out);
  for (std::int64_t i = 0; status == Status::kOk && i < a.tokens * a.experts; ++i)
    out[i] = noise_slope(a, i, upstream[i]);
  return status;
}
template <class T>
Status run_jitter(const T* x, const T* factor, std::int64_t count, Float dtype, T* out) {
  if (count < 0) return Status::kBadShape;
  if (count > 0 && (x == nullptr || factor == nullptr || out == nullptr)) return Status::kNullPointer;
  for (std::int64_t i = 0; i < count; ++i) out[i] = jittered(x[i], factor[i], dtype);
  return Status::kOk;
}

}  // namespace

Status noisy_logits(const NoisyLogitsArgs<float>& args, float* out) { return run(args, out); }
Status noisy_logits(const NoisyLogitsArgs<double>& args, double* out) { return run(args, out); }
Status noisy_logits_backward(const NoisyLogitsArgs<float>& args, const double* upstream, double* d_noise_logits) {
  return run_backward(args, upstream, d_noise_logits);
}
Status noisy_logits_backward(const NoisyLogitsArgs<double>& args, const double* upstream, double* d_noise_logits) {
  return run_backward(args, upstream, d_noise_logits);
}
Status jitter(const float* x, const float* factor, std::int64_t count, Float dtype, float* out) {
  return run_jitter(x, factor, count, dtype, out);
}
Status jitter(const double* x, const double* factor, std::int64_t count, Float dtype, double* out) {
  return run_jitter(x, factor, count, dtype, out);
}

}  // namespace moeaudit::kernels
