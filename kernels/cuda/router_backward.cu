// Gradients of the router.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/router_backward.h"
#include "kernels/cuda/warp.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void tokens(RouteBackwardArgs<T> a, double* scores, double* d_logits) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.forward.tokens)
    route_backward_token(a, t, scores + t * a.forward.experts, d_logits + t * a.forward.experts);
}

/// route_backward_token() by a warp, lane l with experts l, l + 32, ... in registers.
template <int V, class T>
__global__ void __launch_bounds__(kThreads) tokens_in_registers(RouteBackwardArgs<T> a, double* d_logits) {
  const RouteArgs<T>& f = a.forward;
  const int lane = threadIdx.x % kLanes, experts = static_cast<int>(f.experts), k = static_cast<int>(f.top_k);
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * blockDim.x / kLanes;
  const bool softmax = f.score == Score::kSoftmax;
  for (std::int64_t t = warp; t < f.tokens; t += warps) {
    const int chosen = a.chosen != nullptr && lane < k ? a.chosen[t * k + lane] : -1;
    unsigned in = ~0u;  // bit i: expert lane + 32 i has part in the softmax
    if (f.softmax_after_top_k) {
      in = 0;
      for (int j = 0; j < k; ++j) {
        const int c = __shfl_sync(kAll, chosen, j);
        if (c >= 0 && c % kLanes == lane) in |= 1u << (c / kLanes);
      }
    }
    double logit[V], score[V], d[V];
    double largest = -__longlong_as_double(0x7ff0000000000000ll);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + kLanes * i;
      logit[i] = e < experts ? static_cast<double>(f.logits[t * experts + e]) : 0.0;
      if (e >= experts) in &= ~(1u << i);
      if (in >> i & 1u && logit[i] > largest) largest = logit[i];
      d[i] = 0;
    }
    if (softmax) {
      for (int step = kLanes / 2; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(kAll, largest, step);
        largest = other > largest ? other : largest;
      }
      double sum = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        score[i] = in >> i & 1u ? exp_exact_order(logit[i] - largest) : 0.0;
        sum += score[i];
      }
      sum = warp_add_lanes(sum);
#pragma unroll
      for (int i = 0; i < V; ++i) score[i] = score[i] / sum;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i)
        score[i] = f.score == Score::kSigmoid ? sigmoid_exact_order(logit[i]) : sqrt_softplus_exact_order(logit[i]);
    }
    if (a.weights != nullptr) {
      const double upstream = lane < k ? a.weights[t * k + lane] : 0.0;
      double total = 0, product = 0;
      if (f.renormalise) {
        for (int j = 0; j < k; ++j) {
          const int c = __shfl_sync(kAll, chosen, j);
          if (c < 0) continue;
          double own = 0;
#pragma unroll
          for (int i = 0; i < V; ++i) own = lane + kLanes * i == c ? score[i] : own;
          own = __shfl_sync(kAll, own, c % kLanes);
          total += own;
          product += __shfl_sync(kAll, upstream, j) * own;
        }
      }
      const double by = total + static_cast<double>(f.renormalise_eps), scaling = static_cast<double>(f.scaling);
      const double mine = f.renormalise ? scaling * (upstream / by - product / by / by) : scaling * upstream;
      for (int j = 0; j < k; ++j) {
        const int c = __shfl_sync(kAll, chosen, j);
        const double v = __shfl_sync(kAll, mine, j);
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] += c >= 0 && lane + kLanes * i == c ? v : 0.0;
      }
    }
    double along = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + kLanes * i;
      if (e >= experts) continue;
      if (a.scores != nullptr) d[i] += a.scores[t * experts + e];
      along += d[i] * score[i];
    }
    along = warp_add_lanes(along);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + kLanes * i;
      if (e >= experts) continue;
      double out = softmax ? score[i] * (d[i] - along) : d[i] * score_slope(f.score, logit[i], score[i]);
      if (a.logits != nullptr) out += a.logits[t * experts + e];
      d_logits[t * experts + e] = out;
    }
  }
}

template <int V, class T>
void launch_registers(const RouteBackwardArgs<T>& a, double* d_logits, CUstream_st* stream) {
  const std::int64_t blocks = parts(a.forward.tokens, kThreads / kLanes);
  queue(tokens_in_registers<V, T>, static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, 0, stream, a, d_logits);
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
  if (a.forward.tokens == 0) return Status::kOk;
  if (const std::int64_t v = parts(a.forward.experts, kLanes); 
      v <= 12 && a.forward.top_k <= kLanes && !is_narrow(a.forward.tensor_dtype)) {
    const auto call = v == 1   ? launch_registers<1, T>
                      : v == 2 ? launch_registers<2, T>
                      : v <= 4 ? launch_registers<4, T>
                      : v <= 8 ? launch_registers<8, T>
                               : launch_registers<12, T>;
    call(a, d_logits, stream);
    return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
  }
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = parts(a.forward.tokens, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  if (blocks > 0)
    queue(tokens<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, static_cast<double*>(workspace), d_logits);
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
    queue(gate_weights<T>, dim3(static_cast<unsigned>(parts(a.hidden, kThreads)), static_cast<unsigned>(a.experts)), kThreads, 0, stream, a, d_w);
  if (d_x != nullptr && inputs > 0) queue(gate_inputs<T>, static_cast<unsigned>(inputs), kThreads, 0, stream, a, d_x);
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
