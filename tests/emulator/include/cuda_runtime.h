// Stand-in for CUDA C++: see emulator.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // a block stays on its thread
#define threadIdx (::emulator::thread->index)
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::block->grid)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(4) ushort2 {
  unsigned short x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }

template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline int __double2loint(double v) { return static_cast<int>(std::bit_cast<unsigned long long>(v)); }
inline int __double2hiint(double v) { return static_cast<int>(std::bit_cast<unsigned long long>(v) >> 32); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 |
                               static_cast<unsigned>(low));
}
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }

inline void __syncthreads() { emulator::barrier(false); }
inline int __syncthreads_count(int yes) { return emulator::barrier(yes != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange("__syncwarp", mask, {}); }
namespace emulator {
/// What lane `from` hands over; it must be of the mask.
template <class T>
T value_of(const char* kind, unsigned mask, const T& mine, int from) {
  if (!(mask >> from & 1u)) fail("a shuffle from a lane outside the mask");
  return exchange_values(kind, mask, mine)[static_cast<std::size_t>(from)];
}
}  // namespace emulator
template <class T>
T __shfl_sync(unsigned mask, T mine, int from, int width = 32) {
  return emulator::value_of("__shfl_sync", mask, mine, emulator::lane() / width * width + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int step) {
  return emulator::value_of("__shfl_xor_sync", mask, mine, emulator::lane() ^ step);
}
namespace emulator {
template <class T, class F>
T reduce(const char* kind, unsigned mask, T mine, F f) {
  const auto all = exchange_values(kind, mask, mine);
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1u) mine = f(mine, all[l]);
  }
  return mine;
}
template <class T, class F>
unsigned lanes_where(const char* kind, unsigned mask, T mine, F f) {
  const auto all = exchange_values(kind, mask, mine);
  unsigned lanes = 0;
  for (unsigned l = 0; l < 32; ++l) lanes |= mask >> l & 1u & static_cast<unsigned>(f(all[l])) ? 1u << l : 0u;
  return lanes;
}
}  // namespace emulator
template <class T>
T __reduce_max_sync(unsigned mask, T v) {
  return emulator::reduce("__reduce_max_sync", mask, v, [](T a, T b) { return max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v) {
  return emulator::reduce("__reduce_min_sync", mask, v, [](T a, T b) { return min(a, b); });
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
  return emulator::lanes_where("__ballot_sync", mask, yes, [](int v) { return v != 0; });
}
inline int __any_sync(unsigned mask, int yes) {
  return emulator::lanes_where("__any_sync", mask, yes, [](int v) { return v != 0; }) != 0;
}
inline int __all_sync(unsigned mask, int yes) {
  return emulator::lanes_where("__all_sync", mask, yes, [](int v) { return v == 0; }) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  return emulator::lanes_where("__match_any_sync", mask, v, [v](T o) { return o == v; });
}
template <class T>
T atomicAdd(T* to, T v) {
  const T before = *to;
  *to = before + v;
  return before;
}
