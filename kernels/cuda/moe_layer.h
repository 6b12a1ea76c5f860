// One MoE layer on a CUDA device: kernels/host/moe_layer.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/moe_layer.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 16, that the calls below need as `workspace`. The pointers of args but `place`,
/// of which only whether it is there counts, do not matter.
std::size_t moe_layer_workspace(const MoeLayerArgs<float>& args);
std::size_t moe_layer_workspace(const MoeLayerArgs<double>& args);
std::size_t moe_layer_workspace(const MoeLayerArgs<BFloat16>& args);
std::size_t moe_layer_backward_workspace(const MoeLayerArgs<float>& args);
std::size_t moe_layer_backward_workspace(const MoeLayerArgs<double>& args);
std::size_t moe_layer_backward_workspace(const MoeLayerArgs<BFloat16>& args);

/// Queue their work on `stream` and wait for nothing. float and double: the host's order of sums, and so its bits.
/// BFloat16: matrix products on tensor cores (grouped_gemm.h), everything else the host's bits from the same inputs;
/// hidden, widths and ranks must be multiples of 8 and pointers aligned to 16 bytes, else kBadShape. Repeated runs give
/// the same bits. Rows of experts are never counted on the host. What permute() does not check on a device is not
/// checked here.
Status moe_layer(const MoeLayerArgs<float>& args, const MoeLayerState<float>& state, float* y, void* workspace,
                 CUstream_st* stream);
Status moe_layer(const MoeLayerArgs<double>& args, const MoeLayerState<double>& state, double* y, void* workspace,
                 CUstream_st* stream);
Status moe_layer(const MoeLayerArgs<BFloat16>& args, const MoeLayerState<BFloat16>& state, BFloat16* y, void* workspace,
                 CUstream_st* stream);

Status moe_layer_backward(const MoeLayerArgs<float>& args, const MoeLayerState<float>& state, const float* d_y,
                          const MoeLayerGradients<float>& gradients, void* workspace, CUstream_st* stream);
Status moe_layer_backward(const MoeLayerArgs<double>& args, const MoeLayerState<double>& state, const double* d_y,
                          const MoeLayerGradients<double>& gradients, void* workspace, CUstream_st* stream);
Status moe_layer_backward(const MoeLayerArgs<BFloat16>& args, const MoeLayerState<BFloat16>& state, const BFloat16* d_y,
                          const MoeLayerGradients<BFloat16>& gradients, void* workspace, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
