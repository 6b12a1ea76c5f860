// What the lanes of a warp do together, in the host's order.
#pragma once

#include "kernels/host/z_loss.h"

namespace moeaudit::kernels::cuda {

inline constexpr unsigned kAll = 0xffffffffu;

/// add_lanes() of the values that the lanes of a warp hold; every lane gets the sum (a + b and b + a are one).
template <class T>
__device__ __forceinline__ T warp_add_lanes(T mine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) mine += __shfl_xor_sync(kAll, mine, step);
  return mine;
}

/// kernels/host/z_loss.h log_sum_exp(), by all lanes of a warp; every lane gets the result.
template <class T>
__device__ double warp_log_sum_exp(const T* logits, std::int64_t count, double* largest, double* sum) {
  const int lane = threadIdx.x % kLanes;
  double m = static_cast<double>(logits[0]);
  bool nan = false;
  for (std::int64_t e = lane; e < count; e += kLanes) {
    const double l = static_cast<double>(logits[e]);
    m = l > m || m != m ? l : m;
    nan = nan || l != l;
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAll, m, step);
    m = other > m || m != m ? other : m;
  }
  nan = __any_sync(kAll, nan);
  double mine = 0;
  if (m - m == 0.0) {
    for (std::int64_t e = lane; e < count; e += kLanes) mine += exp_exact_order(static_cast<double>(logits[e]) - m);
  }
  const double s = warp_add_lanes(mine);
  *largest = m;
  *sum = s;
  return finish_log_sum_exp(nan, m, s);
}

// ---- several tokens a warp: P lanes share one, and lane p of them holds experts p, p + P, ...

/// The lanes that share a token where `most` experts are the most: as many as leave 8 to a lane.
constexpr int lanes_for(int most) {
  return most <= 8 ? 1 : most <= 16 ? 2 : most <= 32 ? 4 : most <= 64 ? 8 : most <= 128 ? 16 : kLanes;
}

// Of the P lanes that share a token; every one of them gets the result.
template <int P>
__device__ __forceinline__ int most_of(int v) {
  if constexpr (P == kLanes) {
    return __reduce_max_sync(kAll, v);
  } else {
#pragma unroll
    for (int step = P / 2; step > 0; step /= 2) v = max(v, __shfl_xor_sync(kAll, v, step));
    return v;
  }
}
template <int P>
__device__ __forceinline__ int least_of(int v) {
  if constexpr (P == kLanes) {
    return __reduce_min_sync(kAll, v);
  } else {
#pragma unroll
    for (int step = P / 2; step > 0; step /= 2) v = min(v, __shfl_xor_sync(kAll, v, step));
    return v;
  }
}
template <int P>
__device__ __forceinline__ bool any_of(bool v) {
  if constexpr (P == 1) return v;
  constexpr unsigned kMine = P == kLanes ? kAll : (1u << P % kLanes) - 1;
  return (__ballot_sync(kAll, v) >> threadIdx.x % kLanes / P * P & kMine) != 0;
}
template <int P, class T>
__device__ __forceinline__ T from_lane(T v, int lane) {
  if constexpr (P == 1) return v;
  return __shfl_sync(kAll, v, lane, P);
}
/// add_lanes() of the host: lane p has the values of its lanes p, p + P, ...
template <int P, int V, class T>
__device__ __forceinline__ T add_registers(const T (&v)[V]) {
  constexpr int kHostLanes = kLanes / P, kUsed = V < kHostLanes ? V : kHostLanes;
  T sum[kUsed] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i % kHostLanes] += v[i];
#pragma unroll
  for (int step = kHostLanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < step && j + step < kUsed; ++j) sum[j] += sum[j + step];
  }
#pragma unroll
  for (int step = P / 2; step > 0; step /= 2) sum[0] += __shfl_xor_sync(kAll, sum[0], step);
  return sum[0];
}

}  // namespace moeaudit::kernels::cuda
