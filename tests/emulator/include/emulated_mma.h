// What kernels/cuda/mma.cuh and wgmma.cuh are on the host: the layouts of fragments and shared memory of the PTX ISA.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace moeaudit::kernels::cuda {

inline std::uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

inline void copy_16(std::uint32_t to, const void* from, bool there) {
  emulator::begin(emulator::thread->copies, emulator::block->copies_at_once, [=] {
    emulator::at_shared(to + 15);
    if (there)
      std::memcpy(emulator::at_shared(to), from, 16);
    else
      std::memset(emulator::at_shared(to), 0, 16);
  });
}
inline void end_copies() {
  emulator::thread->copy_groups.push_back(std::move(emulator::thread->copies));
  emulator::thread->copies.clear();
}
template <int kPending>
void wait_copies() {
  emulator::finish_groups(emulator::thread->copy_groups, kPending);
}

inline float bfloat16_at(std::uint32_t address) {
  std::uint16_t bits = 0;
  emulator::at_shared(address + 1);
  std::memcpy(&bits, emulator::at_shared(address), 2);
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}
inline float half_of(std::uint32_t pair, int which) {
  return std::bit_cast<float>(which == 0 ? pair << 16 : pair & 0xffff0000u);
}

/// PTX ISA, ldmatrix: lane l gets elements 2 (l % 4) and the next of row l / 4, or of column l / 4.
template <bool kTransposed>
void load_matrices(std::uint32_t address, std::uint32_t* out) {
  const auto rows = emulator::exchange_values("ldmatrix", 0xffffffffu, address);
  const unsigned lane = static_cast<unsigned>(emulator::lane());
  for (unsigned m = 0; m < 4; ++m) {
    out[m] = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned row = kTransposed ? lane % 4 * 2 + i : lane / 4,
                     column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
      if (rows[m * 8 + row] % 16 != 0) emulator::fail("ldmatrix: a row is not aligned to 16 bytes");
      out[m] |= std::bit_cast<std::uint32_t>(bfloat16_at(rows[m * 8 + row] + 2 * column)) >> 16 << 16 * i;
    }
  }
}

/// PTX ISA, mma.m16n8k16: of a, lane l has row l / 4 and columns 2 (l % 4), 2 (l % 4) + 1; then 8 rows further, then 8
/// columns further; of b, the same with rows for columns; of the sum, row l / 4 and columns 2 (l % 4) and the next.
inline void multiply_add(const std::uint32_t* a, const std::uint32_t* b, float* sum) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  };
  const auto all = emulator::exchange_values("mma", 0xffffffffu, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned lane = static_cast<unsigned>(emulator::lane());
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float s = sum[i];
    for (unsigned k = 0; k < 16; ++k) {
      const float x = half_of(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
      const float y = half_of(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      s += x * y;
    }
    sum[i] = s;
  }
}

// ---- wgmma

/// PTX ISA, matrix descriptor, and the canonical layouts of the 128-byte swizzle: element (across, k) of a matrix of 16
/// along k. k next: rows of 128 bytes, eight rows every `stride` bytes. Rows along k: 64 across and 8 along k lie
/// together; the next 64 across are `leading` bytes on, the next 8 along k `stride` bytes.
template <bool kKNext>
float matrix_at(std::uint64_t descriptor, unsigned across, unsigned k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    emulator::fail("wgmma: not a 128-byte swizzle from offset 0");
  const auto start = static_cast<std::uint32_t>(descriptor & 0x3fff) * 16;
  const auto leading = static_cast<std::uint32_t>(descriptor >> 16 & 0x3fff) * 16;
  const auto stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) * 16;
  const std::uint32_t plain = kKNext ? start + across / 8 * stride + across % 8 * 128 + 2 * k
                                     : start + across / 64 * leading + k / 8 * stride + k % 8 * 128 + 2 * (across % 64);
  return bfloat16_at(plain ^ (plain >> 3 & 0x70));  // address bits 4 to 6 by bits 7 to 9
}

inline void publish_to_warpgroups() {}
inline void begin_products() {}
inline void end_products() {
  emulator::exchange("wgmma.commit_group", 0xffffffffu, {});
  emulator::thread->product_groups.push_back(std::move(emulator::thread->products));
  emulator::thread->products.clear();
}
template <int kPending>
void wait_products() {
  emulator::exchange("wgmma.wait_group", 0xffffffffu, {});
  emulator::finish_groups(emulator::thread->product_groups, kPending);
}

/// The products of a thread: a(row of this warp's 16, k) gives a.
template <bool kBKNext, std::size_t kSums, class A>
void queue_product(A a, std::uint64_t b, float (&d)[kSums]) {
  float* sums = d;
  emulator::begin(emulator::thread->products, !emulator::block->copies_at_once, [=] {
    const auto lane = static_cast<unsigned>(emulator::lane());
    for (unsigned i = 0; i < kSums; ++i) {
      const unsigned row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float s = sums[i];
      for (unsigned k = 0; k < 16; ++k) s += a(row, k) * matrix_at<kBKNext>(b, column, k);
      sums[i] = s;
    }
  });
}
template <bool kAKNext, bool kBKNext, std::size_t kSums>
void warpgroup_multiply_add(std::uint64_t a, std::uint64_t b, float (&d)[kSums]) {
  const auto first = static_cast<unsigned>(emulator::thread->rank) / 32 % 4 * 16;
  queue_product<kBKNext>([=](unsigned row, unsigned k) { return matrix_at<kAKNext>(a, first + row, k); }, b, d);
}
template <bool kBKNext, std::size_t kSums>
void warpgroup_multiply_add(const std::uint32_t (&a)[4], std::uint64_t b, float (&d)[kSums]) {
  using Fragment = std::array<std::uint32_t, 4>;
  const auto values = emulator::exchange_values("wgmma", 0xffffffffu, Fragment{a[0], a[1], a[2], a[3]});
  std::array<Fragment, 32> all;
  for (std::size_t l = 0; l < 32; ++l) all[l] = values[l];
  queue_product<kBKNext>(
      [=](unsigned row, unsigned k) { return half_of(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2); }, b,
      d);
}

}  // namespace moeaudit::kernels::cuda
