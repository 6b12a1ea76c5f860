// From logits to chosen experts: float32 with up to 384 experts in registers, several tokens a warp (route_warp.cuh);
// the rest one warp a token, with its scores and choices in shared memory.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/route_warp.cuh"
#include "kernels/cuda/router.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kWarp = kLanes;

template <class T>
__device__ T minus_infinity() {
  return static_cast<T>(-__longlong_as_double(0x7ff0000000000000ll));
}

/// Strictly better: larger, NaN largest of all; among equals the lower index. A total order, so any reduction tree
/// agrees.
template <class T>
__device__ bool better(T a, int at_a, T b, int at_b) {
  if (a > b || (a != a && b == b)) return true;
  return (a == b || (a != a && b != b)) && at_a < at_b;
}

/// Index of the best of values[0, n) that is not in this lane's mask `taken` (bit i: index lane + 32 i); every lane
/// gets it.
template <class T>
__device__ int best_left(const T* values, int n, unsigned* taken) {
  const int lane = threadIdx.x % kWarp;
  T best = 0;
  int at = -1;
  for (int e = lane, i = 0; e < n; e += kWarp, ++i) {
    if (*taken >> i & 1u) continue;
    if (at < 0 || better(values[e], e, best, at)) best = values[e], at = e;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, best, step);
    const int other_at = __shfl_xor_sync(kAll, at, step);
    if (other_at >= 0 && (at < 0 || better(other, other_at, best, at))) best = other, at = other_at;
  }
  if (at >= 0 && at % kWarp == lane) *taken |= 1u << (at / kWarp);
  return at;
}

/// out = softmax(in), each lane its own elements.
template <class T>
__device__ void softmax(const T* in, int n, Float dtype, T* out) {
  const int lane = threadIdx.x % kWarp;
  T largest = minus_infinity<T>();
  bool nan = false;
  for (int e = lane; e < n; e += kWarp) {
    largest = in[e] > largest ? in[e] : largest;
    nan = nan || in[e] != in[e];
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, largest, step);
    largest = other > largest ? other : largest;
  }
  const bool bad = __any_sync(kAll, nan) || largest - largest != T(0);
  T sum = 0;
  for (int e = lane; e < n; e += kWarp) {  // in and out may be the same memory: a lane meets its own elements alone
    out[e] = exp_shifted(in[e] - largest);
    sum += out[e];
  }
  sum = warp_add_lanes(sum);
  for (int e = lane; e < n; e += kWarp)
    out[e] = bad ? static_cast<T>(__longlong_as_double(0x7ff8000000000000ll)) : rounded(out[e] / sum, dtype);
  __syncwarp();
}

/// v: n logits in, scores out, each lane its own.
template <class T>
__device__ void score(const RouteArgs<T>& a, int n, T* v) {
  if (a.score == Score::kSoftmax) return softmax(v, n, a.tensor_dtype, v);
  for (int e = threadIdx.x % kWarp; e < n; e += kWarp) {
    const T s = a.score == Score::kSigmoid
                    ? sigmoid_of(v[e])
                    : static_cast<T>(sqrt_softplus_in(static_cast<double>(v[e]), a.tensor_dtype));
    v[e] = rounded(s, a.tensor_dtype);
    if (a.sigmoid_offset != T(0)) v[e] = rounded(v[e] + a.sigmoid_offset, a.tensor_dtype);
  }
  __syncwarp();
}

/// The logits that scores see, each lane its own.
template <class T>
__device__ void take_logits(const RouteArgs<T>& a, const T* logits, int n, T* to) {
  for (int e = threadIdx.x % kWarp; e < n; e += kWarp) to[e] = softcapped(logits[e], a.logit_softcap, a.tensor_dtype);
}

