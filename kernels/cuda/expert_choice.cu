// Expert choice.
#include <cuda_runtime.h>

#include "kernels/cuda/expert_choice.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256, kDigits = 256;

template <class T>
__device__ bool is_valid(const ExpertChoiceArgs<T>& a, std::int64_t t) {
  return a.valid == nullptr || a.valid[t] != 0;
}
template <class T>
__device__ std::uint64_t key_of(const ExpertChoiceArgs<T>& a, std::int64_t t) {
  return choice_key(static_cast<double>(a.scores[t * a.experts + blockIdx.x]));
}

template <class T>
__global__ void __launch_bounds__(kThreads) choose(ExpertChoiceArgs<T> a, ExpertChoiceResult<T> r, std::int32_t* list) {
  __shared__ unsigned count[kDigits], warp_above[kThreads / kLanes], warp_equal[kThreads / kLanes];
  __shared__ std::uint64_t threshold;
  __shared__ unsigned long long valid;
  __shared__ std::int64_t wanted;
  const std::int64_t e = blockIdx.x;
  const unsigned thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  list += e * a.capacity;
  if (thread == 0) threshold = 0, valid = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (std::int64_t t = thread; t < a.tokens; t += kThreads) mine += is_valid(a, t) ? 1 : 0;
  atomicAdd(&valid, mine);
  __syncthreads();
  const std::int64_t picks =
      static_cast<std::int64_t>(valid) < a.capacity ? static_cast<std::int64_t>(valid) : a.capacity;
  if (thread == 0) wanted = picks;
  // The key of the last one in, digit by digit; `wanted`: how many of those with the digits so far are in.
  for (int shift = 56; shift >= 0 && picks > 0; shift -= 8) {
    count[thread] = 0;
    __syncthreads();
    const std::uint64_t prefix = threshold, fixed = shift == 56 ? 0 : ~std::uint64_t{0} << (shift + 8);
    for (std::int64_t t = thread; t < a.tokens; t += kThreads) {
      if (!is_valid(a, t)) continue;
      const std::uint64_t key = key_of(a, t);
      if (((key ^ prefix) & fixed) == 0) atomicAdd(count + (key >> shift & 0xff), 1u);
    }
    __syncthreads();
    if (thread == 0) {
      int digit = kDigits - 1;
      for (; wanted > count[digit]; --digit) wanted -= count[digit];
      threshold = prefix | static_cast<std::uint64_t>(digit) << shift;
    }
    __syncthreads();
  }
  // Those above it, and the first `wanted` of its equals, in the order of the tokens.
  const std::uint64_t last = threshold;
  std::int64_t above_before = 0, equal_before = 0;
  for (std::int64_t start = 0; start < a.tokens && picks > 0; start += kThreads) {
    const std::int64_t t = start + thread;
    const bool in = t < a.tokens && is_valid(a, t);
    const std::uint64_t key = in ? key_of(a, t) : 0;
    const unsigned above = __ballot_sync(kAll, in && key > last), equal = __ballot_sync(kAll, in && key == last);
    if (lane == 0) warp_above[warp] = __popc(above), warp_equal[warp] = __popc(equal);
    __syncthreads();
    std::int64_t above_here = above_before, equal_here = equal_before;
    for (unsigned w = 0; w < kThreads / kLanes; ++w) {
      if (w < warp) above_here += warp_above[w], equal_here += warp_equal[w];
      above_before += warp_above[w], equal_before += warp_equal[w];
    }
    const unsigned lower = (1u << lane) - 1u;
    above_here += __popc(above & lower), equal_here += __popc(equal & lower);
    // Before this token: above_here of the ones above, and as many of its equals as are in.
    const bool is_above = in && key > last, is_equal = in && key == last && equal_here < wanted;
    if (is_above || is_equal)
      list[above_here + (equal_here < wanted ? equal_here : wanted)] = static_cast<std::int32_t>(t);
    __syncthreads();  // the counts are overwritten next
  }
  // Best first.
  for (std::int64_t i = thread; i < a.capacity; i += kThreads) {
    if (i >= picks) {
      r.tokens[e * a.capacity + i] = -1;
      if (r.weights != nullptr) r.weights[e * a.capacity + i] = T(0);
      continue;
    }
    const std::int32_t t = list[i];
    const std::uint64_t key = key_of(a, t);
    std::int64_t rank = 0;
    for (std::int64_t j = 0; j < picks; ++j) {
      const std::uint64_t other = key_of(a, list[j]);
      rank += other > key || (other == key && j < i) ? 1 : 0;  // the list is in the order of the tokens
    }
    r.tokens[e * a.capacity + rank] = t;
    if (r.weights != nullptr) r.weights[e * a.capacity + rank] = a.scores[t * a.experts + e];
    if (r.taken != nullptr) atomicAdd(r.taken + t, 1);
  }
}

template <class T>
__global__ void clear(T* values, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) values[i] = 0;
}

/// An expert takes a token once, so that no two threads meet.
__global__ void scatter(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                        std::int64_t experts, std::int64_t capacity, double* d_scores) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= experts * capacity) return;
  const std::int32_t t = tokens_of[i];
  if (t >= 0 && t < tokens) d_scores[t * experts + i / capacity] = d_weights[i];
}

template <class T>
Status launch(const ExpertChoiceArgs<T>& a, const ExpertChoiceResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_expert_choice(a, r); status != Status::kOk || a.tokens == 0) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  if (r.taken != nullptr)
    queue(clear<std::int32_t>, static_cast<unsigned>(parts(a.tokens, kThreads)), kThreads, 0, stream, r.taken,
          a.tokens);
  queue(choose<T>, static_cast<unsigned>(a.experts), kThreads, 0, stream, a, r, static_cast<std::int32_t*>(workspace));
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

std::size_t expert_choice_workspace(std::int64_t experts, std::int64_t capacity) {
  return static_cast<std::size_t>(experts * capacity) * sizeof(std::int32_t);
}
Status expert_choice(const ExpertChoiceArgs<float>& args, const ExpertChoiceResult<float>& result, void* workspace,
                     CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status expert_choice(const ExpertChoiceArgs<double>& args, const ExpertChoiceResult<double>& result, void* workspace,
                     CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status expert_choice_backward(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                              std::int64_t experts, std::int64_t capacity, double* d_scores, CUstream_st* stream) {
  if (tokens < 0 || experts < 1 || capacity < 0) return Status::kBadShape;
  if (tokens == 0) return Status::kOk;
  if (d_scores == nullptr || (capacity > 0 && (tokens_of == nullptr || d_weights == nullptr)))
    return Status::kNullPointer;
  const std::int64_t all = parts(tokens * experts, kThreads), slots = parts(experts * capacity, kThreads);
  if (all > 2147483647 || slots > 2147483647) return Status::kBadShape;
  queue(clear<double>, static_cast<unsigned>(all), kThreads, 0, stream, d_scores, tokens * experts);
  if (slots > 0)
    queue(scatter, static_cast<unsigned>(slots), kThreads, 0, stream, tokens_of, d_weights, tokens, experts, capacity,
          d_scores);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace moeaudit::kernels::cuda
