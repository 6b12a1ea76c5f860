// LoRA merge, what it loses, and gradients on a CUDA device: kernels/host/lora.h, same names and arguments, device
// pointers (that of the MergeLoss included).
#pragma once

#include <cstddef>

#include "kernels/host/lora.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that the calls below need as `workspace`; they allocate nothing themselves.
std::size_t lora_merge_loss_workspace(std::int64_t rows);
std::size_t lora_gradient_workspace(std::int64_t tokens, std::int64_t rank);

/// All queue their work on `stream` and wait for nothing. Sums run in the order that the host header states, so results
/// have the bits of the host. kBadShape also where a grid would be too large; kLaunchFailed if the runtime refuses.
Status lora_product(const LoraUpdate& update, double* out, CUstream_st* stream);
Status lora_merge(const LoraMergeArgs& args, bool unmerge, double* out, CUstream_st* stream);
Status lora_merge_loss(const LoraMergeArgs& args, const MergeDtypes& unmerge, MergeLoss* loss, void* workspace,
                       CUstream_st* stream);
Status lora_gradient(const LoraGradientArgs& args, const LoraGradient& result, void* workspace, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
