// Gradients of the router on a CUDA device: kernels/host/router_backward.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/router.h"
#include "kernels/host/router_backward.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that route_backward() needs as `workspace`; it may be null for up to 384
/// experts and 32 choices in the exact formulas without a rare part (is_rare()), which fit into registers.
std::size_t route_backward_workspace(std::int64_t tokens, std::int64_t experts);

/// Queue the work on `stream` and return. A token a warp or a thread, an element a thread, an expert's scale a
/// warp: every sum in the host's
/// order, so the bits are the host's. Ids beyond the experts are the caller's fault here. kLaunchFailed if the runtime
/// refuses.
Status route_backward(const RouteBackwardArgs<float>& args, double* d_logits, void* workspace, CUstream_st* stream);
Status route_backward(const RouteBackwardArgs<double>& args, double* d_logits, void* workspace, CUstream_st* stream);
/// route_backward() with each of its results rounded once to bfloat16, as TensorCoreGateBackwardArgs takes them: rows
/// padded_experts() long, zeros at their end. kBadShape beyond 384 experts, 32 choices or the exact formulas,
/// and for what is_rare().
Status route_backward(const RouteBackwardArgs<float>& args, std::uint16_t* d_logits, CUstream_st* stream);
constexpr std::int64_t padded_experts(std::int64_t experts) { return (experts + 7) / 8 * 8; }
Status gate_backward(const GateBackwardArgs<float>& args, double* d_w, double* d_x, CUstream_st* stream);
Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x, CUstream_st* stream);
Status expert_scale_backward(const ExpertScaleBackwardArgs<float>& args, double* d_scale, CUstream_st* stream);
Status expert_scale_backward(const ExpertScaleBackwardArgs<double>& args, double* d_scale, CUstream_st* stream);

/// The gate's gradients in bfloat16 on tensor cores, as a bfloat16 gate has them: d_logits rounded once to bfloat16,
/// float32 sums; d_w float32 [experts, hidden], stretches of tokens added in their order; d_x bfloat16 [tokens,
/// hidden]. Either may be null. The conditions of TensorCoreGateArgs (router.h), and at most 256 experts; `workspace`
/// aligned to 256 bytes.
struct TensorCoreGateBackwardArgs {
  const double* d_logits = nullptr;  // [tokens, experts]
  const std::uint16_t* x = nullptr;  // bfloat16 [tokens, hidden]; for d_w
  const std::uint16_t* w = nullptr;  // bfloat16 [experts, hidden]; for d_x
  std::int64_t tokens = 0, hidden = 0, experts = 0;
  TensorCores cores = TensorCores::kWarp;
  /// Instead of d_logits, rounded already: bfloat16 [tokens, padded_experts(experts)], zeros at the ends of rows.
  const std::uint16_t* rounded_d_logits = nullptr;
};
std::size_t gate_backward_workspace(std::int64_t tokens, std::int64_t hidden, std::int64_t experts);
Status gate_backward(const TensorCoreGateBackwardArgs& args, float* d_w, std::uint16_t* d_x, void* workspace,
                     CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
