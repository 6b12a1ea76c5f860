// Dequantisation on a CUDA device: kernels/host/quantised_weights.h, same names and arguments, device pointers.
#pragma once

#include "kernels/host/quantised_weights.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Queues the work on `stream` and returns; no workspace. The bits of the host. Scales and tables lie at multiples of
/// their element's size. kBadShape also beyond 2^31 * 1024 values a call; kLaunchFailed if the runtime refuses.
Status dequantise(const QuantisedWeights& weights, std::int64_t first, std::int64_t count, double* out,
                  CUstream_st* stream);
Status dequantise(const QuantisedWeights& weights, std::int64_t first, std::int64_t count, float* out,
                  CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
