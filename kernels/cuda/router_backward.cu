// Gradients of the router.
#include <cuda_bf16.h>
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

/// The largest of the values that the P lanes of a token hold, which are numbers.
template <int P>
__device__ __forceinline__ float largest_of(float v) {
  return route_value(most_of<P>(route_key(v)));
}
template <int P>
__device__ __forceinline__ double largest_of(double v) {
#pragma unroll
  for (int step = P / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAll, v, step);
    v = other > v ? other : v;
  }
  return v;
}

// Calls, not copies: these are rare.
__device__ __noinline__ double far_exp(double x) { return exp_exact_order(x); }
__device__ __noinline__ double sqrt_softplus_call(double x) { return sqrt_softplus_exact_order(x); }
__device__ __noinline__ double score_slope_call(Score score, double logit, double value) {
  return score_slope(score, logit, value);
}

/// exp_exact_order(x) for kNear <= x <= 0, where the result is far from the smallest numbers: 2^k goes into the
/// exponent at once. The same bits.
constexpr double kNear = -600.0;
__device__ __forceinline__ double exp_near(double x) {
  double shifted = 0;
  const double p = exp_double::significand(x, &shifted);
  return __hiloint2double(__double2hiint(p) + (__double2loint(shifted) << 20), __double2loint(p));
}

/// Softmax of the values that have part in it (bit i of `in`); 0 for the others.
template <int P, int V, class T>
__device__ __forceinline__ void softmax_in_registers(const T (&logit)[V], unsigned in, double (&score)[V]) {
  T largest = static_cast<T>(-__longlong_as_double(0x7ff0000000000000ll));
#pragma unroll
  for (int i = 0; i < V; ++i) largest = in >> i & 1u && logit[i] > largest ? logit[i] : largest;
  largest = largest_of<P>(largest);
  bool near = true;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    score[i] = in >> i & 1u ? static_cast<double>(logit[i]) - static_cast<double>(largest) : 0.0;
    near = near & (score[i] >= kNear);
  }
  near = __all_sync(kAll, near);  // of all tokens of the warp: one way for all
  if (near) {
#pragma unroll
    for (int i = 0; i < V; ++i) score[i] = exp_near(score[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) score[i] = far_exp(score[i]);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) score[i] = in >> i & 1u ? score[i] : 0.0;
  const double sum = add_registers<P>(score);
  // As in softmax_registers() of route_warp.cuh: the quotient, rounded once, from the rounded reciprocal.
  if (near && (__double2hiint(sum) & 0xfffff) != 0xfffff) {
    const double y = 1.0 / sum;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const double q = score[i] * y;
      score[i] = __fma_rn(__fma_rn(-q, sum, score[i]), y, q);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) score[i] = score[i] / sum;
  }
}

__device__ __forceinline__ void put(double v, double* to) { *to = v; }
__device__ __forceinline__ void put(double v, __nv_bfloat16* to) { *to = __double2bfloat16(v); }

