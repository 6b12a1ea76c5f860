// Expert choice on a CUDA device: kernels/host/expert_choice.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/expert_choice.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory that expert_choice() needs as `workspace`, aligned to 4.
std::size_t expert_choice_workspace(std::int64_t experts, std::int64_t capacity);

/// Queues the work on `stream` and returns. A block an expert: it finds the lowest key that is in by counting digits
/// (whole numbers, so in any order), collects the tokens in their order and ranks them: the host's tokens in the host's
/// order. `taken` is counted in whole numbers. kLaunchFailed if the runtime refuses.
Status expert_choice(const ExpertChoiceArgs<float>& args, const ExpertChoiceResult<float>& result, void* workspace,
                     CUstream_st* stream);
Status expert_choice(const ExpertChoiceArgs<double>& args, const ExpertChoiceResult<double>& result, void* workspace,
                     CUstream_st* stream);
/// Tokens beyond the last count nowhere here.
Status expert_choice_backward(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                              std::int64_t experts, std::int64_t capacity, double* d_scores, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
