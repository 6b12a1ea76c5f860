// Passes over tokens of kernels/host/routing_metrics.h on a CUDA device: same names and arguments, device pointers.
// What follows from their counts is for the host.
#pragma once

#include "kernels/host/routing_metrics.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// All queue their work on `stream` and wait for nothing. Counts are integers and a margin is one token's, so results
/// are those of the host, whatever the launch. What the host refuses after reading it counts nowhere here: ids beyond
/// the experts, an id twice in a set. kBadShape also for more than 2^31 - 1 blocks; kLaunchFailed if the runtime
/// refuses.
Status routing_margins(const MarginArgs<float>& args, const MarginResult& result, CUstream_st* stream);
Status routing_margins(const MarginArgs<double>& args, const MarginResult& result, CUstream_st* stream);
Status count_agreement(const AgreementArgs& args, std::int64_t* table, AgreementCounts* counts, CUstream_st* stream);
Status count_settled(const SettlingArgs& args, std::int64_t* tokens_settled, CUstream_st* stream);
Status count_by_label(const CountArgs<std::int32_t>& args, const std::int32_t* labels, std::int64_t num_labels,
                      std::int64_t* table, std::int64_t* outside, CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
