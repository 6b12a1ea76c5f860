// Regularisers of the router on a CUDA device: kernels/host/router_regularisers.h, same names and arguments, device
// pointers (the scalars of the results included).
#pragma once

#include <cstddef>

#include "kernels/host/router_regularisers.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that the calls below need as `workspace`; they allocate nothing themselves.
std::size_t importance_loss_workspace(std::int64_t tokens, std::int64_t experts);
std::size_t load_loss_workspace(std::int64_t tokens, std::int64_t experts);
std::size_t entropy_loss_workspace(std::int64_t tokens, std::int64_t experts);
std::size_t gate_orthogonality_workspace(std::int64_t experts);
std::size_t expert_overlap_workspace(std::int64_t tokens, std::int64_t top_k);
std::size_t score_variance_workspace(std::int64_t tokens, std::int64_t experts);

/// All queue their work on `stream` and wait for nothing. Sums run in the order that the host header states, so results
/// have the bits of the host, whatever the launch. Ids beyond the experts, which the host refuses, count nowhere here.
/// kBadShape also for more than 2^31 - 1 blocks; kLaunchFailed if the runtime refuses.
Status importance_loss(const ImportanceLossArgs<float>& args, const ImportanceLossResult<float>& result,
                       void* workspace, CUstream_st* stream);
Status importance_loss(const ImportanceLossArgs<double>& args, const ImportanceLossResult<double>& result,
                       void* workspace, CUstream_st* stream);

Status load_loss(const LoadLossArgs<float>& args, const LoadLossResult<float>& result, void* workspace,
                 CUstream_st* stream);
Status load_loss(const LoadLossArgs<double>& args, const LoadLossResult<double>& result, void* workspace,
                 CUstream_st* stream);

Status entropy_loss(const EntropyLossArgs<float>& args, const EntropyLossResult<float>& result, void* workspace,
                    CUstream_st* stream);
Status entropy_loss(const EntropyLossArgs<double>& args, const EntropyLossResult<double>& result, void* workspace,
                    CUstream_st* stream);

Status gate_orthogonality(const GateOrthogonalityArgs<float>& args, const GateOrthogonalityResult<float>& result,
                          void* workspace, CUstream_st* stream);
Status gate_orthogonality(const GateOrthogonalityArgs<double>& args, const GateOrthogonalityResult<double>& result,
                          void* workspace, CUstream_st* stream);

Status expert_overlap(const ExpertOverlapArgs<float>& args, const ExpertOverlapResult<float>& result, void* workspace,
                      CUstream_st* stream);
Status expert_overlap(const ExpertOverlapArgs<double>& args, const ExpertOverlapResult<double>& result, void* workspace,
                      CUstream_st* stream);

Status score_variance(const ScoreVarianceArgs<float>& args, const ScoreVarianceResult<float>& result, void* workspace,
                      CUstream_st* stream);
Status score_variance(const ScoreVarianceArgs<double>& args, const ScoreVarianceResult<double>& result, void* workspace,
                      CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
