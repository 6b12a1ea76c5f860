// What products on tensor cores are made of (sm_80 and later): copies into shared memory that run by themselves,
// matrices of 8 by 8 from shared memory into registers, and mma of bfloat16 with float32 sums. PTX ISA 8.0,
// sections 9.7.8.24, 9.7.13.4 and 9.7.13.4.15.
#pragma once

#include <cstdint>

#ifdef MOE_AUDIT_EMULATED_CUDA
#include "emulated_mma.h"
#else

namespace moeaudit::kernels::cuda {

/// An address in shared memory, as these instructions take it.
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// 16 bytes, or 16 zeros where they are not `there`; `from` must be readable memory either way.
__device__ __forceinline__ void copy_16(std::uint32_t to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;  // the rest becomes 0
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(std::uint32_t address, std::uint32_t* out) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

/// sum[16, 8] += a[16, 16] b[8, 16]
__device__ __forceinline__ void multiply_add(const std::uint32_t* a, const std::uint32_t* b, float* sum) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace moeaudit::kernels::cuda

#endif
