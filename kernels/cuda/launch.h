// What the launches of all kernels share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moeaudit::kernels::cuda {

/// Parts of `part` elements that cover n: blocks of a grid, stretches of a sum.
__host__ __device__ inline std::int64_t parts(std::int64_t n, std::int64_t part) { return (n + part - 1) / part; }

}  // namespace moeaudit::kernels::cuda