/// Lane g scores group g; then the groups that are not among the best are masked.
template <class T>
__device__ void mask_groups(const RouteArgs<T>& a, T* choice, T* group) {
  const int lane = threadIdx.x % kWarp, groups = static_cast<int>(a.groups),
            size = static_cast<int>(a.experts / a.groups), best = static_cast<int>(group_members(a));
  for (int g = lane; g < groups; g += kWarp) {
    const T* members = choice + g * size;
    T sum = 0;
    int last = -1;  // the member added last: the next one is the best of those that come after it in the order
    for (int j = 0; j < best; ++j) {
      int next = -1;
      for (int e = 0; e < size; ++e) {
        if (e == last || (last >= 0 && !better(members[last], last, members[e], e))) continue;
        next = next < 0 || better(members[e], e, members[next], next) ? e : next;
      }
      sum = j == 0 ? members[next] : sum + members[next];
      last = next;
    }
    group[g] = best > 1 ? rounded(sum, a.tensor_dtype) : sum;
  }
  __syncwarp();
  unsigned kept = 0;  // of this lane's groups
  for (std::int64_t i = 0; i < a.top_groups; ++i) best_left(group, groups, &kept);
  for (int g = 0; g < groups; ++g) {
    const bool keep = __shfl_sync(kAll, kept, g % kWarp) >> (g / kWarp) & 1u;
    for (int e = lane; e < size && !keep; e += kWarp)
      choice[g * size + e] = a.group_mask_is_zero ? T(0) : minus_infinity<T>();
  }
  __syncwarp();
}

/// What renormalise divides by but for epsilon and floor, every lane the same. A call where it is no sum: few have it.
template <class T>
__device__ __noinline__ T norm_call(T p, const T* scores, int n) {
  PNorm<T> norm{p};
  for (int j = 0; j < n; ++j) norm.add(scores[j]);
  return norm.root();
}
template <class T>
__device__ T norm_of(const RouteArgs<T>& a, const T* scores, int n) {
  if (a.renormalise_norm != T(1)) return norm_call(a.renormalise_norm, scores, n);
  T sum = 0;
  for (int j = 0; j < n; ++j) sum += scores[j];
  return sum;
}

/// Weights of the chosen experts of token t, and of those that every token has; `gathered` has room for both.
template <class T>
__device__ void weigh(const RouteArgs<T>& a, const RouteResult<T>& r, std::int64_t t, const T* scores, T* gathered) {
  const int lane = threadIdx.x % kWarp, k = static_cast<int>(a.top_k), always = static_cast<int>(a.always);
  const std::int32_t* chosen = r.chosen + t * k;
  for (int j = lane; j < k; j += kWarp) gathered[j] = scores[chosen[j]];
  __syncwarp();
  if (a.score_after_top_k) score(a, k, gathered);
  if (always > 0) {
    take_logits(a, a.always_logits + t * always, always, gathered + k);
    score(a, always, gathered + k);
  }
  const T by = denominator(a, norm_of(a, gathered, k + always));
  for (int j = lane; j < k + always; j += kWarp) {
    T w = gathered[j];
    if (a.renormalise) w = rounded(w / by, a.tensor_dtype);
    if (a.scaling != T(1)) w = rounded(w * a.scaling, a.tensor_dtype);
    if (j < k && a.expert_scale != nullptr) w = rounded(w * a.expert_scale[chosen[j]], a.tensor_dtype);
    w = rounded(w, a.weights_dtype);
    if (j < k)
      r.weights[t * k + j] = w;
    else if (r.always_weights != nullptr)
      r.always_weights[t * always + j - k] = w;
  }
}

template <class T>
__global__ void route_tokens(RouteArgs<T> a, RouteResult<T> r, int values_per_warp) {
  MOE_AUDIT_DYNAMIC_SHARED(double, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int experts = static_cast<int>(a.experts);
  T* scores = reinterpret_cast<T*>(shared) + static_cast<std::int64_t>(warp) * values_per_warp;
  T* choice = scores + experts;
  T* scratch = choice + experts;
  for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * warps + warp; t < a.tokens;
       t += static_cast<std::int64_t>(gridDim.x) * warps) {
    take_logits(a, a.logits + t * experts, experts, scores);
    if (!a.score_after_top_k) score(a, experts, scores);
    for (int e = lane; e < experts; e += kWarp) {
      choice[e] = a.correction_bias == nullptr ? scores[e]
                  : a.bias_multiplies          ? scores[e] * a.correction_bias[e]
                                               : scores[e] + a.correction_bias[e];
    }
    __syncwarp();
    if (a.group_score != GroupScore::kNone) mask_groups(a, choice, scratch);
    unsigned taken = 0;
    std::int32_t* chosen = r.chosen + t * a.top_k;
    for (std::int64_t j = 0; j < a.top_k; ++j) {
      const int at = a.given == nullptr ? best_left(choice, experts, &taken) : a.given[t * a.top_k + j];
      if (lane == 0) chosen[j] = at;
    }
    if (r.runner_up != nullptr) {
      const int next = a.given == nullptr ? best_left(choice, experts, &taken) : -1;
      if (lane == 0) r.runner_up[t] = next;
    }
    if (r.choice != nullptr) {
      for (int e = lane; e < experts; e += kWarp) r.choice[t * experts + e] = choice[e];
    }
    __syncwarp();
    if (r.weights != nullptr) weigh(a, r, t, scores, scratch);
    __syncwarp();  // the next token overwrites the shared memory
  }
}

