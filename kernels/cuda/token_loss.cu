// Cross-entropy: a token a warp.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/token_loss.h"
#include "kernels/cuda/warp.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void token_losses(CrossEntropyArgs<T> a, CrossEntropyResult<T> r, double* loss, unsigned long long* labels) {
  const std::int64_t t = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (t >= a.tokens) return;
  const int lane = threadIdx.x % kLanes;
  const T* row = a.logits + t * a.vocabulary;
  const std::int64_t label = a.labels[t];
  const bool counts = label >= 0 && label < a.vocabulary;
  double largest = 0, sum = 0;
  const double lse = warp_log_sum_exp(row, a.vocabulary, &largest, &sum);
  if (lane == 0) {
    loss[t] = counts ? lse - static_cast<double>(row[label]) : 0.0;
    if (r.token_loss != nullptr) r.token_loss[t] = loss[t];
    if (counts) atomicAdd(labels, 1ull);
  }
  if (r.gradient == nullptr) return;
  for (std::int64_t v = lane; v < a.vocabulary; v += kLanes) {
    const double p = exp_exact_order(static_cast<double>(row[v]) - largest) / sum;
    r.gradient[t * a.vocabulary + v] = counts ? static_cast<T>(a.weight * (p - (v == label ? 1.0 : 0.0))) : T(0);
  }
}

/// One block: a stretch a thread, then the stretches in their order.
template <class T>
__global__ void add_losses(CrossEntropyArgs<T> a, CrossEntropyResult<T> r, const double* loss, double* stretch,
                           const unsigned long long* labels) {
  const std::int64_t stretches = parts(a.tokens, kZLossRun);
  for (std::int64_t i = threadIdx.x; i < stretches; i += blockDim.x) {
    double sum = 0;
    for (std::int64_t t = i * kZLossRun; t < a.tokens && t < (i + 1) * kZLossRun; ++t) sum += loss[t];
    stretch[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (std::int64_t i = 0; i < stretches; ++i) total += stretch[i];
  *r.sum = total;
  *r.labels = static_cast<std::int64_t>(*labels);
}

template <class T>
Status launch(const CrossEntropyArgs<T>& a, const CrossEntropyResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_cross_entropy(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = parts(a.tokens, kThreads / kLanes);
  if (blocks > 2147483647) return Status::kBadShape;
  auto* labels = static_cast<unsigned long long*>(workspace);
  auto* loss = reinterpret_cast<double*>(labels + 1);
  if (cudaMemsetAsync(labels, 0, sizeof *labels, stream) != cudaSuccess) return Status::kLaunchFailed;
  if (blocks > 0) queue(token_losses<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, r, loss, labels);
  queue(add_losses<T>, 1, 1024, 0, stream, a, r, loss, loss + a.tokens, labels);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

std::size_t cross_entropy_workspace(std::int64_t tokens) {
  return static_cast<std::size_t>(1 + tokens + parts(tokens, kZLossRun)) * 8;
}

Status cross_entropy(const CrossEntropyArgs<float>& args, const CrossEntropyResult<float>& result, void* workspace,
                     CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status cross_entropy(const CrossEntropyArgs<double>& args, const CrossEntropyResult<double>& result, void* workspace,
                     CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}

}  // namespace moeaudit::kernels::cuda
