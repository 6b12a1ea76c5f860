// Cross-entropy per token on a CUDA device: kernels/host/token_loss.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/token_loss.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that cross_entropy() needs as `workspace`.
std::size_t cross_entropy_workspace(std::int64_t tokens);

/// Queues the work on `stream` and returns. Sums in the host's order, so the bits are the host's. A label that is
/// neither kIgnored nor a word counts as kIgnored here. kLaunchFailed if the runtime refuses.
Status cross_entropy(const CrossEntropyArgs<float>& args, const CrossEntropyResult<float>& result, void* workspace,
                     CUstream_st* stream);
Status cross_entropy(const CrossEntropyArgs<double>& args, const CrossEntropyResult<double>& result, void* workspace,
                     CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
