// Gradients of the router on a CUDA device: kernels/host/router_backward.h, same names and arguments, device pointers.
#pragma once

#include <cstddef>

#include "kernels/host/router_backward.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Bytes of device memory, aligned to 8, that route_backward() needs as `workspace`.
std::size_t route_backward_workspace(std::int64_t tokens, std::int64_t experts);

/// Queue the work on `stream` and return. A token a thread, an element a thread: every sum in the host's order, so the
/// bits are the host's. Ids beyond the experts are the caller's fault here. kLaunchFailed if the runtime refuses.
Status route_backward(const RouteBackwardArgs<float>& args, double* d_logits, void* workspace, CUstream_st* stream);
Status route_backward(const RouteBackwardArgs<double>& args, double* d_logits, void* workspace, CUstream_st* stream);
Status gate_backward(const GateBackwardArgs<float>& args, double* d_w, double* d_x, CUstream_st* stream);
Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
