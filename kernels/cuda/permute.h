// Permute and combine on a CUDA device: kernels/host/permute.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/permute.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that permute() needs as `workspace`.
std::size_t permute_workspace(std::int64_t tokens, std::int64_t experts, std::int64_t top_k);

/// All queue their work on `stream` and wait for nothing. permute() is a counting sort in the order of the slots, of
/// integers alone; the others have the host's order of sums, and so its bits. Ids beyond the experts and places beyond
/// the capacity go nowhere here; places given out twice leave one of the two, no telling which. kLaunchFailed if the
/// runtime refuses.
Status permute(const PermuteArgs& args, const Permutation& result, void* workspace, CUstream_st* stream);

Status gather(const Permutation& p, const RowShape& s, const float* x, float* rows, CUstream_st* stream);
Status gather(const Permutation& p, const RowShape& s, const double* x, double* rows, CUstream_st* stream);
Status gather(const Permutation& p, const RowShape& s, const BFloat16* x, BFloat16* rows, CUstream_st* stream);

Status combine(const Permutation& p, const RowShape& s, const float* rows, const float* weights, float* y,
               CUstream_st* stream);
Status combine(const Permutation& p, const RowShape& s, const double* rows, const double* weights, double* y,
               CUstream_st* stream);
Status combine(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights, BFloat16* y,
               CUstream_st* stream);

Status combine_backward(const Permutation& p, const RowShape& s, const float* rows, const float* weights,
                        const float* d_y, float* d_rows, float* d_weights, CUstream_st* stream);
Status combine_backward(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                        const double* d_y, double* d_rows, double* d_weights, CUstream_st* stream);
Status combine_backward(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights,
                        const BFloat16* d_y, BFloat16* d_rows, float* d_weights, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
