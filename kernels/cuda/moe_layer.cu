// One MoE layer: the steps of kernels/host/moe_layer_steps.h over the device's permute, grouped products and what
// follows.
#include <cuda_runtime.h>

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/moe_layer.h"
#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/permute.h"
#include "kernels/host/moe_layer_steps.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void write_group(std::int64_t tokens, std::int64_t* offsets) { offsets[0] = 0, offsets[1] = tokens; }

/// Block: a row; those that belong to no expert have nothing to calculate from.
template <class T, int V>
__global__ void activate_rows(ExpertForm f, const std::int64_t* offsets, std::int64_t experts, std::int64_t width,
                              const T* before, T* activated) {
  const std::int64_t r = blockIdx.x;
  if (r >= offsets[experts]) return;
  const T* row = before + r * first_outputs(f, width);
  for (std::int64_t i = threadIdx.x; i < width / V; i += blockDim.x) {
    const Pack<T, V> gate = load_pack<V>(row + i * V);
    Pack<T, V> up{}, out;
    if (f.gated) up = load_pack<V>(row + width + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) out.v[j] = activated_element(f, gate.v[j], up.v[j]);
    store_pack(activated + r * width + i * V, out);
  }
}

template <class T, int V>
__global__ void activate_rows_backward(ExpertForm f, const std::int64_t* offsets, std::int64_t experts,
                                       std::int64_t width, const T* before, const T* d_activated, T* d_before) {
  const std::int64_t r = blockIdx.x;
  if (r >= offsets[experts]) return;
  const std::int64_t first = r * first_outputs(f, width);
  for (std::int64_t i = threadIdx.x; i < width / V; i += blockDim.x) {
    const Pack<T, V> gate = load_pack<V>(before + first + i * V), d = load_pack<V>(d_activated + r * width + i * V);
    Pack<T, V> up{}, d_gate, d_up;
    if (f.gated) up = load_pack<V>(before + first + width + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) activate_backward_element(f, gate.v[j], up.v[j], d.v[j], d_gate.v + j, d_up.v + j);
    store_pack(d_before + first + i * V, d_gate);
    if (f.gated) store_pack(d_before + first + width + i * V, d_up);
  }
}

/// A token a warp.
template <class T>
__global__ void shared_weights(MoeLayerArgs<T> a, Wide<T>* weights) {
  const std::int64_t t = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (t >= a.tokens) return;
  const Wide<T> logit = warp_dot(a.x + t * a.hidden, a.shared_gate, a.hidden);
  if (threadIdx.x % kLanes == 0) weights[t] = narrow<Wide<T>>(sigmoid_exact_order(static_cast<double>(logit)));
}
template <class T>
__global__ void shared_logit_gradients(MoeLayerArgs<T> a, MoeLayerState<T> s, const T* d_y, Wide<T>* d_logit) {
  const std::int64_t t = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (t >= a.tokens) return;
  const Wide<T> d = warp_dot(d_y + t * a.hidden, s.shared.out + t * a.hidden, a.hidden);
  if (threadIdx.x % kLanes == 0) d_logit[t] = gate_slope(d, s.shared_weight[t]);
}

/// Block: a token.
template <class T>
__global__ void add_shared_rows(MoeLayerArgs<T> a, MoeLayerState<T> s, T* y) {
  const std::int64_t t = blockIdx.x;
  const Wide<T>* weight = a.shared_gate == nullptr ? nullptr : s.shared_weight + t;
  for (std::int64_t i = t * a.hidden + threadIdx.x; i < (t + 1) * a.hidden; i += blockDim.x)
    y[i] = with_shared(y[i], s.shared.out[i], weight);
}
template <class T>
__global__ void spread_shared(MoeLayerArgs<T> a, MoeLayerState<T> s, const T* d_y, T* d_out) {
  const std::int64_t t = blockIdx.x;
  for (std::int64_t i = t * a.hidden + threadIdx.x; i < (t + 1) * a.hidden; i += blockDim.x)
    d_out[i] = a.shared_gate == nullptr ? d_y[i] : narrow<T>(s.shared_weight[t] * widen(d_y[i]));
}
template <class T>
__global__ void add_shared_gradients(MoeLayerArgs<T> a, const T* through, const Wide<T>* d_logit, T* d_x) {
  const std::int64_t t = blockIdx.x;
  const bool gated = a.shared_gate != nullptr;
  for (std::int64_t i = threadIdx.x; i < a.hidden; i += blockDim.x) {
    const std::int64_t at = t * a.hidden + i;
    d_x[at] =
        with_shared_gradient(d_x[at], through[at], gated ? d_logit + t : nullptr, gated ? a.shared_gate + i : nullptr);
  }
}

