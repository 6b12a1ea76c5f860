// What the launches of all kernels share: one form for them, so that tests/emulator can run the same sources on the
// host.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace moeaudit::kernels::cuda {

/// Parts of `part` elements that cover n: blocks of a grid, stretches of a sum.
__host__ __device__ inline std::int64_t parts(std::int64_t n, std::int64_t part) { return (n + part - 1) / part; }

#ifdef __CUDACC__

/// Queues kernel(args...) on `stream`; what went wrong shows in cudaGetLastError().
template <class... P, class... A>
void queue(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, CUstream_st* stream,
           const A&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
}
/// `name`: the shared memory that the launch asked for, as an array of T.
#define MOE_AUDIT_DYNAMIC_SHARED(T, name) extern __shared__ __align__(128) T name[]

#else

using emulator::queue;
#define MOE_AUDIT_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emulator::dynamic_shared())

#endif

}  // namespace moeaudit::kernels::cuda
