// Counts of choices on a CUDA device: kernels/host/expert_load.h, same names and arguments, device pointers. Statistics
// of E counts are for the host.
#pragma once

#include "kernels/host/expert_load.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; callers need no CUDA header

namespace moeaudit::kernels::cuda {

/// Queues the counting on `stream` and returns; integer additions, so the counts are those of the host. kBadShape also
/// for more than 4096 experts (a table of counts a block); kLaunchFailed if the runtime refuses.
Status count_choices(const CountArgs<std::int16_t>& args, std::int64_t* counts, std::int64_t* outside,
                     CUstream_st* stream);
Status count_choices(const CountArgs<std::int32_t>& args, std::int64_t* counts, std::int64_t* outside,
                     CUstream_st* stream);

}  // namespace moeaudit::kernels::cuda