/// route_backward_token() in registers, P lanes a token. Rows of d_logits are `stride` apart, with zeros beyond the
/// experts.
template <int P, int V, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    tokens_in_registers(RouteBackwardArgs<T> a, Out* d_logits, std::int64_t stride) {
  constexpr int kTokens = kLanes / P,
                kKept = (P * V < kLanes ? P * V : kLanes) / P;  // choice j: lane j mod P, register j / P
  __shared__ double exchange[kThreads / kLanes][kTokens][P * V + 1];
  const RouteArgs<T>& f = a.forward;
  const int lane = threadIdx.x % P, experts = static_cast<int>(f.experts), k = static_cast<int>(f.top_k);
  double* const shared = exchange[threadIdx.x / kLanes][threadIdx.x % kLanes / P];
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * blockDim.x / kLanes;
  const bool softmax = f.score == Score::kSoftmax;
  // Values of this lane's experts to the lanes that have them chosen, and back.
  const auto publish = [&](auto value) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < V; ++i) shared[lane + P * i] = value(i);
    __syncwarp();
  };
  for (std::int64_t first = warp * kTokens; first < f.tokens; first += warps * kTokens) {
    const bool live = first + threadIdx.x % kLanes / P < f.tokens;
    const std::int64_t t = live ? first + threadIdx.x % kLanes / P : first;
    int chosen[kKept];
#pragma unroll
    for (int c = 0; c < kKept; ++c)
      chosen[c] = a.chosen != nullptr && lane + P * c < k ? a.chosen[t * k + lane + P * c] : -1;
    T logit[V];
    unsigned in = 0;  // bit i: expert lane + P i has part in the softmax
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + P * i;
      logit[i] = e < experts ? f.logits[t * experts + e] : T(0);
      in |= e < experts ? 1u << i : 0u;
    }
    if (f.score_after_top_k) {
      publish([](int) { return 0.0; });
#pragma unroll
      for (int c = 0; c < kKept; ++c) {
        if (chosen[c] >= 0) shared[chosen[c]] = 1.0;
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < V; ++i) in &= shared[lane + P * i] != 0.0 ? ~0u : ~(1u << i);
    }
    double score[V];
    if (softmax) {
      softmax_in_registers<P>(logit, in, score);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const double l = static_cast<double>(logit[i]);
        score[i] = f.score == Score::kSigmoid ? sigmoid_exact_order(l) : sqrt_softplus_call(l);
      }
    }
    double d[V];
#pragma unroll
    for (int i = 0; i < V; ++i) d[i] = 0.0;
    if (a.weights != nullptr) {
      double of_weight[kKept];
#pragma unroll
      for (int c = 0; c < kKept; ++c) of_weight[c] = chosen[c] >= 0 ? a.weights[t * k + lane + P * c] : 0.0;
      if (f.renormalise) {
        publish([&](int i) { return score[i]; });
        double total = 0, product = 0;
#pragma unroll
        for (int c = 0; c < kKept; ++c) {
          const double own = chosen[c] >= 0 ? shared[chosen[c]] : 0.0, with = chosen[c] >= 0 ? of_weight[c] * own : 0.0;
#pragma unroll 1
          for (int l = 0; l < P && c * P + l < k; ++l) total += from_lane<P>(own, l), product += from_lane<P>(with, l);
        }
        const double by = total + static_cast<double>(f.renormalise_eps), along = product / by / by;
#pragma unroll
        for (int c = 0; c < kKept; ++c) of_weight[c] = of_weight[c] / by - along;
      }
      publish([](int) { return 0.0; });
#pragma unroll
      for (int c = 0; c < kKept; ++c) {
        of_weight[c] = static_cast<double>(f.scaling) * of_weight[c];
#pragma unroll 1
        for (int l = 0; l < P && c * P + l < k; ++l) {  // one after the other: nothing says that they differ
          if (lane == l && chosen[c] >= 0) shared[chosen[c]] += of_weight[c];
          __syncwarp();
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] = shared[lane + P * i];
    }
    double with[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + P * i;
      if (a.scores != nullptr && e < experts) d[i] += a.scores[t * experts + e];
      with[i] = e < experts ? d[i] * score[i] : 0.0;
    }
    const double along = add_registers<P>(with);
    if (softmax) {
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] = in >> i & 1u ? score[i] * (d[i] - along) : 0.0;
    } else if (f.score == Score::kSigmoid) {
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] = d[i] * (score[i] * (1.0 - score[i]));
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] = d[i] * score_slope_call(f.score, static_cast<double>(logit[i]), score[i]);
    }
    if (a.logits != nullptr) {
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] += lane + P * i < experts ? a.logits[t * experts + lane + P * i] : 0.0;
    }
    Out* const to = d_logits + t * stride + lane;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (live && lane + P * i < static_cast<int>(stride)) put(lane + P * i < experts ? d[i] : 0.0, to + P * i);
    }
  }
}

template <int P, int V, class T, class Out>
void launch_registers(const RouteBackwardArgs<T>& a, Out* d_logits, std::int64_t stride, CUstream_st* stream) {
  const std::int64_t blocks = parts(a.forward.tokens, kThreads / P);
  queue(tokens_in_registers<P, V, T, Out>, static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, 0,
        stream, a, d_logits, stride);
}

