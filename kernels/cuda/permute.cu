// Permute and combine. The sort: slots are cut into chunks, the choices of each chunk counted, the counts turned into
// the first row of every (chunk, expert), and then one warp a chunk hands out rows 32 slots at a time, in their order.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/permute.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 1024;  // slots of one warp
constexpr unsigned kAll = 0xffffffffu;

__device__ bool goes_somewhere(const PermuteArgs& a, std::int64_t slot) {
  const std::int32_t e = a.chosen[slot];
  return e >= 0 && e < a.experts && (a.place == nullptr || (a.place[slot] >= 0 && a.place[slot] < a.capacity));
}

__global__ void count_chunks(PermuteArgs a, unsigned long long* counts) {
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot < a.tokens * a.top_k && goes_somewhere(a, slot))
    atomicAdd(counts + slot / kChunk * a.experts + a.chosen[slot], 1ull);
}

/// One block: counts become first rows.
__global__ void first_rows(PermuteArgs a, std::int64_t chunks, std::int64_t* counts, std::int64_t* offsets) {
  for (std::int64_t e = threadIdx.x; e < a.experts; e += blockDim.x) {
    std::int64_t sum = 0;
    for (std::int64_t c = 0; c < chunks; ++c) {
      const std::int64_t n = counts[c * a.experts + e];
      counts[c * a.experts + e] = sum;
      sum += n;
    }
    offsets[e + 1] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    offsets[0] = 0;
    for (std::int64_t e = 0; e < a.experts; ++e) offsets[e + 1] += offsets[e];
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < chunks * a.experts; i += blockDim.x) counts[i] += offsets[i % a.experts];
}

/// Block of one warp: a chunk, whose next rows lie in first[chunk, experts].
__global__ void hand_out(PermuteArgs a, std::int64_t* first, Permutation r) {
  const std::int64_t slots = a.tokens * a.top_k, begin = static_cast<std::int64_t>(blockIdx.x) * kChunk;
  volatile std::int64_t* next = first + static_cast<std::int64_t>(blockIdx.x) * a.experts;
  const unsigned lane = threadIdx.x;
  for (std::int64_t at = begin; at < begin + kChunk && at < slots; at += 32) {
    const std::int64_t slot = at + lane;
    const bool in = slot < slots && goes_somewhere(a, slot);
    const std::int32_t e = in ? a.chosen[slot] : -1;
    const unsigned peers = __match_any_sync(kAll, e);  // lanes with the same expert; lower lanes come first
    const unsigned before = __popc(peers & ((1u << lane) - 1u));
    std::int64_t row = -1;
    if (in) row = next[e] + before;
    __syncwarp();
    if (in && before == 0) next[e] = row + __popc(peers);
    __syncwarp();
    if (slot < slots) r.row_of_slot[slot] = static_cast<std::int32_t>(row);
    if (in) r.slot_of_row[row] = static_cast<std::int32_t>(slot);
  }
}

__global__ void to_places(PermuteArgs a, Permutation r) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i <= a.experts) r.offsets[i] = i * a.capacity;
  if (i >= a.tokens * a.top_k) return;
  const bool in = goes_somewhere(a, i);
  const std::int64_t row = in ? a.chosen[i] * a.capacity + a.place[i] : -1;
  r.row_of_slot[i] = static_cast<std::int32_t>(row);
  if (in) r.slot_of_row[row] = static_cast<std::int32_t>(i);
}

Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed; }

/// Block: a row. V values a thread at a time, 16 bytes where the rows allow it.
template <class T, int V>
__global__ void gather_rows(Permutation p, RowShape s, const T* x, T* rows) {
  const std::int64_t row = blockIdx.x, slot = p.slot_of_row[row];
  for (std::int64_t i = threadIdx.x; i < s.hidden / V; i += blockDim.x) {
    const Pack<T, V> v = slot < 0 ? Pack<T, V>{} : load_pack<V>(x + slot / s.top_k * s.hidden + i * V);
    store_pack(rows + row * s.hidden + i * V, v);
  }
}

