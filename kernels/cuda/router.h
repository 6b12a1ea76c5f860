// From logits to chosen experts on a CUDA device: kernels/host/router.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/host/router.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// The gate with the sums of kernels/host/router.h in their order, and so with its bits; weights packed by pack_gate().
/// Same conditions as route() below.
Status gate_logits(const GateArgs<float, float>& args, CUstream_st* stream);
Status gate_logits(const GateArgs<double, double>& args, CUstream_st* stream);
Status gate_logits(const GateArgs<float, double>& args, CUstream_st* stream);

/// Which instructions multiply on tensor cores. kWarp: mma, on every device. kWarpgroup: wgmma, up to twice as fast, on
/// compute capability 9.0 alone and only in builds for sm_90a; elsewhere kBadOption.
enum class TensorCores { kWarp, kWarpgroup };
bool warpgroups_present();

/// The gate in bfloat16 on tensor cores: exact products, float32 sums. Products are added 16 at a time in ascending
/// order of `hidden`; the order within 16 is the hardware's, so results are the same in every run of one device model,
/// but are not the host's bits: bounds::tensor_core_dot() bounds the difference. `hidden` must be a multiple of 8, x
/// and w aligned to 16 bytes (else kBadShape, or a fault of the device).
struct TensorCoreGateArgs {
  const std::uint16_t* x = nullptr;  // bfloat16 [tokens, hidden]
  const std::uint16_t* w = nullptr;  // bfloat16 [experts, hidden], not packed
  const float* bias = nullptr;       // [experts], or null
  std::int64_t tokens = 0, hidden = 0, experts = 0;
  TensorCores cores = TensorCores::kWarp;
};
Status gate_logits(const TensorCoreGateArgs& args, float* logits, CUstream_st* stream);

/// Gate and route() in one pass over x; the logits are written where `logits` is given. `route` without its logits,
/// tokens and experts; its results are those that route() gives from the same logits, bit for bit. kBadShape beyond
/// kMostFusedExperts, 32 choices, or groups of another size than 32, and for what is_rare().
inline constexpr std::int64_t kMostFusedExperts = 256;
Status gate_and_route(const TensorCoreGateArgs& args, RouteArgs<float> route, const RouteResult<float>& routed,
                      float* logits, CUstream_st* stream);

/// Most experts one warp keeps track of (a 32-bit mask a lane).
inline constexpr std::int64_t kMostExperts = 1024;

/// Queues the routing of all tokens on `stream` and returns; all pointers of args and result are device memory. Checks
/// the arguments, but not the ids of `given`, which must be within the experts; allocates nothing, waits for nothing.
/// kBadShape also for more than kMostExperts; kLaunchFailed if the runtime refuses (no device, wrong architecture);
/// errors inside the kernel show at the caller's next synchronisation.
///
/// One warp owns one token and writes all of its results; sums run in the order that kernels/host/router.h states and
/// the formulas are the same inline functions, so results have the bits of the host kernel, whatever the launch.
Status route(const RouteArgs<float>& args, const RouteResult<float>& result, CUstream_st* stream);
Status route(const RouteArgs<double>& args, const RouteResult<double>& result, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
