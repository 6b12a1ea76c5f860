// Drops beyond the capacity: the choices of each expert side by side, then a rank for each by comparing it with the
// others.
#include <cuda_runtime.h>

#include <cfloat>

#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/launch.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;

struct Scratch {
  unsigned long long* counts;   // [experts]
  unsigned long long* filled;   // [experts]
  unsigned long long* dropped;  // [1]
  unsigned long long* lost;     // [1]
  std::int64_t* start;          // [experts + 1]
  std::int64_t* order;          // [choices], by expert, in no order within
  void* important;              // [tokens] of T; kBatchPrioritised
};

Scratch cut(void* workspace, std::int64_t experts, std::int64_t choices) {
  auto* at = static_cast<std::int64_t*>(workspace);
  auto* counts = static_cast<unsigned long long*>(workspace);
  return {counts,
          counts + experts,
          counts + 2 * experts,
          counts + 2 * experts + 1,
          at + 2 * experts + 2,
          at + 3 * experts + 3,
          at + 3 * experts + 3 + choices};
}

template <class T>
__global__ void count(DropArgs<T> a, Scratch s) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < a.tokens * a.top_k && a.chosen[i] >= 0 && a.chosen[i] < a.experts) atomicAdd(s.counts + a.chosen[i], 1ull);
}

template <class T>
__global__ void weigh(DropArgs<T> a, T* important) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.tokens) important[t] = importance(a, t);
}

template <class T>
__global__ void begin(DropArgs<T> a, DropResult<T> r, Scratch s) {
  s.start[0] = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    const auto n = static_cast<std::int64_t>(s.counts[e]), kept = n < a.capacity ? n : a.capacity;
    s.start[e + 1] = s.start[e] + n;
    *s.dropped += static_cast<unsigned long long>(n - kept);
    if (r.kept != nullptr) r.kept[e] = kept;
  }
  if (r.dropped != nullptr) *r.dropped = static_cast<std::int64_t>(*s.dropped);
}

template <class T>
__global__ void fill(DropArgs<T> a, Scratch s) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.tokens * a.top_k || a.chosen[i] < 0 || a.chosen[i] >= a.experts) return;
  s.order[s.start[a.chosen[i]] + static_cast<std::int64_t>(atomicAdd(s.filled + a.chosen[i], 1ull))] = i;
}

template <class T>
__global__ void rank(DropArgs<T> a, DropResult<T> r, Scratch s) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.tokens * a.top_k) return;
  const std::int32_t e = a.chosen[i];
  std::int64_t place = e >= 0 && e < a.experts ? 0 : a.capacity;
  if (place == 0) {
    for (std::int64_t j = s.start[e]; j < s.start[e + 1]; ++j)
      place += s.order[j] != i && comes_before(a, static_cast<const T*>(s.important), s.order[j], i);
  }
  r.place[i] = place < a.capacity ? static_cast<std::int32_t>(place) : -1;
}

template <class T>
__global__ void finish(DropArgs<T> a, DropResult<T> r, Scratch s, T smallest) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= a.tokens) return;
  bool had = false, has = false;
  for (std::int64_t j = t * a.top_k; j < (t + 1) * a.top_k; ++j) {
    had |= a.chosen[j] >= 0 && a.chosen[j] < a.experts;
    has |= r.place[j] >= 0;
  }
  if (had && !has) atomicAdd(s.lost, 1ull);
  if (r.weights != nullptr) kept_weights(a, t, r.place, smallest, r.weights);
}

__global__ void copy_lost(const unsigned long long* from, std::int64_t* to) { *to = static_cast<std::int64_t>(*from); }

template <class T>
Status launch(const DropArgs<T>& a, const DropResult<T>& r, T smallest, void* workspace, CUstream_st* stream) {
  if (const Status status = check_drop(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const Scratch s = cut(workspace, a.experts, a.tokens * a.top_k);
  if (cudaMemsetAsync(workspace, 0, static_cast<std::size_t>(2 * a.experts + 2) * 8, stream) != cudaSuccess)
    return Status::kLaunchFailed;
  const auto slots = static_cast<unsigned>(parts(a.tokens * a.top_k, kThreads)),
             tokens = static_cast<unsigned>(parts(a.tokens, kThreads));
  if (slots > 0) queue(count<T>, slots, kThreads, 0, stream, a, s);
  queue(begin<T>, 1, 1, 0, stream, a, r, s);
  if (slots > 0) {
    if (a.order == DropOrder::kBatchPrioritised)
      queue(weigh<T>, tokens, kThreads, 0, stream, a, static_cast<T*>(s.important));
    queue(fill<T>, slots, kThreads, 0, stream, a, s);
    queue(rank<T>, slots, kThreads, 0, stream, a, r, s);
    queue(finish<T>, tokens, kThreads, 0, stream, a, r, s, smallest);
  }
  if (r.tokens_lost != nullptr) queue(copy_lost, 1, 1, 0, stream, s.lost, r.tokens_lost);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

std::size_t drop_workspace(std::int64_t tokens, std::int64_t experts, std::int64_t top_k) {
  return static_cast<std::size_t>(3 * experts + 3 + tokens * top_k + tokens) * 8;
}
Status drop(const DropArgs<float>& args, const DropResult<float>& result, void* workspace, CUstream_st* stream) {
  return launch(args, result, FLT_EPSILON, workspace, stream);
}
Status drop(const DropArgs<double>& args, const DropResult<double>& result, void* workspace, CUstream_st* stream) {
  return launch(args, result, DBL_EPSILON, workspace, stream);
}

}  // namespace moeaudit::kernels::cuda
