// Counts of choices: a table in shared memory a block, added to the result when the block is done.
#include <cuda_runtime.h>

#include "kernels/cuda/expert_load.h"
#include "kernels/cuda/launch.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostExperts = 4096;
constexpr std::int64_t kChoicesOfABlock = 1 << 16;

template <class Id>
__global__ void count_block(CountArgs<Id> a, unsigned long long* counts, unsigned long long* outside) {
  extern __shared__ unsigned table[];  // [experts + 1]
  const int experts = static_cast<int>(a.experts);
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) table[e] = 0;
  __syncthreads();
  const std::int64_t choices = a.tokens * a.top_k, first = static_cast<std::int64_t>(blockIdx.x) * kChoicesOfABlock;
  const std::int64_t last = first + kChoicesOfABlock < choices ? first + kChoicesOfABlock : choices;
  for (std::int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    if (a.valid != nullptr && a.valid[i / a.top_k] == 0) continue;
    const std::int64_t id = a.chosen[i];
    atomicAdd(table + (id >= 0 && id < experts ? static_cast<int>(id) : experts), 1u);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    if (table[e] != 0) atomicAdd(counts + e, static_cast<unsigned long long>(table[e]));
  }
  if (threadIdx.x == 0 && table[experts] != 0) atomicAdd(outside, static_cast<unsigned long long>(table[experts]));
}

template <class Id>
Status launch(const CountArgs<Id>& a, std::int64_t* counts, std::int64_t* outside, CUstream_st* stream) {
  if (const Status status = check_count(a, counts, outside); status != Status::kOk) return status;
  const std::int64_t blocks = parts(a.tokens * a.top_k, kChoicesOfABlock);
  if (a.experts > kMostExperts || blocks > 2147483647) return Status::kBadShape;
  const std::size_t bytes = static_cast<std::size_t>(a.experts) * sizeof *counts;
  if (cudaMemsetAsync(counts, 0, bytes, stream) != cudaSuccess ||
      cudaMemsetAsync(outside, 0, sizeof *outside, stream) != cudaSuccess)
    return Status::kLaunchFailed;
  if (blocks == 0) return Status::kOk;
  count_block<Id>
      <<<static_cast<unsigned>(blocks), kThreads, static_cast<std::size_t>(a.experts + 1) * sizeof(unsigned), stream>>>(
          a, reinterpret_cast<unsigned long long*>(counts), reinterpret_cast<unsigned long long*>(outside));
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

Status count_choices(const CountArgs<std::int16_t>& args, std::int64_t* counts, std::int64_t* outside,
                     CUstream_st* stream) {
  return launch(args, counts, outside, stream);
}
Status count_choices(const CountArgs<std::int32_t>& args, std::int64_t* counts, std::int64_t* outside,
                     CUstream_st* stream) {
  return launch(args, counts, outside, stream);
}

}  // namespace moeaudit::kernels::cuda
