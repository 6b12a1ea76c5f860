// A gate whose sum is rounded on the way.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/rounded_gate.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void logits_of(RoundedGateArgs a, float* logits) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < a.tokens * a.experts) logits[i] = rounded_gate_logit(a, i / a.experts, i % a.experts);
}

}  // namespace

Status rounded_gate_logits(const RoundedGateArgs& args, float* logits, CUstream_st* stream) {
  const Status status = check_rounded_gate(args, logits);
  if (status != Status::kOk || args.tokens == 0) return status;
  const std::int64_t blocks = parts(args.tokens * args.experts, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  queue(logits_of, static_cast<unsigned>(blocks), kThreads, 0, stream, args, logits);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace moeaudit::kernels::cuda
