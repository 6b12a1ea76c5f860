// Tokens routed by a warp with their scores in registers, 32 / P tokens at a time: P lanes share a token, and lane p of
// them holds experts p, p + P, ..., V in all. Few experts then fill a warp as well as many do. What route() and the
// fused gate share. The order of every sum is kernels/host/router.h's, whatever P.
#pragma once

#include <type_traits>

#include "kernels/cuda/warp.cuh"
#include "kernels/host/router.h"

namespace moeaudit::kernels::cuda {

// Calls, not copies: these are rare, and the code around them must stay small enough for the instruction caches.
static __device__ __noinline__ double rounded_call(double v, Float dtype) { return round_to(v, dtype); }
static __device__ __noinline__ float sqrt_softplus_call(float v, Float dtype) {
  return static_cast<float>(sqrt_softplus_in(static_cast<double>(v), dtype));
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

/// What the registers can hold: up to 32 choices, groups of one warp's width, nothing rare.
inline bool fits_registers(const RouteArgs<float>& a) {
  const bool grouped = a.group_score != GroupScore::kNone;
  return !is_rare(a) && a.experts <= 12 * kLanes && a.top_k <= kLanes && (!grouped || (a.experts / a.groups == kLanes));
}

/// exp_of_non_positive(x) for x >= kNear, where the result is far from the smallest numbers: 2^k goes into the exponent
/// at once. The same bits.
inline constexpr float kNear = -60.0f;
__device__ __forceinline__ float exp_near(float x) {
  float shifted = 0;
  const float p = exp_float::significand(x, &shifted);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

/// Softmax over the values that are `here`, or NaN.
template <int P, int V, class Here>
__device__ __forceinline__ void softmax_registers(float (&v)[V], Here here, Float dtype) {
  float m = -INFINITY;
  bool nan = false;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (!here(i)) v[i] = -INFINITY;
    m = fmaxf(m, v[i]);  // the larger of the two that are numbers
    nan = nan || v[i] != v[i];
  }
  m = route_value(most_of<P>(route_key(m)));
  const bool bad = any_of<P>(nan) || m - m != 0.0f;
  float lowest = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    v[i] -= m;
    if (here(i)) lowest = fminf(lowest, v[i]);
  }
  const bool near = __all_sync(kAll, bad || lowest >= kNear);  // of all tokens of the warp: one way for all
  if (near) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = here(i) ? exp_near(v[i]) : 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = exp_of_non_positive(v[i]);  // of -inf: 0
  }
  const float sum = add_registers<P>(v);
  // With the correctly rounded reciprocal y, v y is within a place of the quotient v / sum, and one exact remainder
  // sets it right (Markstein, IA-64 and Elementary Functions, theorem 8.3), unless the remainder underflows, which
  // kNear rules out, or the significand of the sum is all ones. A third of what `/` costs.
  if (near && (__float_as_uint(sum) & 0x7fffffu) != 0x7fffffu) {
    const float y = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float q = v[i] * y;
      v[i] = fused(fused(-q, sum, v[i]), y, q);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = v[i] / sum;
  }
  if (bad) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = route_value(kLargestKey);
  }
  round_registers(v, dtype);
}

/// Register g holds group g, of 32 experts; the groups that are not among the best get choice -inf (or 0).
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

/// Token t: `v` holds its logits. All lanes of the warp take part; tokens that are not `live` are computed, but leave
/// nothing behind. kFull: the experts fill the registers. Groups need P = 32.
template <int P, int V, bool kFull>
__device__ __forceinline__ void route_registers(const RouteArgs<float>& a, const RouteResult<float>& r, std::int64_t t,
                                                bool live, float (&v)[V]) {
  const int lane = threadIdx.x % P;
  const int k = static_cast<int>(a.top_k);
  const int experts = kFull ? V * P : static_cast<int>(a.experts);
  const auto here = [&](int i) { return kFull || lane + P * i < experts; };
  if (!a.score_after_top_k) {
    if (a.score == Score::kSoftmax) {
      softmax_registers<P>(v, here, a.tensor_dtype);
    } else {
      if (a.score == Score::kSigmoid) {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = sigmoid_float(v[i]);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = sqrt_softplus_call(v[i], a.tensor_dtype);
      }
      round_registers(v, a.tensor_dtype);
    }
  }
  // Scores are not negative, so that without bias and groups their bits sort as they do.
  const bool plain = a.correction_bias == nullptr && a.group_score == GroupScore::kNone && !a.score_after_top_k;
  int key[V];
  if (plain) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (r.choice != nullptr && live && here(i)) r.choice[t * experts + lane + P * i] = v[i];
      key[i] = here(i) ? __float_as_int(v[i]) & kLargestKey : kStruckOut;
    }
  } else {
    float choice[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane + P * i;
      choice[i] = v[i];
      if (a.correction_bias == nullptr || !here(i)) continue;
      choice[i] = a.bias_multiplies ? v[i] * a.correction_bias[e] : v[i] + a.correction_bias[e];
    }
    if constexpr (P == kLanes) {
      if (a.group_score != GroupScore::kNone) mask_groups_registers(a, choice);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (r.choice != nullptr && live && here(i)) r.choice[t * experts + lane + P * i] = choice[i];
      key[i] = here(i) ? route_key(choice[i]) : kStruckOut;
    }
  }
  // This lane's best ones in order, by exchanges of neighbours that leave equals as they are: the lower index first.
  int order[V];
