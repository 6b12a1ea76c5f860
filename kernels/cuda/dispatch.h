// Drops beyond the capacity on a CUDA device: kernels/host/dispatch.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/dispatch.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that drop() needs as `workspace`.
std::size_t drop_workspace(std::int64_t tokens, std::int64_t experts, std::int64_t top_k);

/// Queues the work on `stream` and returns. The place of a choice is how many of its expert's choices come before it,
/// all of them compared (n_e^2 comparisons: a few milliseconds for a balanced batch, a second where all tokens pile on
/// one expert), so the result is that of the host whatever the launch. Ids beyond the experts are no choices here.
/// kLaunchFailed if the runtime refuses.
Status drop(const DropArgs<float>& args, const DropResult<float>& result, void* workspace, CUstream_st* stream);
Status drop(const DropArgs<double>& args, const DropResult<double>& result, void* workspace, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
