// SparseMixer on a CUDA device: kernels/host/sparse_mixer.h, same names and arguments, device pointers.
#pragma once

#include "kernels/host/sparse_mixer.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Queue the work on `stream` and return. A token a thread, by the same inline functions as on the host: the same bits.
/// Ids are not looked at here: those outside of the experts give anything, so ask mixer_ids_fit() first.
Status sparse_mixer(const SparseMixerArgs<float>& args, const SparseMixerResult<float>& result, CUstream_st* stream);
Status sparse_mixer(const SparseMixerArgs<double>& args, const SparseMixerResult<double>& result, CUstream_st* stream);
Status sparse_mixer_backward(const SparseMixerBackwardArgs<float>& args, double* d_logits, CUstream_st* stream);
Status sparse_mixer_backward(const SparseMixerBackwardArgs<double>& args, double* d_logits, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
