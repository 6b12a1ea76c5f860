// One tile of a bfloat16 matrix product on tensor cores, by one block: C = A B with float32 sums. What the fused gate,
// its gradients and other products of bfloat16 share.
//
// An operand lies in memory with its rows along m (or n) and k next to each other ("k next"), or with its rows along k.
// Rows beyond the matrices count as zero; so must columns up to the next multiple of 8. Stretches of 64 along k go
// through shared memory, kStages of them at a time by cp.async; within a stretch the products are added 16 at a time by
// mma, in ascending k, so the sums have the same order in every launch. Inside one mma the order is the hardware's
// (bounds::tensor_core_dot()). Leading dimensions must be multiples of 8 and the pointers aligned to 16 bytes.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/mma.cuh"

namespace moeaudit::kernels::cuda {

struct Matrix {
  const __nv_bfloat16* data;
  std::int64_t stride;  // between rows
  std::int64_t rows, columns;
};

/// Brings stretches of 64 along k of an operand into shared memory, one after the other: kRows by kColumns elements of
/// it, at Place::at(row, column) bytes from the start of a stage. A thread always fetches the same column of chunks (16
/// bytes each) of rows a fixed step apart, so nothing but a pointer moves.
template <int kThreads, int kRows, int kColumns, bool kKNext, class Place>
struct Fetcher {
  static constexpr int kChunks = kColumns / 8, kStep = kThreads / kChunks, kTimes = (kRows + kStep - 1) / kStep;
  static_assert(kThreads % kChunks == 0 && kStep % Place::kEqualRows == 0);
  const __nv_bfloat16* from;
  std::int64_t row_step;
  unsigned to;      // where this thread's first chunk goes, from the start of a stage
  int row, column;  // of that chunk within the stretch
  int other_left;   // rows (or columns) of the matrix from the start of the tile on, across k

  __device__ Fetcher(const Matrix& m, std::int64_t across, std::int64_t k) {
    row = static_cast<int>(threadIdx.x) / kChunks, column = static_cast<int>(threadIdx.x) % kChunks * 8;
    row_step = kStep * m.stride;
    from = m.data + ((kKNext ? across : k) + row) * m.stride + (kKNext ? k : across) + column;
    to = static_cast<unsigned>(Place::at(row, column));
    const std::int64_t left = (kKNext ? m.rows : m.columns) - across;
    other_left = static_cast<int>(left < 4096 ? left : 4096);
  }
  /// The stretch that begins here, of which k_left elements along k are inside; moves on to the next.
  __device__ void fetch(unsigned stage, int k_left, std::int64_t stride) {
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int r = row + i * kStep;
      if (kRows % kStep != 0 && r >= kRows) break;
      const bool inside = kKNext ? r < other_left && column < k_left : r < k_left && column < other_left;
      copy_16(stage + to + i * kStep * Place::kRowBytes, inside ? from + i * row_step : from, inside);
    }
    from += kKNext ? 64 : 64 * stride;
  }
};

/// Rows one after the other, each with 16 bytes to spare: eight rows of a matrix then lie in different banks.
template <int kColumns>
struct PaddedRows {
  static constexpr int kStride = kColumns + 8, kRowBytes = 2 * kStride, kEqualRows = 1;
  static __device__ int at(int row, int column) { return row * kRowBytes + 2 * column; }
};

template <int kM, int kN, int kWarpsM, int kWarpsN, bool kAKNext, bool kBKNext, int kStages = 3>
struct Tile {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kK = 64;
  static constexpr int kARows = kAKNext ? kM : kK, kAColumns = kAKNext ? kK : kM;
  static constexpr int kBRows = kBKNext ? kN : kK, kBColumns = kBKNext ? kK : kN;
  using APlace = PaddedRows<kAColumns>;
  using BPlace = PaddedRows<kBColumns>;
  static constexpr int kAStride = APlace::kStride, kBStride = BPlace::kStride;
  static constexpr int kAElements = kARows * kAStride, kBElements = kBRows * kBStride;
  static constexpr int kCStride = kN + 8;  // rows of share() begin 8 banks apart
  static constexpr int kStagesBytes = kStages * (kAElements + kBElements) * 2, kCBytes = kM * kCStride * 4;
  static constexpr int kSharedBytes = kStagesBytes;                                          // of run() alone
  static constexpr int kSharedBytesWithC = kStagesBytes > kCBytes ? kStagesBytes : kCBytes;  // of run() and share()
  static constexpr int kWarpM = kM / kWarpsM / 16, kWarpN = kN / kWarpsN / 16;               // in squares of 16

