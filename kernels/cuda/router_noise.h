// The noise of routers on a CUDA device: kernels/host/router_noise.h, same names and arguments, device pointers.
#pragma once

#include "kernels/host/router_noise.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Queue the work on `stream` and return. An element a thread, by the same inline functions as on the host: the same
/// bits.
Status noisy_logits(const NoisyLogitsArgs<float>& args, float* out, CUstream_st* stream);
Status noisy_logits(const NoisyLogitsArgs<double>& args, double* out, CUstream_st* stream);
Status noisy_logits_backward(const NoisyLogitsArgs<float>& args, const double* upstream, double* d_noise_logits,
                             CUstream_st* stream);
Status noisy_logits_backward(const NoisyLogitsArgs<double>& args, const double* upstream, double* d_noise_logits,
                             CUstream_st* stream);
Status jitter(const float* x, const float* factor, std::int64_t count, Float dtype, float* out, CUstream_st* stream);
Status jitter(const double* x, const double* factor, std::int64_t count, Float dtype, double* out, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