template <class T>
struct DeviceOps {
  void* sort;      // workspace of permute()
  void* products;  // workspace of grouped_gemm()
  CUstream_st* stream;
  Status status = Status::kOk;

  void keep(Status s) {
    if (status == Status::kOk) status = s;
  }
  bool ok() const { return status == Status::kOk; }
  void launched() { keep(cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed); }
  /// A block a row; false if there is nothing to do.
  bool fits(std::int64_t rows) {
    if (rows > 2147483647) keep(Status::kBadShape);
    return ok() && rows > 0;
  }
  static unsigned warps(std::int64_t tokens) { return static_cast<unsigned>(parts(tokens, kThreads / kLanes)); }

  void permute(const PermuteArgs& a, const Permutation& p) { keep(cuda::permute(a, p, sort, stream)); }
  void gather(const Permutation& p, const RowShape& s, const T* x, T* rows) {
    if (ok()) keep(cuda::gather(p, s, x, rows, stream));
  }
  void combine(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights, T* y) {
    if (ok()) keep(cuda::combine(p, s, rows, weights, y, stream));
  }
  void combine_backward(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights, const T* d_y,
                        T* d_rows, Wide<T>* d_weights) {
    if (ok()) keep(cuda::combine_backward(p, s, rows, weights, d_y, d_rows, d_weights, stream));
  }
  void grouped_gemm(const GroupedGemmArgs<T>& a) {
    if (ok()) keep(cuda::grouped_gemm(a, products, stream));
  }
  void column_sums(const ColumnSumsArgs<T>& a) {
    if (ok()) keep(cuda::column_sums(a, stream));
  }
  void one_group(std::int64_t tokens, std::int64_t* offsets) {
    if (!ok()) return;
    queue(write_group, 1, 1, 0, stream, tokens, offsets);
    launched();
  }
  void activate(const ExpertForm& f, const std::int64_t* offsets, std::int64_t experts, std::int64_t rows,
                std::int64_t width, const T* before, T* activated) {
    if (!fits(rows)) return;
    in_packs<T>(width, {before, activated}, [&](auto v) {
      queue(activate_rows<T, v>, static_cast<unsigned>(rows), kThreads, 0, stream, f, offsets, experts, width, before,
            activated);
    });
    launched();
  }
  void activate_backward(const ExpertForm& f, const std::int64_t* offsets, std::int64_t experts, std::int64_t rows,
                         std::int64_t width, const T* before, const T* d_activated, T* d_before) {
    if (!fits(rows)) return;
    in_packs<T>(width, {before, d_activated, d_before}, [&](auto v) {
      queue(activate_rows_backward<T, v>, static_cast<unsigned>(rows), kThreads, 0, stream, f, offsets, experts, width,
            before, d_activated, d_before);
    });
    launched();
  }
  void add_shared(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, T* y) {
    if (!fits(a.tokens)) return;
    if (a.shared_gate != nullptr) queue(shared_weights<T>, warps(a.tokens), kThreads, 0, stream, a, s.shared_weight);
    queue(add_shared_rows<T>, static_cast<unsigned>(a.tokens), kThreads, 0, stream, a, s, y);
    launched();
  }
  void shared_backward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, const T* d_y, T* d_out, Wide<T>* d_logit) {
    if (!fits(a.tokens)) return;
    if (a.shared_gate != nullptr)
      queue(shared_logit_gradients<T>, warps(a.tokens), kThreads, 0, stream, a, s, d_y, d_logit);
    queue(spread_shared<T>, static_cast<unsigned>(a.tokens), kThreads, 0, stream, a, s, d_y, d_out);
    launched();
  }
  void add_shared_gradient(const MoeLayerArgs<T>& a, const T* through, const Wide<T>* d_logit, T* d_x) {
    if (!fits(a.tokens)) return;
    queue(add_shared_gradients<T>, static_cast<unsigned>(a.tokens), kThreads, 0, stream, a, through, d_logit, d_x);
    launched();
  }
};