  /// This thread's part of C: pairs of columns.
  float sum[kWarpM][2 * kWarpN][4] = {};

  /// C of rows [m, m + kM) and columns [n, n + kN), over k in [first, last). All threads of the block take part; the
  /// shared memory is theirs again when it returns.
  __device__ void run(const Matrix& a, const Matrix& b, std::int64_t m, std::int64_t n, std::int64_t first,
                      std::int64_t last, char* shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int wm = warp / kWarpsN * kWarpM * 16, wn = warp % kWarpsN * kWarpN * 16;
    // Where this lane's row of the 8 by 8 matrices begins; four of them make 16 by 16.
    const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const int a_at = kAKNext ? (wm + middle + low) * kAStride + high : (high + low) * kAStride + wm + middle;
    const int b_at = kBKNext ? (wn + high + low) * kBStride + middle : (middle + low) * kBStride + wn + high;
    const std::uint32_t base = shared_address(shared);
    Fetcher<kThreads, kARows, kAColumns, kAKNext, APlace> fetch_a(a, m, first);
    Fetcher<kThreads, kBRows, kBColumns, kBKNext, BPlace> fetch_b(b, n, first);
    const auto steps = static_cast<int>((last - first + kK - 1) / kK);
    int k_left = last - first < (1 << 30) ? static_cast<int>(last - first) : 1 << 30;
    int filling = 0, fetched = 0;  // the stage that is filled next; stretches asked for
    const auto fetch = [&] {
      if (fetched < steps) {
        fetch_a.fetch(base + filling * kAElements * 2, k_left, a.stride);
        fetch_b.fetch(base + (kStages * kAElements + filling * kBElements) * 2, k_left, b.stride);
        k_left -= kK;
      }
      end_copies();
      ++fetched;
      filling = filling + 1 == kStages ? 0 : filling + 1;
    };
    for (int s = 0; s < kStages - 1; ++s) fetch();
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // the stretch is there for all, and all are done with the one that is overwritten next
      fetch();
      const std::uint32_t as = base + stage * kAElements * 2,
                          bs = base + (kStages * kAElements + stage * kBElements) * 2;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      // The matrices of the next 16 along k are under way while the present ones are multiplied.
      std::uint32_t fa[2][kWarpM][4], fb[2][kWarpN][4];
      const auto matrices = [&](int k, int buffer) {
#pragma unroll
        for (int i = 0; i < kWarpM; ++i)
          load_matrices<!kAKNext>(as + 2 * (a_at + (kAKNext ? i * 16 * kAStride + k : k * kAStride + i * 16)),
                                  fa[buffer][i]);
#pragma unroll
        for (int j = 0; j < kWarpN; ++j)
          load_matrices<!kBKNext>(bs + 2 * (b_at + (kBKNext ? j * 16 * kBStride + k : k * kBStride + j * 16)),
                                  fb[buffer][j]);
      };
      matrices(0, 0);
#pragma unroll
      for (int k = 0; k < kK; k += 16) {
        const int now = k / 16 % 2;
        if (k + 16 < kK) matrices(k + 16, 1 - now);
#pragma unroll
        for (int i = 0; i < kWarpM; ++i) {
#pragma unroll
          for (int j = 0; j < 2 * kWarpN; ++j) multiply_add(fa[now][i], fb[now][j / 2] + j % 2 * 2, sum[i][j]);
        }
      }
    }
    wait_copies<0>();
    __syncthreads();
  }

  /// f(row, column, C[row, column], C[row, column + 1]) for every pair of this thread.
  template <class F>
  __device__ void for_each_pair(F f) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int row = warp / kWarpsN * kWarpM * 16 + lane / 4, column = warp % kWarpsN * kWarpN * 16 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kWarpM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 2 * kWarpN; ++j)
          f(row + i * 16 + half * 8, column + j * 8, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      }
    }
  }
};

/// C of a tile as float [kM][kCStride] in shared memory, for all threads of the block.
template <class T>
__device__ float* share(const T& tile, char* shared) {
  auto* c = reinterpret_cast<float*>(shared);
  tile.for_each_pair([&](int row, int column, float left, float right) {
    *reinterpret_cast<float2*>(c + row * T::kCStride + column) = make_float2(left, right);
  });
  __syncthreads();
  return c;
}

}  // namespace moeaudit::kernels::cuda
