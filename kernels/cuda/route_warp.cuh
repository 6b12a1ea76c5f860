// One token routed by one warp, its scores in registers: lane l holds experts l, l + 32, ... What route() and the fused
// gate share. The order of every sum is kernels/host/router.h's.
#pragma once

#include "kernels/cuda/warp.cuh"
#include "kernels/host/router.h"

namespace moeaudit::kernels::cuda {

// Calls, not copies: these are rare, and the code around them must stay small enough for the instruction caches.
static __device__ __noinline__ double rounded_call(double v, Float dtype) { return round_to(v, dtype); }
static __device__ __noinline__ float sqrt_softplus_call(float v) {
  return static_cast<float>(sqrt_softplus_exact_order(static_cast<double>(v)));
}
template <class T>
__device__ __forceinline__ T rounded(T v, Float dtype) {
  return dtype == Float::kF64 ? v : static_cast<T>(rounded_call(static_cast<double>(v), dtype));
}
template <int V>
__device__ __forceinline__ void round_registers(float (&v)[V], Float dtype) {
  if (dtype == Float::kF64) return;
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = rounded(v[i], dtype);
}

/// What the registers can hold: up to 32 choices, groups of one warp's width.
inline bool fits_registers(const RouteArgs<float>& a) {
  const bool grouped = a.group_score != GroupScore::kNone;
  return a.experts <= 12 * kLanes && a.top_k <= kLanes && (!grouped || (a.experts / a.groups == kLanes));
}

/// exp_of_non_positive(x) for x >= kNear, where the result is far from the smallest numbers: 2^k goes into the exponent at
/// once. The same bits.
inline constexpr float kNear = -60.0f;
__device__ __forceinline__ float exp_near(float x) {
  float shifted = 0;
  const float p = exp_float::significand(x, &shifted);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

/// Softmax over the values that are `here`, or NaN.
template <int V, class Here>
__device__ __forceinline__ void softmax_registers(float (&v)[V], Here here, Float dtype) {
  float m = -INFINITY;
  bool nan = false;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (!here(i)) v[i] = -INFINITY;
    m = fmaxf(m, v[i]);  // the larger of the two that are numbers
    nan = nan || v[i] != v[i];
  }
  m = route_value(__reduce_max_sync(kAll, route_key(m)));
  if (__any_sync(kAll, nan) || m - m != 0.0f) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = route_value(kLargestKey);
    return;
  }
  float lowest = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    v[i] -= m;
    if (here(i)) lowest = fminf(lowest, v[i]);
  }
  float sum = 0;
  if (__all_sync(kAll, lowest >= kNear)) {
    // With the correctly rounded reciprocal y, v y is within a place of the quotient v / sum, and one exact remainder
    // sets it right (Markstein, IA-64 and Elementary Functions, theorem 8.3), unless the remainder underflows, which
    // kNear rules out, or the significand of the sum is all ones. A third of what `/` costs.
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = here(i) ? exp_near(v[i]) : 0.0f;
      sum += v[i];
    }
    sum = warp_add_lanes(sum);
    if ((__float_as_uint(sum) & 0x7fffffu) != 0x7fffffu) {
      const float y = 1.0f / sum;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float q = v[i] * y;
        v[i] = fused(fused(-q, sum, v[i]), y, q);
      }
      return round_registers(v, dtype);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = exp_of_non_positive(v[i]);  // of -inf: 0
      sum += v[i];
    }
    sum = warp_add_lanes(sum);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = v[i] / sum;
  round_registers(v, dtype);
}

/// Lane g's keys are group g's in register g; the groups that are not among the best get choice -inf (or 0).
template <int V>
__device__ __forceinline__ void mask_groups_registers(const RouteArgs<float>& a, float (&choice)[V]) {
  const int lane = threadIdx.x % kLanes;
  const int members = static_cast<int>(group_members(a));
  int mine = kStruckOut;  // the key of group `lane`
#pragma unroll
  for (int g = 0; g < V; ++g) {
    if (g >= a.groups) continue;
    int key = route_key(choice[g]);
    float value = 0;
    for (int j = 0; j < members; ++j) {
      const int best = __reduce_max_sync(kAll, key);
      const int at = __ffs(static_cast<int>(__ballot_sync(kAll, key == best))) - 1;
      const float v = __shfl_sync(kAll, choice[g], at);
      value = j == 0 ? v : value + v;
      key = lane == at ? kStruckOut : key;
    }
    if (members > 1) value = rounded(value, a.tensor_dtype);
    mine = lane == g ? route_key(value) : mine;
  }
  unsigned kept = 0;
  for (int i = 0; i < a.top_groups; ++i) {
    const int best = __reduce_max_sync(kAll, mine);
    const int at = __ffs(static_cast<int>(__ballot_sync(kAll, mine == best))) - 1;
    kept |= 1u << at;
    mine = lane == at ? kStruckOut : mine;
  }
  const float fill = a.group_mask_is_zero ? 0.0f : -INFINITY;
#pragma unroll
  for (int g = 0; g < V; ++g) choice[g] = kept >> g & 1u ? choice[g] : fill;
}

