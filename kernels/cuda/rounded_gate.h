// A gate whose sum is rounded on the way, on a CUDA device: kernels/host/rounded_gate.h, same names and arguments,
// device pointers.
#pragma once

#include "kernels/host/rounded_gate.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Queues the work on `stream` and returns. A logit a thread, by the same inline function as on the host: the same
/// bits.
Status rounded_gate_logits(const RoundedGateArgs& args, float* logits, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
