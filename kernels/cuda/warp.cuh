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

}  // namespace moeaudit::kernels::cuda
