// Grouped matrix products on a CUDA device: kernels/host/grouped_gemm.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/grouped_gemm.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that grouped_gemm() needs as `workspace`.
std::size_t grouped_gemm_workspace(std::int64_t experts);

/// Queue their work on `stream` and wait for nothing. Which block works on which rows follows from the offsets on the
/// device. float and double: the host's order of sums, and so its bits.
/// BFloat16: tensor cores (sm_80 and later), 16 products at a time in index order, float32 sums; a tile has a sum to
/// itself, so a repeated run gives the same bits, another generation of devices may not (bounds::tensor_core_sum()).
/// inputs and outputs must be multiples of 8 and pointers aligned to 16 bytes, else kBadShape.
/// The values of `offsets` are not checked here. kBadShape also for more tiles than a grid has; kLaunchFailed if the
/// runtime refuses.
Status grouped_gemm(const GroupedGemmArgs<float>& args, void* workspace, CUstream_st* stream);
Status grouped_gemm(const GroupedGemmArgs<double>& args, void* workspace, CUstream_st* stream);
Status grouped_gemm(const GroupedGemmArgs<BFloat16>& args, void* workspace, CUstream_st* stream);

/// The bits of the host. kBadShape also for more than 65535 experts.
Status column_sums(const ColumnSumsArgs<float>& args, CUstream_st* stream);
Status column_sums(const ColumnSumsArgs<double>& args, CUstream_st* stream);
Status column_sums(const ColumnSumsArgs<BFloat16>& args, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
