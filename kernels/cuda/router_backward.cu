// Gradients of the router.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/router_backward.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void tokens(RouteBackwardArgs<T> a, double* scores, double* d_logits) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.forward.tokens)
    route_backward_token(a, t, scores + t * a.forward.experts, d_logits + t * a.forward.experts);
}

/// Block (run of hidden, expert): an element of d_w a thread.
template <class T>
__global__ void gate_weights(GateBackwardArgs<T> a, double* d_w) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, e = blockIdx.y;
  if (i >= a.hidden) return;
  double sum = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t)
    sum += a.d_logits[t * a.experts + e] * static_cast<double>(a.x[t * a.hidden + i]);
  d_w[e * a.hidden + i] = sum;
}

template <class T>
__global__ void gate_inputs(GateBackwardArgs<T> a, double* d_x) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= a.tokens * a.hidden) return;
  const std::int64_t t = at / a.hidden, i = at % a.hidden;
  double sum = 0;
  for (std::int64_t e = 0; e < a.experts; ++e)
    sum += a.d_logits[t * a.experts + e] * static_cast<double>(a.w[e * a.hidden + i]);
  d_x[at] = sum;
}

template <class T>
Status launch(const RouteBackwardArgs<T>& a, double* d_logits, void* workspace, CUstream_st* stream) {
  if (const Status status = check_route_backward(a, d_logits); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = parts(a.forward.tokens, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  if (blocks > 0)
    tokens<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, static_cast<double*>(workspace), d_logits);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <class T>
Status launch(const GateBackwardArgs<T>& a, double* d_w, double* d_x, CUstream_st* stream) {
  const std::int64_t inputs = parts(a.tokens * a.hidden, kThreads);
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1 || a.experts > 65535 || inputs > 2147483647)
    return Status::kBadShape;
  const bool some = a.tokens > 0;
  if (some && (a.d_logits == nullptr || (d_w != nullptr && a.x == nullptr) || (d_x != nullptr && a.w == nullptr)))
    return Status::kNullPointer;
  if (d_w != nullptr)
    gate_weights<T>
        <<<dim3(static_cast<unsigned>(parts(a.hidden, kThreads)), static_cast<unsigned>(a.experts)), kThreads, 0, stream>>>(
            a, d_w);
  if (d_x != nullptr && inputs > 0) gate_inputs<T><<<static_cast<unsigned>(inputs), kThreads, 0, stream>>>(a, d_x);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

std::size_t route_backward_workspace(std::int64_t tokens, std::int64_t experts) {
  return static_cast<std::size_t>(tokens * experts) * 8;
}
Status route_backward(const RouteBackwardArgs<float>& args, double* d_logits, void* workspace, CUstream_st* stream) {
  return launch(args, d_logits, workspace, stream);
}
Status route_backward(const RouteBackwardArgs<double>& args, double* d_logits, void* workspace, CUstream_st* stream) {
  return launch(args, d_logits, workspace, stream);
}
Status gate_backward(const GateBackwardArgs<float>& args, double* d_w, double* d_x, CUstream_st* stream) {
  return launch(args, d_w, d_x, stream);
}
Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x, CUstream_st* stream) {
  return launch(args, d_w, d_x, stream);
}

}  // namespace moeaudit::kernels::cuda
