// Counts of choices: a table in shared memory a block, added to the result when the block is done. Pairs of choices,
// and what routing_statistics() adds up.
#include <cuda_runtime.h>

#include "kernels/cuda/expert_load.h"
#include "kernels/cuda/token_sums.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kCountThreads = 256;
constexpr std::int64_t kMostExperts = 4096;
constexpr std::int64_t kChoicesOfABlock = 1 << 16;

template <class Id>
__global__ void count_block(CountArgs<Id> a, unsigned long long* counts, unsigned long long* outside) {
  MOE_AUDIT_DYNAMIC_SHARED(unsigned, table);  // [experts + 1]
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
  queue(count_block<Id>, static_cast<unsigned>(blocks), kCountThreads,
        static_cast<std::size_t>(a.experts + 1) * sizeof(unsigned), stream, a,
        reinterpret_cast<unsigned long long*>(counts), reinterpret_cast<unsigned long long*>(outside));
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

/// A thread a token.
__global__ void add_pairs(CountArgs<std::int32_t> a, unsigned long long* together) {
  const std::int64_t t = thread_index();
  if (t >= a.tokens || (a.valid != nullptr && a.valid[t] == 0)) return;
  const std::int32_t* chosen = a.chosen + t * a.top_k;
  for (std::int64_t i = 0; i < a.top_k; ++i) {
    for (std::int64_t j = 0; j < a.top_k; ++j) {
      if (is_pair(chosen, i, j, a.experts)) atomicAdd(together + chosen[i] * a.experts + chosen[j], 1ull);
    }
  }
}

/// Probabilities [experts], then entropy, then mass.
template <class T>
struct StatisticsColumn {
  RoutingStatisticsArgs<T> a;
  const double *entropy, *mass;
  __device__ void operator()(std::int64_t t, std::int64_t c, double& sum) const {
    sum += c < a.experts    ? static_cast<double>(a.probabilities[t * a.experts + c])
           : c == a.experts ? entropy[t]
                            : mass[t];
  }
};

template <class T>
__global__ void statistics_tokens(RoutingStatisticsArgs<T> a, double* entropy, double* mass) {
  const std::int64_t t = thread_index();
  if (t >= a.tokens) return;
  entropy[t] = token_entropy(a, t);
  mass[t] = chosen_mass(a, t);
}

__global__ void finish_statistics(Sums s, std::int64_t experts, RoutingStatistics* out) {
  add_stretches(s, false);
  if (threadIdx.x == 0)
    *out = finish_routing_statistics(s.sum, experts, s.sum[experts], s.sum[experts + 1],
                                     static_cast<std::int64_t>(*s.counted));
}

struct StatisticsRoom {
  Sums sums;
  double *entropy, *mass;
};
StatisticsRoom statistics_room(Room& room, std::int64_t tokens, std::int64_t experts) {
  return {sums_in(room, tokens, experts + 2), room.take<double>(tokens), room.take<double>(tokens)};
}

template <class T>
Status launch(const RoutingStatisticsArgs<T>& a, RoutingStatistics* out, void* workspace, CUstream_st* stream) {
  if (const Status status = check_routing_statistics(a, out); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.tokens);
  if (blocks > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  const StatisticsRoom s = statistics_room(room, a.tokens, a.experts);
  if (blocks > 0) queue(statistics_tokens<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.entropy, s.mass);
  if (!sum_tokens(a.tokens, a.valid, StatisticsColumn<T>{a, s.entropy, s.mass}, s.sums, stream))
    return Status::kLaunchFailed;
  queue(finish_statistics, 1, kThreads, 0, stream, s.sums, a.experts, out);
  return launched();
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

Status co_activation(const CountArgs<std::int32_t>& args, std::int64_t* together, CUstream_st* stream) {
  if (const Status status = check_count(args, together, together); status != Status::kOk) return status;
  const std::int64_t blocks = thread_index_blocks(args.tokens);
  if (blocks > kMostBlocks) return Status::kBadShape;
  const auto bytes = static_cast<std::size_t>(args.experts * args.experts) * sizeof *together;
  if (cudaMemsetAsync(together, 0, bytes, stream) != cudaSuccess) return Status::kLaunchFailed;
  if (blocks > 0)
    queue(add_pairs, static_cast<unsigned>(blocks), kThreads, 0, stream, args,
          reinterpret_cast<unsigned long long*>(together));
  return launched();
}

std::size_t routing_statistics_workspace(std::int64_t tokens, std::int64_t experts) {
  Room room(nullptr);
  statistics_room(room, tokens, experts);
  return room.used();
}
Status routing_statistics(const RoutingStatisticsArgs<float>& args, RoutingStatistics* out, void* workspace,
                          CUstream_st* stream) {
  return launch(args, out, workspace, stream);
}
Status routing_statistics(const RoutingStatisticsArgs<double>& args, RoutingStatistics* out, void* workspace,
                          CUstream_st* stream) {
  return launch(args, out, workspace, stream);
}

}  // namespace moeaudit::kernels::cuda
