// Products on the tensor cores of compute capability 9.0 by four warps at once, with operands straight from shared
// memory: wgmma (PTX ISA 8.0, sections 9.7.14.4 and 9.7.14.5). Only sm_90a has it; elsewhere these are empty, and
// warpgroups_present() says so before anything is launched.
#pragma once

#include <cstdint>

#include "kernels/cuda/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOE_AUDIT_WGMMA
#endif

namespace moeaudit::kernels::cuda {

/// An operand's tile in shared memory: rows of 64 bfloat16 (128 bytes), panels of 64 columns one after the other, from
/// a multiple of 1024 bytes on. Within eight rows, chunk c (16 bytes) of row r lies where chunk c ^ r would: the
/// hardware's 128-byte swizzle.
template <int kRows>
struct SwizzledRows {
  static constexpr int kRowBytes = 128, kEqualRows = 8, kPanelBytes = kRows * kRowBytes;
  static __device__ int at(int row, int column) {
    return column / 64 * kPanelBytes + row * kRowBytes + ((column / 8 ^ row) & 7) * 16;
  }
};

/// How the hardware is told of a matrix in such a tile that begins at `address`. Eight rows are 1024 bytes from the
/// next eight; where the rows run along k, panels of 64 columns are panel_bytes apart (else no matrix leaves its
/// panel).
__device__ __forceinline__ std::uint64_t matrix_descriptor(std::uint32_t address, std::uint32_t panel_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | std::uint64_t{1024 / 16} << 32 | std::uint64_t{panel_bytes / 16 & 0x3fffu} << 16 |
         (address / 16 & 0x3fffu);
}

#ifndef MOE_AUDIT_EMULATED_CUDA  // mma.cuh has them then

/// What threads wrote to shared memory can be read by wgmma after a barrier.
__device__ __forceinline__ void publish_to_warpgroups() {
#ifdef MOE_AUDIT_WGMMA
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}
/// Before the first product of a batch: registers that threads wrote can be read.
__device__ __forceinline__ void begin_products() {
#ifdef MOE_AUDIT_WGMMA
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void end_products() {
#ifdef MOE_AUDIT_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
/// All but the last kPending batches are done.
template <int kPending>
__device__ __forceinline__ void wait_products() {
#ifdef MOE_AUDIT_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

#define MOE_AUDIT_EIGHT(i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// Thread t of the four warps has, of d, row t / 32 * 16 + t % 32 / 4 and columns 8 j + t % 4 * 2 and the next in 4 j
// and 4 j + 1, eight rows further down in 4 j + 2 and 4 j + 3.

/// d[64, 64] += a b, both in shared memory.
template <bool kAKNext, bool kBKNext>
__device__ __forceinline__ void warpgroup_multiply_add(std::uint64_t a, std::uint64_t b, float (&d)[32]) {
#ifdef MOE_AUDIT_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, 1, 1, 1, %34, %35;\n"
      : MOE_AUDIT_EIGHT(0), MOE_AUDIT_EIGHT(8), MOE_AUDIT_EIGHT(16), MOE_AUDIT_EIGHT(24)
      : "l"(a), "l"(b), "n"(!kAKNext), "n"(!kBKNext));
#endif
}
/// d[64, 128] += a b, both in shared memory.
template <bool kAKNext, bool kBKNext>
__device__ __forceinline__ void warpgroup_multiply_add(std::uint64_t a, std::uint64_t b, float (&d)[64]) {
#ifdef MOE_AUDIT_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, 1, 1, 1, %66, %67;\n"
      : MOE_AUDIT_EIGHT(0), MOE_AUDIT_EIGHT(8), MOE_AUDIT_EIGHT(16), MOE_AUDIT_EIGHT(24), MOE_AUDIT_EIGHT(32),
        MOE_AUDIT_EIGHT(40), MOE_AUDIT_EIGHT(48), MOE_AUDIT_EIGHT(56)
      : "l"(a), "l"(b), "n"(!kAKNext), "n"(!kBKNext));
#endif
}
/// The same with a[64, 16] in the registers of the warps, 16 rows each, as for multiply_add().
template <bool kBKNext>
__device__ __forceinline__ void warpgroup_multiply_add(const std::uint32_t (&a)[4], std::uint64_t b, float (&d)[32]) {
#ifdef MOE_AUDIT_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;\n"
      : MOE_AUDIT_EIGHT(0), MOE_AUDIT_EIGHT(8), MOE_AUDIT_EIGHT(16), MOE_AUDIT_EIGHT(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(!kBKNext));
#endif
}
#undef MOE_AUDIT_EIGHT

#endif

}  // namespace moeaudit::kernels::cuda
