// Dequantisation: a thread takes a few values in a row, and their scale once where they share it.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/quantised_weights.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kRun = 4;  // values of a thread

template <class T>
__global__ void dequantise_runs(QuantisedWeights w, std::int64_t first, std::int64_t count, T* out) {
  std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kRun;
  const std::int64_t end = i + kRun < count ? i + kRun : count;
  const T last = last_factor<T>(w);
  while (i < end) {
    const ScalePlace place = place_of(w, first + i);
    const T scale = scale_value<T>(w, place.scale);
    for (const std::int64_t stop = place.left < end - i ? i + place.left : end; i < stop; ++i)
      out[i] = product(code_value(w, first + i), scale, last);
  }
}

template <class T>
Status launch(const QuantisedWeights& w, std::int64_t first, std::int64_t count, T* out, CUstream_st* stream) {
  if (const Status status = check_dequantise(w, first, count, out); status != Status::kOk || count == 0) return status;
  const std::int64_t blocks = parts(count, kRun * kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  queue(dequantise_runs<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, w, first, count, out);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

Status dequantise(const QuantisedWeights& weights, std::int64_t first, std::int64_t count, double* out,
                  CUstream_st* stream) {
  return launch(weights, first, count, out, stream);
}
Status dequantise(const QuantisedWeights& weights, std::int64_t first, std::int64_t count, float* out,
                  CUstream_st* stream) {
  return launch(weights, first, count, out, stream);
}

}  // namespace moeaudit::kernels::cuda
