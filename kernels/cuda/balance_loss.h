// Balance losses, z-loss and bias step on a CUDA device: kernels/host/balance_loss.h, z_loss.h and bias_update.h, same
// names and arguments, device pointers (`sets` and the scalars of the results included).
#pragma once

#include <cstddef>

#include "kernels/host/balance_loss.h"
#include "kernels/host/bias_update.h"
#include "kernels/host/z_loss.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that the calls below need as `workspace`; they allocate nothing themselves.
std::size_t balance_loss_workspace(std::int64_t tokens, std::int64_t experts, std::int64_t devices,
                                   std::int64_t num_sets);
std::size_t z_loss_workspace(std::int64_t tokens);

/// All queue their work on `stream` and wait for nothing. Sums run in the order that the host headers state (stretches,
/// then the stretches in their order) and counts are integers, so results have the bits of the host, whatever the
/// launch. What the host checks in device memory is not checked here: ids beyond the experts count nowhere, and `sets`
/// must ascend from 0 to tokens. kBadShape also for more than 65535 sets or device runs; kLaunchFailed if the runtime
/// refuses.
Status balance_loss(const BalanceLossArgs<float>& args, const BalanceLossResult<float>& result, void* workspace,
                    CUstream_st* stream);
Status balance_loss(const BalanceLossArgs<double>& args, const BalanceLossResult<double>& result, void* workspace,
                    CUstream_st* stream);

Status z_loss(const ZLossArgs<float>& args, const ZLossResult<float>& result, void* workspace, CUstream_st* stream);
Status z_loss(const ZLossArgs<double>& args, const ZLossResult<double>& result, void* workspace, CUstream_st* stream);

Status bias_update(const BiasUpdateArgs& args, double* bias, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