/// Token t: `v` holds its logits. All lanes of the warp take part. kFull: the experts fill the registers.
template <int V, bool kFull>
__device__ __forceinline__ void route_registers(const RouteArgs<float>& a, const RouteResult<float>& r, std::int64_t t,
                                                float (&v)[V]) {
  const unsigned lane = threadIdx.x % kLanes;
  const int k = static_cast<int>(a.top_k);
  const int experts = kFull ? V * kLanes : static_cast<int>(a.experts);
  const auto here = [&](int i) { return kFull || static_cast<int>(lane) + kLanes * i < experts; };
  if (!a.softmax_after_top_k) {
    if (a.score == Score::kSoftmax) {
      softmax_registers(v, here, a.tensor_dtype);
    } else {
      if (a.score == Score::kSigmoid) {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = sigmoid_float(v[i]);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = sqrt_softplus_call(v[i]);
      }
      round_registers(v, a.tensor_dtype);
    }
  }
  // Scores are not negative, so that without bias and groups their bits sort as they do.
  const bool plain = a.correction_bias == nullptr && a.group_score == GroupScore::kNone && !a.softmax_after_top_k;
  int key[V];
  if (plain) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (r.choice != nullptr && here(i)) r.choice[t * experts + lane + kLanes * i] = v[i];
      key[i] = here(i) ? __float_as_int(v[i]) & kLargestKey : kStruckOut;
    }
  } else {
    float choice[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + kLanes * i;
      choice[i] = v[i];
      if (a.correction_bias == nullptr || !here(i)) continue;
      choice[i] = a.bias_multiplies ? v[i] * a.correction_bias[e] : v[i] + a.correction_bias[e];
    }
    if (a.group_score != GroupScore::kNone) mask_groups_registers(a, choice);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (r.choice != nullptr && here(i)) r.choice[t * experts + lane + kLanes * i] = choice[i];
      key[i] = here(i) ? route_key(choice[i]) : kStruckOut;
    }
  }
  int best = kStruckOut;
  unsigned at = kLargestKey;  // this lane's best, and which expert that is; the lowest among equals
  const auto find = [&] {
    best = key[0];
    at = lane;
#pragma unroll
    for (int i = 1; i < V; ++i) {
      at = key[i] > best ? lane + kLanes * i : at;
      best = max(best, key[i]);
    }
  };
  find();
  unsigned chosen = 0;
  int its_key = 0;
  for (int j = 0; j < k; ++j) {
    const int most = __reduce_max_sync(kAll, best);
    const unsigned winner = __reduce_min_sync(kAll, best == most ? at : unsigned{kLargestKey});
    if (lane == j) chosen = winner, its_key = most;
    if (at == winner) {
#pragma unroll
      for (int i = 0; i < V; ++i) key[i] = winner == lane + kLanes * i ? kStruckOut : key[i];
      find();
    }
  }
  if (r.runner_up != nullptr) {
    const int most = __reduce_max_sync(kAll, best);
    const unsigned next = __reduce_min_sync(kAll, best == most ? at : unsigned{kLargestKey});
    if (lane == 0) r.runner_up[t] = k < experts ? static_cast<int>(next) : -1;
  }
  float weight = __int_as_float(its_key);
  if (!plain) {  // the choice is not the score
    for (int j = 0; j < k; ++j) {
      const unsigned e = __shfl_sync(kAll, chosen, j);
      float own = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) own = lane + kLanes * i == e ? v[i] : own;
      own = __shfl_sync(kAll, own, e % kLanes);
      if (lane == j) weight = own;
    }
  }
  if (lane < k) r.chosen[t * k + lane] = static_cast<int>(chosen);
  if (r.weights == nullptr) return;
  if (a.softmax_after_top_k) {
    float one[1] = {weight};
    softmax_registers(one, [&](int) { return lane < k; }, a.tensor_dtype);
    weight = one[0];
  }
  if (a.renormalise) {
    float sum = 0;
    for (int j = 0; j < k; ++j) sum += __shfl_sync(kAll, weight, j);
    sum = rounded(rounded(sum, a.tensor_dtype) + a.renormalise_eps, a.tensor_dtype);
    weight = rounded(weight / sum, a.tensor_dtype);
  }
  if (a.scaling != 1.0f) weight = rounded(weight * a.scaling, a.tensor_dtype);
  weight = rounded(weight, a.weights_dtype);
  if (lane < k) r.weights[t * k + lane] = weight;
}

}  // namespace moeaudit::kernels::cuda
