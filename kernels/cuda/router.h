// From logits to chosen experts on a CUDA device: kernels/host/router.h, same names and arguments, device pointers.
#pragma once

#include "kernels/host/router.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Most experts one warp keeps track of (a 32-bit mask a lane).
inline constexpr std::int64_t kMostExperts = 1024;

/// Queues the routing of all tokens on `stream` and returns; all pointers of args and result are device memory. Checks
/// the arguments, allocates nothing, waits for nothing. kBadShape also for more than kMostExperts; kLaunchFailed if the
/// runtime refuses (no device, wrong architecture); errors inside the kernel show at the caller's next synchronisation.
///
/// One warp owns one token and writes all of its results; sums run in the order that kernels/host/router.h states and
/// the formulas are the same inline functions, so results have the bits of the host kernel, whatever the launch.
Status route(const RouteArgs<float>& args, const RouteResult<float>& result, CUstream_st* stream);
Status route(const RouteArgs<double>& args, const RouteResult<double>& result, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
