// Balance losses, z-loss and bias step. Tokens are cut into the stretches of the host's order: a block adds up one
// stretch, a second launch adds up the stretches of a set.
#include <cuda_runtime.h>

#include "kernels/cuda/balance_loss.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr std::int64_t kMostBlocksY = 65535;

constexpr std::size_t padded(std::size_t bytes) { return (bytes + 7) / 8 * 8; }

/// Places in the workspace.
struct Scratch {
  double* stretch;                    // [num_sets, stretches, experts] sums of probabilities
  unsigned long long* counts;         // [num_sets, experts]
  unsigned long long* device_tokens;  // [num_sets, devices]
  unsigned long long* valid;          // [num_sets]
  double* mean;                       // [num_sets, experts]
  double* weight;                     // [num_sets, experts]
  double* divisor;                    // [num_sets]
  double* loss;                       // [num_sets]
  std::int64_t stretches;
};

Scratch cut(void* workspace, std::int64_t tokens, std::int64_t experts, std::int64_t devices, std::int64_t sets,
            std::size_t* bytes) {
  auto* at = static_cast<char*>(workspace);
  std::size_t used = 0;
  const auto take = [&](std::int64_t n) {
    char* here = at == nullptr ? nullptr : at + used;  // null: only the size is asked for
    used += padded(static_cast<std::size_t>(n) * 8);
    return here;
  };
  Scratch s;
  s.stretches = parts(tokens, kBalanceRun);
  s.counts = reinterpret_cast<unsigned long long*>(take(sets * experts));
  s.device_tokens = reinterpret_cast<unsigned long long*>(take(sets * devices));
  s.valid = reinterpret_cast<unsigned long long*>(take(sets));
  s.mean = reinterpret_cast<double*>(take(sets * experts));
  s.weight = reinterpret_cast<double*>(take(sets * experts));
  s.divisor = reinterpret_cast<double*>(take(sets));
  s.loss = reinterpret_cast<double*>(take(sets));
  s.stretch = reinterpret_cast<double*>(take(sets * s.stretches * experts));
  *bytes = used;
  return s;
}

struct Range {
  std::int64_t first, last;
};
template <class T>
__device__ Range range_of(const BalanceLossArgs<T>& a, std::int64_t set) {
  return a.sets == nullptr ? Range{0, a.tokens} : Range{a.sets[set], a.sets[set + 1]};
}

/// Block (stretch, set): counts of its tokens, and the sum of their probabilities, a column of experts a thread.
template <class T>
__global__ void add_stretches(BalanceLossArgs<T> a, Scratch s) {
  const std::int64_t set = blockIdx.y;
  const Range r = range_of(a, set);
  const std::int64_t first = r.first + static_cast<std::int64_t>(blockIdx.x) * kBalanceRun;
  if (first >= r.last) return;
  const std::int64_t last = first + kBalanceRun < r.last ? first + kBalanceRun : r.last;
  const std::int64_t on_device = a.experts / a.convention.devices;
  const std::int64_t slots = a.convention.counted == Counted::kFirstChoice ? 1 : a.top_k;
  for (std::int64_t t = first + threadIdx.x; t < last; t += blockDim.x) {
    if (a.valid != nullptr && a.valid[t] == 0) continue;
    atomicAdd(s.valid + set, 1ull);
    if (a.chosen == nullptr) continue;
    const std::int32_t* chosen = a.chosen + t * a.top_k;
    for (std::int64_t j = 0; j < a.top_k; ++j) {
      if (chosen[j] < 0 || chosen[j] >= a.experts) continue;
      if (j < slots) atomicAdd(s.counts + set * a.experts + chosen[j], 1ull);
      const std::int64_t d = chosen[j] / on_device;
      bool seen = false;
      for (std::int64_t i = 0; i < j; ++i)
        seen |= chosen[i] >= 0 && chosen[i] < a.experts && chosen[i] / on_device == d;
      if (!seen) atomicAdd(s.device_tokens + set * a.convention.devices + d, 1ull);
    }
  }
  __shared__ double sums[kBalanceRun];
  for (std::int64_t t = first + threadIdx.x; t < last; t += blockDim.x)
    sums[t - first] = balance_token(a, t, nullptr).sum;
  __syncthreads();
  double* out = s.stretch + (set * s.stretches + blockIdx.x) * a.experts;
  for (std::int64_t e = threadIdx.x; e < a.experts; e += blockDim.x) {
    double sum = 0;
    for (std::int64_t t = first; t < last; ++t) {
      if (a.valid == nullptr || a.valid[t] != 0) sum += share_of(a.probabilities[t * a.experts + e], sums[t - first]);
    }
    out[e] = sum;
  }
}

