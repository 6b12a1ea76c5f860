// SparseMixer: a token a thread.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/sparse_mixer.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) mix(SparseMixerArgs<T> a, SparseMixerResult<T> r) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.tokens) sparse_mixer_token(a, r, t);
}
template <class T>
__global__ void __launch_bounds__(kThreads) mix_backward(SparseMixerBackwardArgs<T> a, double* d_logits) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.forward.tokens) sparse_mixer_backward_token(a, t, d_logits + t * a.forward.experts);
}

template <class Kernel, class A, class R>
Status launch(Status status, Kernel kernel, const A& args, const R& result, std::int64_t tokens, CUstream_st* stream) {
  const std::int64_t blocks = status == Status::kOk ? parts(tokens, kThreads) : 0;
  if (blocks > 2147483647) return Status::kBadShape;
  if (blocks == 0) return status;
  queue(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, args, result);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

Status sparse_mixer(const SparseMixerArgs<float>& a, const SparseMixerResult<float>& r, CUstream_st* stream) {
  return launch(check_sparse_mixer(a, r), mix<float>, a, r, a.tokens, stream);
}
Status sparse_mixer(const SparseMixerArgs<double>& a, const SparseMixerResult<double>& r, CUstream_st* stream) {
  return launch(check_sparse_mixer(a, r), mix<double>, a, r, a.tokens, stream);
}
Status sparse_mixer_backward(const SparseMixerBackwardArgs<float>& a, double* d_logits, CUstream_st* stream) {
  return launch(check_sparse_mixer_backward(a, d_logits), mix_backward<float>, a, d_logits, a.forward.tokens, stream);
}
Status sparse_mixer_backward(const SparseMixerBackwardArgs<double>& a, double* d_logits, CUstream_st* stream) {
  return launch(check_sparse_mixer_backward(a, d_logits), mix_backward<double>, a, d_logits, a.forward.tokens, stream);
}

}  // namespace moeaudit::kernels::cuda