/// Whether it took the work.
template <class T, class Out>
bool try_registers(const RouteBackwardArgs<T>& a, Out* d_logits, std::int64_t stride, CUstream_st* stream) {
  const std::int64_t e = a.forward.experts;
  if (e > 12 * kLanes || a.forward.top_k > kLanes || is_narrow(a.forward.tensor_dtype) || is_rare(a.forward))
    return false;
  const auto call = e <= 8     ? launch_registers<lanes_for(8), 8, T, Out>
                    : e <= 16  ? launch_registers<lanes_for(16), 8, T, Out>
                    : e <= 32  ? launch_registers<lanes_for(32), 8, T, Out>
                    : e <= 64  ? launch_registers<lanes_for(64), 8, T, Out>
                    : e <= 128 ? launch_registers<lanes_for(128), 8, T, Out>
                    : e <= 160 ? launch_registers<32, 5, T, Out>
                    : e <= 256 ? launch_registers<32, 8, T, Out>
                               : launch_registers<32, 12, T, Out>;
  call(a, d_logits, stride, stream);
  return true;
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

/// A warp an expert, which reads all choices.
template <class T>
__global__ void expert_scales(ExpertScaleBackwardArgs<T> a, double* d_scale) {
  const std::int64_t e = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (e >= a.experts) return;
  double sum = 0;
  for (std::int64_t i = threadIdx.x % kLanes; i < a.tokens * a.top_k; i += kLanes) {
    if (a.chosen[i] == e) sum += a.weights[i] * static_cast<double>(a.unscaled[i]);
  }
  sum = warp_add_lanes(sum);
  if (threadIdx.x % kLanes == 0) d_scale[e] = sum;
}

template <class T>
Status launch(const ExpertScaleBackwardArgs<T>& a, double* d_scale, CUstream_st* stream) {
  if (const Status status = check_expert_scale_backward(a, d_scale); status != Status::kOk) return status;
  const std::int64_t blocks = parts(a.experts, kThreads / kLanes);
  if (blocks > 2147483647) return Status::kBadShape;
  queue(expert_scales<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, d_scale);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <class T>
Status launch(const RouteBackwardArgs<T>& a, double* d_logits, void* workspace, CUstream_st* stream) {
  if (const Status status = check_route_backward(a, d_logits); status != Status::kOk) return status;
  if (a.forward.tokens == 0) return Status::kOk;
  if (try_registers(a, d_logits, a.forward.experts, stream))
    return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
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
    queue(gate_weights<T>, dim3(static_cast<unsigned>(parts(a.hidden, kThreads)), static_cast<unsigned>(a.experts)),
          kThreads, 0, stream, a, d_w);
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
Status route_backward(const RouteBackwardArgs<float>& args, std::uint16_t* d_logits, CUstream_st* stream) {
  // Only whether it is there: it holds another type.
  if (const Status status = check_route_backward(args, reinterpret_cast<double*>(d_logits)); status != Status::kOk)
    return status;
  if (args.forward.tokens == 0) return Status::kOk;
  if (!try_registers(args, reinterpret_cast<__nv_bfloat16*>(d_logits), padded_experts(args.forward.experts), stream))
    return Status::kBadShape;
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}
Status expert_scale_backward(const ExpertScaleBackwardArgs<float>& args, double* d_scale, CUstream_st* stream) {
  return launch(args, d_scale, stream);
}
Status expert_scale_backward(const ExpertScaleBackwardArgs<double>& args, double* d_scale, CUstream_st* stream) {
  return launch(args, d_scale, stream);
}
Status gate_backward(const GateBackwardArgs<float>& args, double* d_w, double* d_x, CUstream_st* stream) {
  return launch(args, d_w, d_x, stream);
}
Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x, CUstream_st* stream) {
  return launch(args, d_w, d_x, stream);
}

}  // namespace moeaudit::kernels::cuda