#pragma unroll
  for (int i = 0; i < V; ++i) order[i] = i;
#pragma unroll
  for (int j = 0; j + 1 < V; ++j) {
#pragma unroll
    for (int i = V - 1; i > j; --i) {
      const bool better = key[i] > key[i - 1];
      const int more = max(key[i], key[i - 1]), first = better ? order[i] : order[i - 1];
      key[i] = min(key[i], key[i - 1]), order[i] = better ? order[i - 1] : order[i];
      key[i - 1] = more, order[i - 1] = first;
    }
  }
  using Order = std::conditional_t<V <= 8, unsigned, unsigned long long>;
  Order left = 0;  // four bits each
#pragma unroll
  for (int i = 0; i < V; ++i) left |= static_cast<Order>(order[i]) << 4 * i;
  const auto winner_of = [&](int most) {
    const int mine = lane + P * static_cast<int>(left & 15);
    return least_of<P>(key[0] == most ? mine : kLargestKey);
  };
  // The choice of rank j is kept by lane j mod P in register j / P.
  constexpr int kKept = (P * V < kLanes ? P * V : kLanes) / P;
  int chosen[kKept] = {};
  float weight[kKept] = {}, sum = 0;
#pragma unroll
  for (int c = 0; c < kKept; ++c) {
#pragma unroll 1
    for (int l = 0; l < P && c * P + l < k; ++l) {
      const int most = most_of<P>(key[0]);
      const int winner = winner_of(most);
      float w = __int_as_float(most);
      if (!plain) {  // a choice need not be the score
        float own = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) own = winner == lane + P * i ? v[i] : own;
        w = from_lane<P>(own, winner % P);
      }
      const bool mine = winner == lane + P * static_cast<int>(left & 15);
#pragma unroll
      for (int i = 0; i + 1 < V; ++i) key[i] = mine ? key[i + 1] : key[i];
      key[V - 1] = mine ? kStruckOut : key[V - 1];
      left = mine ? left >> 4 : left;
      sum += w;
      if (lane == l) chosen[c] = winner, weight[c] = w;
    }
  }
  if (r.runner_up != nullptr) {
    const int next = winner_of(most_of<P>(key[0]));
    if (live && lane == 0) r.runner_up[t] = k < experts ? next : -1;
  }
#pragma unroll
  for (int c = 0; c < kKept; ++c) {
    if (live && lane + P * c < k) r.chosen[t * k + lane + P * c] = chosen[c];
  }
  if (r.weights == nullptr) return;
  if (a.score_after_top_k) {
    softmax_registers<P>(
        weight, [&](int c) { return lane + P * c < k; }, a.tensor_dtype);
    sum = 0;
#pragma unroll
    for (int c = 0; c < kKept; ++c) {
      for (int l = 0; l < P && c * P + l < k; ++l) sum += from_lane<P>(weight[c], l);
    }
  }
  sum = rounded(rounded(sum, a.tensor_dtype) + a.renormalise_eps, a.tensor_dtype);
#pragma unroll
  for (int c = 0; c < kKept; ++c) {
    if (c * P >= k) break;
    if (a.renormalise) weight[c] = rounded(weight[c] / sum, a.tensor_dtype);
    if (a.scaling != 1.0f) weight[c] = rounded(weight[c] * a.scaling, a.tensor_dtype);
    weight[c] = rounded(weight[c], a.weights_dtype);
    if (live && lane + P * c < k) r.weights[t * k + lane + P * c] = weight[c];
  }
}

}  // namespace moeaudit::kernels::cuda