/// Block (set): means, weights and the loss of the set.
template <class T>
__global__ void finish_sets(BalanceLossArgs<T> a, BalanceLossResult<T> r, Scratch s) {
  const std::int64_t set = blockIdx.x;
  const Range range = range_of(a, set);
  const auto valid = static_cast<std::int64_t>(s.valid[set]);
  const std::int64_t by = a.convention.divisor == Divisor::kAllTokens ? range.last - range.first : valid;
  const double divisor = valid == 0 ? 0.0 : static_cast<double>(by);
  const double counted = a.counts != nullptr ? static_cast<double>(a.counted_tokens[set]) : divisor;
  const auto* own = reinterpret_cast<const std::int64_t*>(s.counts + set * a.experts);
  const std::int64_t* counts = a.counts != nullptr ? a.counts + set * a.experts : own;
  double *mean = s.mean + set * a.experts, *weight = s.weight + set * a.experts;
  for (std::int64_t e = threadIdx.x; e < a.experts; e += blockDim.x) {
    double sum = 0;
    const std::int64_t stretches = parts(range.last - range.first, kBalanceRun);
    for (std::int64_t i = 0; i < stretches; ++i) sum += s.stretch[(set * s.stretches + i) * a.experts + e];
    mean[e] = divisor == 0.0 ? 0.0 : sum / divisor;
    if (r.mean_probability != nullptr) r.mean_probability[set * a.experts + e] = mean[e];
    if (r.counts != nullptr) r.counts[set * a.experts + e] = own[e];
  }
  balance_weights(a.convention, a.experts, a.top_k, counts,
                  reinterpret_cast<const std::int64_t*>(s.device_tokens + set * a.convention.devices), counted,
                  threadIdx.x, blockDim.x, weight);
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) sum += weight[e] * mean[e];
  s.loss[set] = sum;
  s.divisor[set] = divisor;
  if (r.set_loss != nullptr) r.set_loss[set] = sum;
}

template <class T>
__global__ void add_sets(std::int64_t num_sets, double share, const double* loss, double* out) {
  double sum = 0;
  for (std::int64_t i = 0; i < num_sets; ++i) sum += loss[i];
  *out = share * sum;
}

/// Block (stretch, set).
template <class T>
__global__ void write_gradient(BalanceLossArgs<T> a, double share, Scratch s, T* gradient) {
  const std::int64_t set = blockIdx.y;
  const Range r = range_of(a, set);
  const std::int64_t first = r.first + static_cast<std::int64_t>(blockIdx.x) * kBalanceRun;
  if (first >= r.last) return;
  const std::int64_t last = first + kBalanceRun < r.last ? first + kBalanceRun : r.last;
  const double divisor = s.divisor[set], *weight = s.weight + set * a.experts;
  __shared__ BalanceToken tokens[kBalanceRun];
  for (std::int64_t t = first + threadIdx.x; t < last; t += blockDim.x) tokens[t - first] = balance_token(a, t, weight);
  __syncthreads();
  for (std::int64_t i = first * a.experts + threadIdx.x; i < last * a.experts; i += blockDim.x) {
    const std::int64_t t = i / a.experts;
    const bool out = (a.valid != nullptr && a.valid[t] == 0) || divisor == 0.0;
    gradient[i] =
        out ? T(0) : static_cast<T>(balance_gradient(tokens[t - first], share, weight[i % a.experts], divisor));
  }
}

template <class T>
Status launch(const BalanceLossArgs<T>& a, const BalanceLossResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_balance_loss(a, r); status != Status::kOk) return status;
  if (a.num_sets > kMostBlocksY) return Status::kBadShape;
  if (workspace == nullptr) return Status::kNullPointer;
  std::size_t bytes = 0;
  const Scratch s = cut(workspace, a.tokens, a.experts, a.convention.devices, a.num_sets, &bytes);
  const auto counted = static_cast<std::size_t>(reinterpret_cast<char*>(s.mean) - static_cast<char*>(workspace));
  if (cudaMemsetAsync(workspace, 0, counted, stream) != cudaSuccess) return Status::kLaunchFailed;
  const dim3 grid(static_cast<unsigned>(s.stretches), static_cast<unsigned>(a.num_sets));
  if (s.stretches > 0) queue(add_stretches<T>, grid, kThreads, 0, stream, a, s);
  queue(finish_sets<T>, static_cast<unsigned>(a.num_sets), kThreads, 0, stream, a, r, s);
  const double share = a.convention.over_sets == OverSets::kMean ? 1.0 / static_cast<double>(a.num_sets) : 1.0;
  queue(add_sets<T>, 1, 1, 0, stream, a.num_sets, share, s.loss, r.loss);
  if (r.gradient != nullptr && s.stretches > 0)
    queue(write_gradient<T>, grid, kThreads, 0, stream, a, share, s, r.gradient);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

// ---- z-loss
// ------------------------------------------------------------------------------------------------------------

