// Passes over tokens on a CUDA device: kernels/host/expert_load.h, same names and arguments, device
// pointers. What follows from their counts is for the host.
#pragma once

#include <cstddef>

#include "kernels/host/expert_load.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Queues the counting on `stream` and returns; integer additions, so the counts are those of the host. kBadShape also
/// for more than 4096 experts (a table of counts a block); kLaunchFailed if the runtime refuses.
Status count_choices(const CountArgs<std::int16_t>& args, std::int64_t* counts, std::int64_t* outside,
                     CUstream_st* stream);
Status count_choices(const CountArgs<std::int32_t>& args, std::int64_t* counts, std::int64_t* outside,
                     CUstream_st* stream);

/// together [experts, experts]; integers as well.
Status co_activation(const CountArgs<std::int32_t>& args, std::int64_t* together, CUstream_st* stream);

/// out [1] in device memory; `workspace` of so many bytes, aligned to 8. The bits of the host, except that an id that
/// is no expert, which the host refuses, has no mass here.
std::size_t routing_statistics_workspace(std::int64_t tokens, std::int64_t experts);
Status routing_statistics(const RoutingStatisticsArgs<float>& args, RoutingStatistics* out, void* workspace,
                          CUstream_st* stream);
Status routing_statistics(const RoutingStatisticsArgs<double>& args, RoutingStatistics* out, void* workspace,
                          CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
