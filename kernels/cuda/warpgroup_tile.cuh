// tensor_core_tile.cuh's Tile, with the same conditions, by wgmma: four warps own 64 rows of C and multiply straight
// from shared memory, at twice the rate of mma. Compute capability 9.0 alone.
#pragma once

#include "kernels/cuda/tensor_core_tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace moeaudit::kernels::cuda {

/// kPending: stretches that may still be multiplied when the next is begun; each costs a stage.
template <int kM, int kN, bool kAKNext, bool kBKNext, int kStages, int kPending>
struct WarpgroupTile {
  static constexpr int kThreads = 2 * kM, kK = 64, kAhead = kStages - 1 - kPending;
  static constexpr int kWide = kN < 128 ? kN : 128, kPieces = kN / kWide;  // of one product
  static_assert(kM % 64 == 0 && kN % 64 == 0 && kAhead > 0);
  static constexpr int kARows = kAKNext ? kM : kK, kAColumns = kAKNext ? kK : kM;
  static constexpr int kBRows = kBKNext ? kN : kK, kBColumns = kBKNext ? kK : kN;
  using APlace = SwizzledRows<kARows>;
  using BPlace = SwizzledRows<kBRows>;
  static constexpr int kABytes = kM * kK * 2, kBBytes = kN * kK * 2, kAlign = 1024;
  static constexpr int kCStride = kN + 8;
  static constexpr int kStagesBytes = kStages * (kABytes + kBBytes), kCBytes = kM * kCStride * 4;
  static constexpr int kSharedBytes = kStagesBytes + kAlign;
  static constexpr int kSharedBytesWithC = (kStagesBytes > kCBytes ? kStagesBytes : kCBytes) + kAlign;

  float sum[kPieces][kWide / 2] = {};

  __device__ void run(const Matrix& a, const Matrix& b, std::int64_t m, std::int64_t n, std::int64_t first,
                      std::int64_t last, char* shared) {
    const std::uint32_t base = (shared_address(shared) + kAlign - 1) / kAlign * kAlign;
    const std::uint32_t group = threadIdx.x / 128;  // of four warps
    const std::uint32_t a_at = base + group * (kAKNext ? 64 * APlace::kRowBytes : APlace::kPanelBytes);
    const std::uint32_t b_at = base + kStages * kABytes;
    Fetcher<kThreads, kARows, kAColumns, kAKNext, APlace> fetch_a(a, m, first);
    Fetcher<kThreads, kBRows, kBColumns, kBKNext, BPlace> fetch_b(b, n, first);
    const auto steps = static_cast<int>((last - first + kK - 1) / kK);
    int k_left = last - first < (1 << 30) ? static_cast<int>(last - first) : 1 << 30;
    int filling = 0, fetched = 0;  // the stage that is filled next; stretches asked for
    const auto fetch = [&] {
      if (fetched < steps) {
        fetch_a.fetch(base + filling * kABytes, k_left, a.stride);
        fetch_b.fetch(b_at + filling * kBBytes, k_left, b.stride);
        k_left -= kK;
      }
      end_copies();
      ++fetched;
      filling = filling + 1 == kStages ? 0 : filling + 1;
    };
    for (int s = 0; s < kAhead; ++s) fetch();
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
      wait_copies<kAhead - 1>();
      publish_to_warpgroups();
      __syncthreads();  // the stretch is there for all, and all are done with the one that is overwritten next
      fetch();
      begin_products();
#pragma unroll
      for (int k = 0; k < kK; k += 16) {
        // 16 further along k: 32 bytes in each row, or 16 rows.
        const std::uint32_t a_k = kAKNext ? 2 * k : k * APlace::kRowBytes,
                            b_k = kBKNext ? 2 * k : k * BPlace::kRowBytes;
        const std::uint64_t am = matrix_descriptor(a_at + stage * kABytes + a_k, APlace::kPanelBytes);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const std::uint32_t across = piece * kWide * (kBKNext ? BPlace::kRowBytes : BPlace::kPanelBytes / 64);
          warpgroup_multiply_add<kAKNext, kBKNext>(
              am, matrix_descriptor(b_at + stage * kBBytes + across + b_k, BPlace::kPanelBytes), sum[piece]);
        }
      }
      end_products();
      wait_products<kPending>();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    wait_products<0>();
    wait_copies<0>();
    __syncthreads();
  }

  /// f(row, column, C[row, column], C[row, column + 1]) for every pair of this thread.
  template <class F>
  __device__ void for_each_pair(F f) const {
    const int row = static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int j = 0; j < kWide / 8; ++j)
          f(row + half * 8, column + piece * kWide + j * 8, sum[piece][4 * j + 2 * half],
            sum[piece][4 * j + 2 * half + 1]);
      }
    }
  }
};

}  // namespace moeaudit::kernels::cuda
