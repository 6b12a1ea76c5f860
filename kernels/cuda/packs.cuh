// Values of 16 bytes at a time, and sums that a warp shares in the host's order.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/host/permute.h"

namespace moeaudit::kernels::cuda {

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};
template <int V, class T>
__device__ inline Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <class T, int V>
__device__ inline void store_pack(T* to, const Pack<T, V>& v) {
  *reinterpret_cast<Pack<T, V>*>(to) = v;
}

/// Calls launch(V) with the values of T in 16 bytes, as a constant, if `count` and the pointers allow it, else with 1.
template <class T, class Launch>
void in_packs(std::int64_t count, std::initializer_list<const void*> pointers, Launch launch) {
  constexpr int kMost = 16 / sizeof(T);
  bool aligned = count % kMost == 0;
  for (const void* p : pointers) aligned = aligned && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  if (aligned)
    launch(std::integral_constant<int, kMost>());
  else
    launch(std::integral_constant<int, 1>());
}

/// dot_by_lanes(), by all lanes of a warp; every lane gets the result.
template <class T>
__device__ inline Wide<T> warp_dot(const T* a, const T* b, std::int64_t count) {
  const Wide<T> mine = dot_of_lane(a, b, count, threadIdx.x % kLanes);
  Wide<T> sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += __shfl_sync(0xffffffffu, mine, i);
  return sum;
}

}  // namespace moeaudit::kernels::cuda