template <class T>
Status launch_gather(const Permutation& p, const RowShape& s, const T* x, T* rows, CUstream_st* stream) {
  if (const Status status = check_rows(p, s); status != Status::kOk) return status;
  if (s.rows == 0 || s.hidden == 0) return Status::kOk;
  if (rows == nullptr || x == nullptr) return Status::kNullPointer;
  if (s.rows > 2147483647) return Status::kBadShape;
  in_packs<T>(s.hidden, {x, rows}, [&](auto v) {
    queue(gather_rows<T, v>, static_cast<unsigned>(s.rows), kThreads, 0, stream, p, s, x, rows);
  });
  return launched();
}

/// Block: a token.
template <class T, int V>
__global__ void combine_rows(Permutation p, RowShape s, const T* rows, const Wide<T>* weights, T* y) {
  const std::int64_t t = blockIdx.x;
  for (std::int64_t i = threadIdx.x; i < s.hidden / V; i += blockDim.x) {
    Wide<T> sum[V] = {};
    for (std::int64_t slot = t * s.top_k; slot < (t + 1) * s.top_k; ++slot) {
      const std::int64_t row = p.row_of_slot[slot];
      if (row < 0) continue;
      const Pack<T, V> from = load_pack<V>(rows + row * s.hidden + i * V);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] = add_choice(sum[j], weights == nullptr ? nullptr : weights + slot, from.v[j]);
    }
    Pack<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.v[j] = narrow<T>(sum[j]);
    store_pack(y + t * s.hidden + i * V, out);
  }
}

template <class T>
Status launch_combine(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights, T* y,
                      CUstream_st* stream) {
  if (const Status status = check_rows(p, s); status != Status::kOk) return status;
  if (s.tokens == 0 || s.hidden == 0) return Status::kOk;
  if (y == nullptr || (s.rows > 0 && rows == nullptr)) return Status::kNullPointer;
  if (s.tokens > 2147483647) return Status::kBadShape;
  in_packs<T>(s.hidden, {rows, y}, [&](auto v) {
    queue(combine_rows<T, v>, static_cast<unsigned>(s.tokens), kThreads, 0, stream, p, s, rows, weights, y);
  });
  return launched();
}

/// Block: a row.
template <class T, int V>
__global__ void spread_gradient(Permutation p, RowShape s, const Wide<T>* weights, const T* d_y, T* d_rows) {
  const std::int64_t row = blockIdx.x, slot = p.slot_of_row[row];
  for (std::int64_t i = threadIdx.x; i < s.hidden / V; i += blockDim.x) {
    Pack<T, V> out{};
    if (slot >= 0) {
      const Pack<T, V> d = load_pack<V>(d_y + slot / s.top_k * s.hidden + i * V);
#pragma unroll
      for (int j = 0; j < V; ++j)
        out.v[j] = narrow<T>(weights == nullptr ? widen(d.v[j]) : weights[slot] * widen(d.v[j]));
    }
    store_pack(d_rows + row * s.hidden + i * V, out);
  }
}

/// A slot a warp.
template <class T>
__global__ void weight_gradient(Permutation p, RowShape s, const T* rows, const T* d_y, Wide<T>* d_weights) {
  const std::int64_t slot = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (slot >= s.tokens * s.top_k) return;
  const std::int64_t row = p.row_of_slot[slot];
  Wide<T> sum = 0;
  if (row >= 0) sum = warp_dot(d_y + slot / s.top_k * s.hidden, rows + row * s.hidden, s.hidden);
  if (threadIdx.x % kLanes == 0) d_weights[slot] = sum;
}

template <class T>
Status launch_combine_backward(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights,
                               const T* d_y, T* d_rows, Wide<T>* d_weights, CUstream_st* stream) {
  if (const Status status = check_rows(p, s); status != Status::kOk) return status;
  const bool some = s.tokens > 0 && s.hidden > 0;
  if (some && (d_y == nullptr || (d_weights != nullptr && s.rows > 0 && rows == nullptr))) return Status::kNullPointer;
  const std::int64_t warps = parts(s.tokens * s.top_k, kThreads / kLanes);
  if (s.rows > 2147483647 || warps > 2147483647) return Status::kBadShape;
  if (d_rows != nullptr && s.rows > 0 && s.hidden > 0)
    in_packs<T>(s.hidden, {d_y, d_rows}, [&](auto v) {
      queue(spread_gradient<T, v>, static_cast<unsigned>(s.rows), kThreads, 0, stream, p, s, weights, d_y, d_rows);
    });
  if (d_weights != nullptr && warps > 0)
    queue(weight_gradient<T>, static_cast<unsigned>(warps), kThreads, 0, stream, p, s, rows, d_y, d_weights);
  return launched();
}

}  // namespace