constexpr std::size_t padded(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
std::size_t workspace_of(const MoeLayerArgs<T>& a) {
  return padded(permute_workspace(a.tokens, a.experts, a.top_k)) + padded(grouped_gemm_workspace(a.experts));
}
template <class T>
std::size_t backward_workspace_of(const MoeLayerArgs<T>& a) {
  std::size_t bytes = 0;
  cut_scratch(a, nullptr, &bytes);
  return bytes + padded(grouped_gemm_workspace(a.experts));
}

template <class T>
Status forward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, T* y, void* workspace, CUstream_st* stream) {
  if (const Status status = check_moe_layer(a, s, y); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  char* products = static_cast<char*>(workspace) + padded(permute_workspace(a.tokens, a.experts, a.top_k));
  DeviceOps<T> ops{workspace, products, stream};
  MoeLayerSteps<T, DeviceOps<T>>(a, s, ops).forward(y);
  return ops.status;
}

template <class T>
Status backward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, const T* d_y, const MoeLayerGradients<T>& g,
                void* workspace, CUstream_st* stream) {
  if (const Status status = check_moe_layer_backward(a, s, d_y); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  char* rest = static_cast<char*>(workspace) + padded(grouped_gemm_workspace(a.experts));
  std::size_t bytes = 0;
  const MoeLayerScratch<T> scratch = cut_scratch(a, rest, &bytes);
  DeviceOps<T> ops{nullptr, workspace, stream};
  MoeLayerSteps<T, DeviceOps<T>>(a, s, ops).backward(d_y, g, scratch);
  return ops.status;
}

}  // namespace

std::size_t moe_layer_workspace(const MoeLayerArgs<float>& a) { return workspace_of(a); }
std::size_t moe_layer_workspace(const MoeLayerArgs<double>& a) { return workspace_of(a); }
std::size_t moe_layer_workspace(const MoeLayerArgs<BFloat16>& a) { return workspace_of(a); }
std::size_t moe_layer_backward_workspace(const MoeLayerArgs<float>& a) { return backward_workspace_of(a); }
std::size_t moe_layer_backward_workspace(const MoeLayerArgs<double>& a) { return backward_workspace_of(a); }
std::size_t moe_layer_backward_workspace(const MoeLayerArgs<BFloat16>& a) { return backward_workspace_of(a); }

Status moe_layer(const MoeLayerArgs<float>& a, const MoeLayerState<float>& s, float* y, void* workspace,
                 CUstream_st* stream) {
  return forward(a, s, y, workspace, stream);
}
Status moe_layer(const MoeLayerArgs<double>& a, const MoeLayerState<double>& s, double* y, void* workspace,
                 CUstream_st* stream) {
  return forward(a, s, y, workspace, stream);
}
Status moe_layer(const MoeLayerArgs<BFloat16>& a, const MoeLayerState<BFloat16>& s, BFloat16* y, void* workspace,
                 CUstream_st* stream) {
  return forward(a, s, y, workspace, stream);
}
Status moe_layer_backward(const MoeLayerArgs<float>& a, const MoeLayerState<float>& s, const float* d_y,
                          const MoeLayerGradients<float>& g, void* workspace, CUstream_st* stream) {
  return backward(a, s, d_y, g, workspace, stream);
}
Status moe_layer_backward(const MoeLayerArgs<double>& a, const MoeLayerState<double>& s, const double* d_y,
                          const MoeLayerGradients<double>& g, void* workspace, CUstream_st* stream) {
  return backward(a, s, d_y, g, workspace, stream);
}
Status moe_layer_backward(const MoeLayerArgs<BFloat16>& a, const MoeLayerState<BFloat16>& s, const BFloat16* d_y,
                          const MoeLayerGradients<BFloat16>& g, void* workspace, CUstream_st* stream) {
  return backward(a, s, d_y, g, workspace, stream);
}

}  // namespace moeaudit::kernels::cuda