template <int P, int V, bool kFull>
__global__ void __launch_bounds__(128) route_in_registers(RouteArgs<float> a, RouteResult<float> r) {
  constexpr int kTokens = kWarp / P;  // of a warp at a time
  const int lane = threadIdx.x % P, experts = kFull ? V * P : static_cast<int>(a.experts);
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * blockDim.x / kWarp;
  for (std::int64_t first = warp * kTokens; first < a.tokens; first += warps * kTokens) {
    const std::int64_t t = first + threadIdx.x % kWarp / P;
    const bool live = t < a.tokens;
    const float* logits = a.logits + (live ? t : first) * experts;
    float v[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + P * i;
      v[i] = kFull || e < experts ? logits[e] : 0.0f;
    }
    route_registers<P, V, kFull>(a, r, t, live, v);
  }
}

template <int P, int V>
void launch_registers(const RouteArgs<float>& a, const RouteResult<float>& r, CUstream_st* stream) {
  const std::int64_t blocks = parts(a.tokens, 4 * kWarp / P);
  const auto grid = static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
  if (a.experts == V * P)
    queue(route_in_registers<P, V, true>, grid, 128, 0, stream, a, r);
  else
    queue(route_in_registers<P, V, false>, grid, 128, 0, stream, a, r);
}

/// Whether it took the work.
bool try_registers(const RouteArgs<double>&, const RouteResult<double>&, CUstream_st*) { return false; }
bool try_registers(const RouteArgs<float>& a, const RouteResult<float>& r, CUstream_st* stream) {
  if (!fits_registers(a)) return false;
  const std::int64_t e = a.experts;
  const bool grouped = a.group_score != GroupScore::kNone;  // in groups of 32
  const auto call = e <= 64 && grouped    ? launch_registers<32, 2>
                    : e <= 128 && grouped ? launch_registers<32, 4>
                    : e <= 8              ? launch_registers<lanes_for(8), 8>
                    : e <= 16             ? launch_registers<lanes_for(16), 8>
                    : e <= 32             ? launch_registers<lanes_for(32), 8>
                    : e <= 64             ? launch_registers<lanes_for(64), 8>
                    : e <= 128            ? launch_registers<lanes_for(128), 8>
                    : e <= 160            ? launch_registers<32, 5>
                    : e <= 256            ? launch_registers<32, 8>
                                          : launch_registers<32, 12>;
  call(a, r, stream);
  return true;
}

template <class T>
Status launch(const RouteArgs<T>& a, const RouteResult<T>& r, CUstream_st* stream) {
  const Status status = check_route(a, r);
  if (status != Status::kOk) return status;
  if (a.experts > kMostExperts) return Status::kBadShape;
  if (a.tokens == 0) return Status::kOk;
  if (try_registers(a, r, stream)) return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
  constexpr std::int64_t kSharedBytes = 48 << 10;  // what every device gives without asking
  const std::int64_t groups = a.group_score == GroupScore::kNone ? 1 : a.groups;
  const std::int64_t weighed = a.top_k + a.always, scratch = groups > weighed ? groups : weighed;
  const std::int64_t values = 2 * a.experts + scratch;
  const std::int64_t fits = kSharedBytes / (values * static_cast<std::int64_t>(sizeof(T)));
  const int warps = static_cast<int>(fits < 4 ? fits : 4);  // at least one: 4 * 1024 doubles are 32 KiB
  const std::int64_t blocks = (a.tokens + warps - 1) / warps;
  const std::int64_t grid = blocks < (1 << 20) ? blocks : 1 << 20;
  const auto bytes = static_cast<std::size_t>(warps * values) * sizeof(T);
  queue(route_tokens<T>, static_cast<unsigned>(grid), warps * kWarp, bytes, stream, a, r, static_cast<int>(values));
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

Status route(const RouteArgs<float>& args, const RouteResult<float>& result, CUstream_st* stream) {
  return launch(args, result, stream);
}
Status route(const RouteArgs<double>& args, const RouteResult<double>& result, CUstream_st* stream) {
  return launch(args, result, stream);
}

}  // namespace moeaudit::kernels::cuda