std::size_t permute_workspace(std::int64_t tokens, std::int64_t experts, std::int64_t top_k) {
  return static_cast<std::size_t>(parts(tokens * top_k, kChunk) * experts) * 8;
}

Status permute(const PermuteArgs& a, const Permutation& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_permute(a, r); status != Status::kOk) return status;
  const std::int64_t slots = a.tokens * a.top_k, chunks = parts(slots, kChunk), rows = permuted_rows(a);
  if (rows > 0 && cudaMemsetAsync(r.slot_of_row, 0xff, static_cast<std::size_t>(rows) * 4, stream) != cudaSuccess)
    return Status::kLaunchFailed;
  if (a.place != nullptr) {
    const std::int64_t most = slots > a.experts + 1 ? slots : a.experts + 1;
    queue(to_places, static_cast<unsigned>(parts(most, kThreads)), kThreads, 0, stream, a, r);
    return launched();
  }
  if (chunks > 0 && workspace == nullptr) return Status::kNullPointer;
  auto* first = static_cast<std::int64_t*>(workspace);
  if (chunks > 0) {
    if (cudaMemsetAsync(workspace, 0, permute_workspace(a.tokens, a.experts, a.top_k), stream) != cudaSuccess)
      return Status::kLaunchFailed;
    queue(count_chunks, static_cast<unsigned>(parts(slots, kThreads)), kThreads, 0, stream, a,
          reinterpret_cast<unsigned long long*>(first));
  }
  queue(first_rows, 1, 1024, 0, stream, a, chunks, first, r.offsets);
  if (chunks > 0) queue(hand_out, static_cast<unsigned>(chunks), 32, 0, stream, a, first, r);
  return launched();
}

Status gather(const Permutation& p, const RowShape& s, const float* x, float* rows, CUstream_st* stream) {
  return launch_gather(p, s, x, rows, stream);
}
Status gather(const Permutation& p, const RowShape& s, const double* x, double* rows, CUstream_st* stream) {
  return launch_gather(p, s, x, rows, stream);
}
Status gather(const Permutation& p, const RowShape& s, const BFloat16* x, BFloat16* rows, CUstream_st* stream) {
  return launch_gather(p, s, x, rows, stream);
}
Status combine(const Permutation& p, const RowShape& s, const float* rows, const float* weights, float* y,
               CUstream_st* stream) {
  return launch_combine(p, s, rows, weights, y, stream);
}
Status combine(const Permutation& p, const RowShape& s, const double* rows, const double* weights, double* y,
               CUstream_st* stream) {
  return launch_combine(p, s, rows, weights, y, stream);
}
Status combine(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights, BFloat16* y,
               CUstream_st* stream) {
  return launch_combine(p, s, rows, weights, y, stream);
}
Status combine_backward(const Permutation& p, const RowShape& s, const float* rows, const float* weights,
                        const float* d_y, float* d_rows, float* d_weights, CUstream_st* stream) {
  return launch_combine_backward(p, s, rows, weights, d_y, d_rows, d_weights, stream);
}
Status combine_backward(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                        const double* d_y, double* d_rows, double* d_weights, CUstream_st* stream) {
  return launch_combine_backward(p, s, rows, weights, d_y, d_rows, d_weights, stream);
}
Status combine_backward(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights,
                        const BFloat16* d_y, BFloat16* d_rows, float* d_weights, CUstream_st* stream) {
  return launch_combine_backward(p, s, rows, weights, d_y, d_rows, d_weights, stream);
}

}  // namespace moeaudit::kernels::cuda
