// That the emulator runs kernels by the rules, and that what breaks the rules shows.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_core_tile.cuh"
#include "kernels/cuda/warpgroup_tile.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr unsigned kEvery = 0xffffffffu;

struct InOrder {
  explicit InOrder(const char* order) { setenv("MOE_AUDIT_EMULATED_ORDER", order, 1); }
  ~InOrder() { unsetenv("MOE_AUDIT_EMULATED_ORDER"); }
};
const char* const kOrders[] = {"forward", "backward", "1", "2"};

std::string error_of_last_launch() { return cudaGetErrorString(cudaDeviceSynchronize()); }

/// Each thread takes what its neighbour wrote.
__global__ void take(bool waits, int* out) {
  MOE_AUDIT_DYNAMIC_SHARED(int, shared);
  const unsigned i = threadIdx.x, n = blockDim.x;
  shared[i] = static_cast<int>(i);
  if (waits) __syncthreads();
  out[blockIdx.x * n + i] = shared[(i + 1) % n];
}

TEST(Emulator, AMissingBarrierShows) {
  for (const bool waits : {true, false}) {
    int wrong = 0;
    for (const char* name : kOrders) {
      const InOrder order(name);
      std::vector<int> out(2 * 96);
      queue(take, 2, 96, 96 * sizeof(int), nullptr, waits, out.data());
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      for (std::size_t i = 0; i < out.size(); ++i) wrong += out[i] != static_cast<int>(i + 1) % 96;
    }
    EXPECT_EQ(wrong > 0, !waits);
  }
}

__global__ void sum_of_warp(int* out) {
  int v = static_cast<int>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kEvery, v, step);
  const unsigned odd = __ballot_sync(kEvery, threadIdx.x % 2);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = odd == 0xaaaaaaaau ? v : -1;
}
__global__ void half_returns() {
  if (threadIdx.x % 2 == 0) __shfl_sync(kEvery, 1, 0);
}
__global__ void two_kinds() {
  if (threadIdx.x % 2 == 0)
    __syncwarp();
  else
    __any_sync(kEvery, 1);
}
__global__ void barrier_and_collective() {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void barrier_of_half() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void from_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 16);
}

TEST(Emulator, Collectives) {
  for (const char* name : kOrders) {
    const InOrder order(name);
    std::vector<int> out(3);
    queue(sum_of_warp, 1, 96, 0, nullptr, out.data());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(out, (std::vector<int>{496, 496 + 32 * 32, 496 + 64 * 32}));
  }
}

TEST(Emulator, WhatWouldHangOrIsUndefinedIsAnError) {
  queue(half_returns, 1, 32, 0, nullptr);
  EXPECT_NE(error_of_last_launch().find("which has returned"), std::string::npos);
  queue(two_kinds, 1, 32, 0, nullptr);
  EXPECT_NE(error_of_last_launch().find("meets"), std::string::npos);
  queue(barrier_and_collective, 1, 32, 0, nullptr);
  EXPECT_NE(error_of_last_launch().find("for ever"), std::string::npos);
  queue(barrier_of_half, 1, 64, 0, nullptr);
  EXPECT_NE(error_of_last_launch().find("__syncthreads"), std::string::npos);
  queue(from_outside, 1, 32, 0, nullptr);
  EXPECT_NE(error_of_last_launch().find("outside the mask"), std::string::npos);
  queue(half_returns, 1, 2048, 0, nullptr);
  EXPECT_NE(error_of_last_launch().find("configuration"), std::string::npos);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // it was told
}

__global__ void copy(bool waits, const int* from, int* out) {
  MOE_AUDIT_DYNAMIC_SHARED(int, shared);
  copy_16(shared_address(shared), from, true);
  end_copies();
  if (waits) wait_copies<0>();
  for (int i = 0; i < 4; ++i) out[i] = shared[i];
}

TEST(Emulator, ACopyThatNobodyWaitsForIsNotThere) {
  const InOrder late("backward");
  const std::vector<int> from{1, 2, 3, 4};
  std::vector<int> out(4);
  queue(copy, 1, 1, 16, nullptr, false, from.data(), out.data());
  EXPECT_EQ(out[0], static_cast<int>(0xa5a5a5a5u));
  queue(copy, 1, 1, 16, nullptr, true, from.data(), out.data());
  EXPECT_EQ(out, from);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

/// C of one tile; small whole numbers, so that every order of sums has one result.
template <class T, bool kAKNext, bool kBKNext>
__global__ void multiply(Matrix a, Matrix b, std::int64_t k, float* c, int columns) {
  MOE_AUDIT_DYNAMIC_SHARED(char, shared);
  T tile;
  tile.run(a, b, 0, 0, 0, k, shared);
  tile.for_each_pair([&](int row, int column, float left, float right) {
    c[row * columns + column] = left, c[row * columns + column + 1] = right;
  });
}

template <class T, int kM, int kN, bool kAKNext, bool kBKNext>
void check_tile() {
  const std::int64_t k = 200;  // not whole stretches
  std::vector<__nv_bfloat16> a(kM * k), b(kN * k);
  std::vector<float> c(kM * kN, -7.0f);
  const auto value = [](std::int64_t i, std::int64_t j, int seed) {
    return static_cast<float>((i * 7 + j * 3 + i * j + seed) % 9 - 4);
  };
  for (std::int64_t j = 0; j < k; ++j) {
    for (std::int64_t i = 0; i < kM; ++i) a[kAKNext ? i * k + j : j * kM + i] = __nv_bfloat16(value(i, j, 0));
    for (std::int64_t i = 0; i < kN; ++i) b[kBKNext ? i * k + j : j * kN + i] = __nv_bfloat16(value(i, j, 1));
  }
  const Matrix ma = kAKNext ? Matrix{a.data(), k, kM, k} : Matrix{a.data(), kM, k, kM};
  const Matrix mb = kBKNext ? Matrix{b.data(), k, kN, k} : Matrix{b.data(), kN, k, kN};
  queue(multiply<T, kAKNext, kBKNext>, 1, T::kThreads, T::kSharedBytes, nullptr, ma, mb, k, c.data(), kN);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (std::int64_t i = 0; i < kM; ++i) {
    for (std::int64_t n = 0; n < kN; ++n) {
      float sum = 0;
      for (std::int64_t j = 0; j < k; ++j) sum += value(i, j, 0) * value(n, j, 1);
      ASSERT_EQ(c[static_cast<std::size_t>(i * kN + n)], sum) << i << ", " << n;
    }
  }
}

TEST(Emulator, TilesOfTensorCores) {
  for (const char* name : kOrders) {
    const InOrder order(name);
    check_tile<Tile<64, 32, 2, 1, true, true>, 64, 32, true, true>();
    check_tile<Tile<64, 64, 1, 2, true, false>, 64, 64, true, false>();
    check_tile<Tile<128, 64, 2, 2, false, false>, 128, 64, false, false>();
    check_tile<WarpgroupTile<64, 64, true, true, 3, 0>, 64, 64, true, true>();
    check_tile<WarpgroupTile<128, 128, true, false, 3, 0>, 128, 128, true, false>();
    check_tile<WarpgroupTile<128, 64, false, true, 3, 1>, 128, 64, false, true>();
    check_tile<WarpgroupTile<128, 256, false, false, 4, 1>, 128, 256, false, false>();
  }
}

}  // namespace
}  // namespace moeaudit::kernels::cuda
