// The router on a CUDA device: rates against the measured copy bandwidth and the byte bounds of docs/gpu.md. Medians of
// 20 launches by CUDA events, each on another part of inputs that exceed the second-level cache. JSON lines on stdout.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/router.h"
#include "kernels/cuda/router_backward.h"

namespace {

namespace k = moeaudit::kernels;

void require(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}
void require(k::Status s, const char* what) {
  if (s == k::Status::kOk) return;
  std::fprintf(stderr, "%s: %s\n", what, k::name_of(s));
  std::exit(1);
}

template <class T>
T* device(std::int64_t count) {
  void* p = nullptr;
  require(cudaMalloc(&p, static_cast<std::size_t>(count) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(p);
}

/// Uniform in (-1, 1), by a hash of the index.
__device__ float noise(std::int64_t i, std::uint32_t seed) {
  std::uint32_t h = static_cast<std::uint32_t>(i) * 2654435761u ^ static_cast<std::uint32_t>(i >> 32) * 40503u ^ seed;
  h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u, h ^= h >> 16;
  return static_cast<float>(h) * 0x1p-31f - 1.0f;
}
__global__ void fill(float* to, std::int64_t count, float scale, std::uint32_t seed) {
  for (std::int64_t i = blockIdx.x * 256LL + threadIdx.x; i < count; i += gridDim.x * 256LL)
    to[i] = scale * (noise(i, seed) + noise(i, seed + 1) + noise(i, seed + 2));
}
__global__ void fill(std::uint16_t* to, std::int64_t count, float scale, std::uint32_t seed) {
  for (std::int64_t i = blockIdx.x * 256LL + threadIdx.x; i < count; i += gridDim.x * 256LL)
    to[i] = static_cast<std::uint16_t>(__float_as_uint(scale * noise(i, seed)) >> 16);
}
__global__ void fill(double* to, std::int64_t count, float scale, std::uint32_t seed) {
  for (std::int64_t i = blockIdx.x * 256LL + threadIdx.x; i < count; i += gridDim.x * 256LL)
    to[i] = scale * noise(i, seed);
}
template <class T>
T* filled(std::int64_t count, float scale, std::uint32_t seed) {
  T* p = device<T>(count);
  fill<<<4096, 256>>>(p, count, scale, seed);
  require(cudaDeviceSynchronize(), "fill");
  return p;
}

double median_ms(const std::function<void()>& f, int runs = 20) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  for (int i = 0; i < 3; ++i) f();
  std::vector<float> times;
  for (int i = 0; i < runs; ++i) {
    cudaEventRecord(start);
    f();
    cudaEventRecord(stop);
    require(cudaEventSynchronize(stop), "kernel");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double copy_bandwidth() {  // bytes read and written a millisecond
  const std::int64_t bytes = std::int64_t{4} << 30;
  char *a = device<char>(bytes), *b = device<char>(bytes);
  const double ms =
      median_ms([&] { cudaMemcpyAsync(b, a, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice); });
  cudaFree(a), cudaFree(b);
  return 2.0 * static_cast<double>(bytes) / ms;
}

void route(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool grouped) {
  float *logits = filled<float>(tokens * experts, 1.0f, 1), *bias = filled<float>(experts, 0.05f, 9),
        *weights = device<float>(tokens * top_k);
  auto* chosen = device<std::int32_t>(tokens * top_k);
  k::RouteArgs<float> a;
  a.logits = logits, a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.renormalise = true;
  if (grouped) {
    a.score = k::Score::kSigmoid, a.correction_bias = bias, a.group_score = k::GroupScore::kTop2Sum, a.groups = 8,
    a.top_groups = 4, a.renormalise_eps = 1e-20f, a.scaling = 2.5f;
  }
  const double ms = median_ms([&] {
    require(k::cuda::route(a, {chosen, weights, nullptr, nullptr}, nullptr), "route");
  });
  std::printf(
      "{\"what\": \"route%s\", \"tokens\": %lld, \"experts\": %lld, \"top_k\": %lld, \"ms\": %.4f, \"gtokens_per_s\": "
      "%.3f}\n",
      grouped ? " (sigmoid, bias, groups)" : "", static_cast<long long>(tokens), static_cast<long long>(experts),
      static_cast<long long>(top_k), ms, static_cast<double>(tokens) / ms * 1e-6);
  cudaFree(logits), cudaFree(bias), cudaFree(weights), cudaFree(chosen);
}

void gate(std::int64_t tokens, std::int64_t hidden, std::int64_t experts, std::int64_t top_k,
          k::cuda::TensorCores cores, double bandwidth) {
  auto *x = filled<std::uint16_t>(tokens * hidden, 1.0f, 2), *w = filled<std::uint16_t>(experts * hidden, 0.05f, 3);
  float *logits = device<float>(tokens * experts), *weights = device<float>(tokens * top_k),
        *d_w = device<float>(experts * hidden);
  auto* chosen = device<std::int32_t>(tokens * top_k);
  auto* d_x = device<std::uint16_t>(tokens * hidden);
  double* upstream = filled<double>(tokens * top_k, 1.0f, 4);
  auto* d_logits = device<std::uint16_t>(tokens * k::cuda::padded_experts(experts));
  const k::cuda::TensorCoreGateArgs g{x, w, nullptr, tokens, hidden, experts, cores};
  k::RouteArgs<float> r;
  r.top_k = top_k, r.renormalise = true;
  const double gate_alone = median_ms([&] { require(k::cuda::gate_logits(g, logits, nullptr), "gate"); });
  const double fused = median_ms([&] {
    require(k::cuda::gate_and_route(g, r, {chosen, weights, nullptr, nullptr}, nullptr, nullptr), "gate and route");
  });
  void* workspace = device<char>(static_cast<std::int64_t>(k::cuda::gate_backward_workspace(tokens, hidden, experts)));
  k::RouteBackwardArgs<float> b;
  b.forward = r, b.forward.logits = logits, b.forward.tokens = tokens, b.forward.experts = experts;
  b.chosen = chosen, b.weights = upstream;
  const k::cuda::TensorCoreGateBackwardArgs gb{nullptr, x, w, tokens, hidden, experts, cores, d_logits};
  const auto route_back = [&] { require(k::cuda::route_backward(b, d_logits, nullptr), "route backward"); };
  const double route_back_ms = median_ms(route_back);
  const double d_x_ms =
      median_ms([&] { require(k::cuda::gate_backward(gb, nullptr, d_x, workspace, nullptr), "d_x"); });
  const double d_w_ms =
      median_ms([&] { require(k::cuda::gate_backward(gb, d_w, nullptr, workspace, nullptr), "d_w"); });
  const double both = median_ms([&] {
    require(k::cuda::gate_and_route(g, r, {chosen, weights, nullptr, nullptr}, logits, nullptr), "gate and route");
    route_back();
    require(k::cuda::gate_backward(gb, d_w, d_x, workspace, nullptr), "gate backward");
  });
  const double x_bytes = 2.0 * static_cast<double>(tokens * hidden);
  const double forward_bound = x_bytes / (bandwidth / 1.0), both_bound = 3 * x_bytes / bandwidth;
  const double flops = 2.0 * static_cast<double>(tokens * hidden * experts);
  std::printf(
      "{\"what\": \"gate and route\", \"cores\": \"%s\", \"tokens\": %lld, \"hidden\": %lld, \"experts\": %lld, "
      "\"top_k\": %lld, \"gate_ms\": %.4f, "
      "\"gate_tflops\": %.1f, \"fused_ms\": %.4f, \"fused_over_bytes\": %.3f, \"route_backward_ms\": %.4f, \"d_x_ms\": "
      "%.4f, "
      "\"d_w_ms\": %.4f, \"forward_backward_ms\": %.4f, \"forward_backward_over_bytes\": %.3f}\n",
      cores == k::cuda::TensorCores::kWarp ? "mma" : "wgmma", static_cast<long long>(tokens),
      static_cast<long long>(hidden), static_cast<long long>(experts), static_cast<long long>(top_k), gate_alone,
      flops / gate_alone * 1e-9, fused, fused / forward_bound, route_back_ms, d_x_ms, d_w_ms, both, both / both_bound);
  for (void* p : {static_cast<void*>(x), static_cast<void*>(w), static_cast<void*>(logits), static_cast<void*>(weights),
                  static_cast<void*>(d_w), static_cast<void*>(chosen), static_cast<void*>(d_x),
                  static_cast<void*>(upstream), static_cast<void*>(d_logits), workspace})
    cudaFree(p);
}

}  // namespace

int main() {
  cudaDeviceProp p;
  if (const cudaError_t e = cudaGetDeviceProperties(&p, 0); e != cudaSuccess) {
    std::printf("skipped, no CUDA device: %s\n", cudaGetErrorString(e));
    return 77;
  }
  const double bandwidth = copy_bandwidth();
  std::printf("{\"device\": \"%s\", \"multiprocessors\": %d, \"copy_gb_per_s\": %.0f}\n", p.name, p.multiProcessorCount,
              bandwidth * 1e-6);
  for (const std::int64_t experts : {8, 64, 128, 256}) route(1 << 20, experts, experts == 8 ? 2 : 8, false);
  route(1 << 20, 384, 8, false);
  route(1 << 20, 256, 8, true);
  route(256, 128, 8, false);
  for (const k::cuda::TensorCores cores : {k::cuda::TensorCores::kWarp, k::cuda::TensorCores::kWarpgroup}) {
    if (cores == k::cuda::TensorCores::kWarpgroup && !k::cuda::warpgroups_present()) continue;
    for (const std::int64_t experts : {8, 64, 128, 256})
      gate(1 << 19, 4096, experts, experts == 8 ? 2 : 8, cores, bandwidth);
  }
}