/// A token a warp: its log-sum-exp.
template <class T>
__global__ void log_sum_exps(ZLossArgs<T> a, double* largest, double* sum, double* lse, double* out,
                             unsigned long long* valid) {
  const std::int64_t t = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (t >= a.tokens) return;
  double m = 0, s = 0;
  const double value = warp_log_sum_exp(a.logits + t * a.experts, a.experts, &m, &s);
  if (threadIdx.x % kLanes != 0) return;
  largest[t] = m;
  sum[t] = s;
  lse[t] = value;
  if (out != nullptr) out[t] = value;
  if (a.valid == nullptr || a.valid[t] != 0) atomicAdd(valid, 1ull);
}

/// One block: a stretch a thread, then the stretches in their order.
template <class T>
__global__ void add_squares(ZLossArgs<T> a, const double* lse, double* stretch, const unsigned long long* valid,
                            double* loss) {
  const std::int64_t stretches = parts(a.tokens, kZLossRun);
  for (std::int64_t i = threadIdx.x; i < stretches; i += blockDim.x) {
    double sum = 0;
    for (std::int64_t t = i * kZLossRun; t < a.tokens && t < (i + 1) * kZLossRun; ++t) {
      if (a.valid == nullptr || a.valid[t] != 0) sum += lse[t] * lse[t];
    }
    stretch[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (std::int64_t i = 0; i < stretches; ++i) total += stretch[i];
  *loss = *valid == 0 ? 0.0
                      : total / static_cast<double>(
                                    a.divisor == Divisor::kAllTokens ? a.tokens : static_cast<std::int64_t>(*valid));
}

template <class T>
__global__ void write_z_gradient(ZLossArgs<T> a, const double* largest, const double* sum, const double* lse,
                                 const unsigned long long* valid, T* gradient) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.tokens * a.experts) return;
  const std::int64_t t = i / a.experts;
  const double divisor =
      static_cast<double>(a.divisor == Divisor::kAllTokens ? a.tokens : static_cast<std::int64_t>(*valid));
  const bool in = a.valid == nullptr || a.valid[t] != 0;
  const double p = exp_exact_order(static_cast<double>(a.logits[i]) - largest[t]) / sum[t];
  gradient[i] = in ? static_cast<T>(lse[t] / divisor * (2.0 * p)) : T(0);
}

template <class T>
Status launch(const ZLossArgs<T>& a, const ZLossResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_z_loss(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = parts(a.tokens, kThreads / kLanes), elements = parts(a.tokens * a.experts, kThreads);
  if (elements > 2147483647 || blocks > 2147483647) return Status::kBadShape;
  auto* valid = static_cast<unsigned long long*>(workspace);
  auto* largest = reinterpret_cast<double*>(valid + 1);
  double *sum = largest + a.tokens, *lse = sum + a.tokens, *stretch = lse + a.tokens;
  if (cudaMemsetAsync(valid, 0, sizeof *valid, stream) != cudaSuccess) return Status::kLaunchFailed;
  if (blocks > 0)
    queue(log_sum_exps<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, largest, sum, lse, r.log_sum_exp,
          valid);
  queue(add_squares<T>, 1, 1024, 0, stream, a, lse, stretch, valid, r.loss);
  if (r.gradient != nullptr && elements > 0)
    queue(write_z_gradient<T>, static_cast<unsigned>(elements), kThreads, 0, stream, a, largest, sum, lse, valid,
          r.gradient);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

__global__ void update_layers(BiasUpdateArgs a, double* bias) {
  const std::int64_t l = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (l < a.layers) update_layer(a, l, bias + l * a.experts);
}

}  // namespace

std::size_t balance_loss_workspace(std::int64_t tokens, std::int64_t experts, std::int64_t devices,
                                   std::int64_t num_sets) {
  std::size_t bytes = 0;
  cut(nullptr, tokens, experts, devices, num_sets, &bytes);
  return bytes;
}
std::size_t z_loss_workspace(std::int64_t tokens) {
  return static_cast<std::size_t>(1 + 3 * tokens + parts(tokens, kZLossRun)) * 8;
}

Status balance_loss(const BalanceLossArgs<float>& args, const BalanceLossResult<float>& result, void* workspace,
                    CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status balance_loss(const BalanceLossArgs<double>& args, const BalanceLossResult<double>& result, void* workspace,
                    CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status z_loss(const ZLossArgs<float>& args, const ZLossResult<float>& result, void* workspace, CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status z_loss(const ZLossArgs<double>& args, const ZLossResult<double>& result, void* workspace, CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status bias_update(const BiasUpdateArgs& args, double* bias, CUstream_st* stream) {
  const Status status = check_bias_update(args, bias);
  if (status != Status::kOk || args.layers == 0) return status;
  queue(update_layers, static_cast<unsigned>(parts(args.layers, kThreads)), kThreads, 0, stream, args, bias);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace moeaudit::kernels::cuda
