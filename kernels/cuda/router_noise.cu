// The noise of routers.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/router_noise.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class F>
__global__ void for_each(std::int64_t count, F f) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) f(i);
}

template <class T>
struct Noisy {
  NoisyLogitsArgs<T> a;
  T* out;
  __device__ void operator()(std::int64_t i) const { out[i] = noisy_logit(a, i); }
};
template <class T>
struct Slope {
  NoisyLogitsArgs<T> a;
  const double* upstream;
  double* out;
  __device__ void operator()(std::int64_t i) const { out[i] = noise_slope(a, i, upstream[i]); }
};
template <class T>
struct Jittered {
  const T *x, *factor;
  Float dtype;
  T* out;
  __device__ void operator()(std::int64_t i) const { out[i] = jittered(x[i], factor[i], dtype); }
};

template <class F>
Status launch(Status status, std::int64_t count, F f, CUstream_st* stream) {
  if (status != Status::kOk || count == 0) return status;
  const std::int64_t blocks = parts(count, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  queue(for_each<F>, static_cast<unsigned>(blocks), kThreads, 0, stream, count, f);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <class T>
Status launch_jitter(const T* x, const T* factor, std::int64_t count, Float dtype, T* out, CUstream_st* stream) {
  const bool missing = count > 0 && (x == nullptr || factor == nullptr || out == nullptr);
  return launch(count < 0 ? Status::kBadShape
                : missing ? Status::kNullPointer
                          : Status::kOk,
                count, Jittered<T>{x, factor, dtype, out}, stream);
}

}  // namespace

Status noisy_logits(const NoisyLogitsArgs<float>& a, float* out, CUstream_st* stream) {
  return launch(check_noisy_logits(a, out), a.tokens * a.experts, Noisy<float>{a, out}, stream);
}
Status noisy_logits(const NoisyLogitsArgs<double>& a, double* out, CUstream_st* stream) {
  return launch(check_noisy_logits(a, out), a.tokens * a.experts, Noisy<double>{a, out}, stream);
}
Status noisy_logits_backward(const NoisyLogitsArgs<float>& a, const double* upstream, double* d_noise_logits,
                             CUstream_st* stream) {
  return launch(check_noisy_logits_backward(a, upstream, d_noise_logits), a.tokens * a.experts,
                Slope<float>{a, upstream, d_noise_logits}, stream);
}
Status noisy_logits_backward(const NoisyLogitsArgs<double>& a, const double* upstream, double* d_noise_logits,
                             CUstream_st* stream) {
  return launch(check_noisy_logits_backward(a, upstream, d_noise_logits), a.tokens * a.experts,
                Slope<double>{a, upstream, d_noise_logits}, stream);
}
Status jitter(const float* x, const float* factor, std::int64_t count, Float dtype, float* out, CUstream_st* stream) {
  return launch_jitter(x, factor, count, dtype, out, stream);
}
Status jitter(const double* x, const double* factor, std::int64_t count, Float dtype, double* out,
              CUstream_st* stream) {
  return launch_jitter(x, factor, count, dtype, out, stream);
}

}  // namespace moeaudit::kernels::cuda
