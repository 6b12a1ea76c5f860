// One MoE layer of two real models in bfloat16 on a device: forward and forward + backward, and every grouped product
// by itself, against what this device's mma.sync can do in the same run. Median of 20 runs by CUDA events. Some values
// of each pass are recomputed on the host and must lie within the bound; exit code 1 if one does not.
//
//   nvcc -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr -arch=sm_90a -I. bench/cuda/moe_layer.cu
//       kernels/cuda/moe_layer.cu kernels/cuda/grouped_gemm.cu kernels/cuda/permute.cu -o moe_layer_bench
//   ./moe_layer_bench [seconds of budget: skips what would start after them]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/moe_layer.h"
#include "kernels/cuda/permute.h"
#include "kernels/host/bounds.h"

namespace {

namespace k = moeaudit::kernels;
using k::BFloat16;
using k::GroupedProduct;

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "moe_layer: %s: %s\n", what, cudaGetErrorString(e));
  std::exit(2);
}
void check(k::Status s, const char* what) {
  if (s == k::Status::kOk) return;
  std::fprintf(stderr, "moe_layer: %s: status %d\n", what, static_cast<int>(s));
  std::exit(2);
}

/// Device memory of this run, given back at its end.
class Memory {
 public:
  ~Memory() {
    for (void* p : all_) cudaFree(p);
  }
  template <class T>
  T* take(std::int64_t n) {
    void* p = nullptr;
    check(cudaMalloc(&p, static_cast<std::size_t>(n) * sizeof(T)), "cudaMalloc");
    all_.push_back(p);
    return static_cast<T*>(p);
  }
  /// Values around 0, of a spread of `scale`.
  BFloat16* random(std::int64_t n, float scale, unsigned seed);

 private:
  std::vector<void*> all_;
};

__device__ unsigned mixed(unsigned long long i, unsigned seed) {
  unsigned long long z = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<unsigned>(z >> 32);
}
__global__ void fill(BFloat16* v, std::int64_t n, float scale, unsigned seed) {
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    float sum = 0;  // four uniforms: near enough to a Gaussian
    for (unsigned j = 0; j < 4; ++j) sum += static_cast<float>(mixed(4ull * i + j, seed)) * 2.3283064e-10f - 0.5f;
    v[i] = k::narrow<BFloat16>(sum * 1.7320508f * scale);
  }
}
BFloat16* Memory::random(std::int64_t n, float scale, unsigned seed) {
  auto* p = take<BFloat16>(n);
  fill<<<4096, 256>>>(p, n, scale, seed);
  check(cudaGetLastError(), "fill");
  return p;
}

/// Median of 20 runs after 3, in milliseconds.
double milliseconds(const std::function<void()>& run) {
  cudaEvent_t from, to;
  check(cudaEventCreate(&from), "event");
  check(cudaEventCreate(&to), "event");
  std::vector<float> times;
  for (int i = 0; i < 23; ++i) {
    check(cudaEventRecord(from), "event");
    run();
    check(cudaEventRecord(to), "event");
    check(cudaEventSynchronize(to), "run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, from, to), "event");
    if (i >= 3) times.push_back(ms);
  }
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  std::sort(times.begin(), times.end());
  return 0.5 * (static_cast<double>(times[9]) + static_cast<double>(times[10]));
}

/// mma.sync from registers alone: what no kernel on it can pass.
__global__ void __launch_bounds__(256) multiply_only(float* out, int rounds) {
  float sum[8][4] = {};
  const unsigned a = 0x3f803f80u + threadIdx.x, b = 0x3c003c00u;
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %5}, "
          "{%0, %1, %2, %3};\n"
          : "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
          : "r"(a), "r"(b));
  }
  float all = 0;
  for (int i = 0; i < 8; ++i) all += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = all;
}
double limit_of_device(Memory& memory) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "attribute");
  const int blocks = 4 * multiprocessors, rounds = 4000;
  auto* out = memory.take<float>(blocks * 256);
  const double ms = milliseconds([&] { multiply_only<<<blocks, 256>>>(out, rounds); });
  const double flops = 8.0 * blocks * rounds * 8 * (2.0 * 16 * 8 * 16);  // 8 warps a block
  return flops / ms * 1e-9;
}

struct Model {
  const char* name;
  std::int64_t tokens, hidden, width, experts, top_k;
};

/// n values, `step` apart.
template <class T>
std::vector<T> fetch(const T* from, std::int64_t n, std::int64_t step = 1) {
  std::vector<T> v(static_cast<std::size_t>(n));
  check(cudaMemcpy2D(v.data(), sizeof(T), from, static_cast<std::size_t>(step) * sizeof(T), sizeof(T),
                     static_cast<std::size_t>(n), cudaMemcpyDeviceToHost),
        "copy");
  return v;
}

/// Values of one grouped product recomputed from its own operands in float64; how many were out of bounds.
int recompute(const k::GroupedGemmArgs<BFloat16>& a, const std::vector<std::int64_t>& offsets, const char* what) {
  int bad = 0, done = 0;
  const bool weight = a.product == GroupedProduct::kWeight, forward = a.product == GroupedProduct::kForward;
  const std::int64_t columns = forward ? a.outputs : a.inputs;
  for (std::int64_t n = 0; n < 16; ++n) {
    const std::int64_t e = (n * 37 + 5) % a.experts, row = offsets[static_cast<std::size_t>(e)];
    const std::int64_t rows = offsets[static_cast<std::size_t>(e) + 1] - row, matrix = e * a.outputs * a.inputs;
    if (rows == 0) continue;
    const std::int64_t lines = weight ? a.outputs : rows, line = n == 0 ? lines - 1 : (n * 7919 + 13) % lines;
    const std::int64_t column = n == 1 ? columns - 1 : (n * 104729 + 7) % columns;
    const std::int64_t terms = weight ? rows : forward ? a.inputs : a.outputs;
    const auto x =
        weight ? fetch(a.left + row * a.outputs + line, terms, a.outputs) : fetch(a.left + (row + line) * terms, terms);
    const auto y = weight    ? fetch(a.right + row * a.inputs + column, terms, a.inputs)
                   : forward ? fetch(a.right + matrix + column * a.inputs, terms)
                             : fetch(a.right + matrix + column, terms, a.inputs);
    double sum = 0, absolute = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double p = static_cast<double>(k::widen(x[i])) * static_cast<double>(k::widen(y[i]));
      sum += p, absolute += std::fabs(p);
    }
    const double got = weight ? static_cast<double>(fetch(a.weight + matrix + line * a.inputs + column, 1)[0])
                              : static_cast<double>(k::widen(fetch(a.out + (row + line) * columns + column, 1)[0]));
    const double bound =
        k::bounds::rounded(sum, k::bounds::tensor_core_sum(terms, absolute), weight ? k::Float::kF32 : k::Float::kBF16);
    ++done;
    if (std::fabs(got - sum) <= bound) continue;
    ++bad;
    std::printf("  %s: expert %lld line %lld column %lld is %g, not %g within %g\n", what, static_cast<long long>(e),
                static_cast<long long>(line), static_cast<long long>(column), got, sum, bound);
  }
  if (bad > 0) std::printf("  %s: %d of %d values out of bounds\n", what, bad, done);
  return bad;
}

int run(const Model& m, double limit) {
  Memory memory;
  const std::int64_t rows = m.tokens * m.top_k, first = 2 * m.width;
  // Random routing; a choice that is taken moves on by one.
  std::vector<std::int32_t> chosen;
  unsigned long long state = 12345;
  for (std::int64_t t = 0; t < m.tokens; ++t) {
    const std::size_t begin = chosen.size();
    for (std::int64_t j = 0; j < m.top_k; ++j) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      auto e = static_cast<std::int32_t>((state >> 33) % static_cast<unsigned long long>(m.experts));
      while (std::find(chosen.begin() + static_cast<long>(begin), chosen.end(), e) != chosen.end())
        e = static_cast<std::int32_t>((e + 1) % m.experts);
      chosen.push_back(e);
    }
  }
  auto* d_chosen = memory.take<std::int32_t>(rows);
  check(cudaMemcpy(d_chosen, chosen.data(), chosen.size() * 4, cudaMemcpyHostToDevice), "copy");
  std::vector<float> weights(static_cast<std::size_t>(rows), 1.0f / static_cast<float>(m.top_k));
  auto* d_weights = memory.take<float>(rows);
  check(cudaMemcpy(d_weights, weights.data(), weights.size() * 4, cudaMemcpyHostToDevice), "copy");

  k::MoeLayerArgs<BFloat16> a;
  a.tokens = m.tokens, a.hidden = m.hidden, a.experts = m.experts, a.top_k = m.top_k, a.routed.width = m.width;
  a.x = memory.random(m.tokens * m.hidden, 1.0f, 1), a.chosen = d_chosen, a.weights = d_weights;
  a.routed.gate_up.weight = memory.random(m.experts * first * m.hidden, 1 / std::sqrt(static_cast<float>(m.hidden)), 2);
  a.routed.down.weight = memory.random(m.experts * m.hidden * m.width, 1 / std::sqrt(static_cast<float>(m.width)), 3);
  k::MoeLayerState<BFloat16> s;
  s.permutation = {memory.take<std::int64_t>(m.experts + 1), memory.take<std::int32_t>(rows),
                   memory.take<std::int32_t>(rows)};
  s.rows = memory.take<BFloat16>(rows * m.hidden);
  s.routed.before = memory.take<BFloat16>(rows * first), s.routed.activated = memory.take<BFloat16>(rows * m.width);
  s.routed.out = memory.take<BFloat16>(rows * m.hidden);
  auto* y = memory.take<BFloat16>(m.tokens * m.hidden);
  const auto* d_y = memory.random(m.tokens * m.hidden, 1.0f, 4);
  k::MoeLayerGradients<BFloat16> g;
  g.x = memory.take<BFloat16>(m.tokens * m.hidden), g.weights = memory.take<float>(rows);
  g.gate_up.weight = memory.take<float>(m.experts * first * m.hidden);
  g.down.weight = memory.take<float>(m.experts * m.hidden * m.width);
  void* forward_workspace = memory.take<char>(static_cast<std::int64_t>(k::cuda::moe_layer_workspace(a)));
  void* backward_workspace = memory.take<char>(static_cast<std::int64_t>(k::cuda::moe_layer_backward_workspace(a)));
  const auto forward = [&] { check(k::cuda::moe_layer(a, s, y, forward_workspace, nullptr), "moe_layer"); };
  const auto backward = [&] {
    check(k::cuda::moe_layer_backward(a, s, d_y, g, backward_workspace, nullptr), "moe_layer_backward");
  };
  const double flops = 6.0 * static_cast<double>(rows) * static_cast<double>(m.hidden) * static_cast<double>(m.width);
  std::printf("\n%s: %lld tokens, hidden %lld, width %lld, %lld experts, top %lld\n", m.name,
              static_cast<long long>(m.tokens), static_cast<long long>(m.hidden), static_cast<long long>(m.width),
              static_cast<long long>(m.experts), static_cast<long long>(m.top_k));
  const auto line = [&](const char* what, double ms, double work) {
    const double rate = work / ms * 1e-9;
    std::printf("  %-36s %9.3f ms  %7.1f TFLOP/s  %5.1f %% of mma.sync\n", what, ms, rate, 100 * rate / limit);
  };
  line("forward", milliseconds(forward), flops);
  line("forward + backward", milliseconds([&] { forward(), backward(); }), 3 * flops);
  const std::vector<std::int64_t> offsets = fetch(s.permutation.offsets, m.experts + 1);

  // The products by themselves, on what the passes left in memory.
  auto* d_before = memory.random(rows * first, 1.0f, 5);
  auto* d_rows = memory.take<BFloat16>(rows * m.hidden);
  auto* d_activated = memory.take<BFloat16>(rows * m.width);
  int bad = 0;
  const auto product = [&](const char* what, GroupedProduct p, std::int64_t inputs, std::int64_t outputs,
                           const BFloat16* left, const BFloat16* right, BFloat16* out, float* weight) {
    k::GroupedGemmArgs<BFloat16> q;
    q.product = p, q.inputs = inputs, q.outputs = outputs, q.left = left, q.right = right, q.out = out;
    q.weight = weight, q.offsets = s.permutation.offsets, q.experts = m.experts, q.rows = rows;
    const auto call = [&] { check(k::cuda::grouped_gemm(q, forward_workspace, nullptr), "grouped_gemm"); };
    line(what, milliseconds(call),
         2.0 * static_cast<double>(rows) * static_cast<double>(inputs) * static_cast<double>(outputs));
    bad += recompute(q, offsets, what);
  };
  const BFloat16 *w1 = a.routed.gate_up.weight, *w2 = a.routed.down.weight;
  product("  gate_up", GroupedProduct::kForward, m.hidden, first, s.rows, w1, s.routed.before, nullptr);
  product("  down", GroupedProduct::kForward, m.width, m.hidden, s.routed.activated, w2, s.routed.out, nullptr);
  product("  down, to its inputs", GroupedProduct::kInput, m.width, m.hidden, s.rows, w2, d_activated, nullptr);
  product("  gate_up, to its inputs", GroupedProduct::kInput, m.hidden, first, d_before, w1, d_rows, nullptr);
  product("  down, to its matrix", GroupedProduct::kWeight, m.width, m.hidden, s.rows, s.routed.activated, nullptr,
          g.down.weight);
  product("  gate_up, to its matrix", GroupedProduct::kWeight, m.hidden, first, d_before, s.rows, nullptr,
          g.gate_up.weight);
  const k::RowShape shape{m.tokens, m.top_k, rows, m.hidden};
  const k::PermuteArgs order{d_chosen, nullptr, m.tokens, m.experts, m.top_k, 0};
  const auto other = [&](const char* what, const std::function<k::Status()>& call, double bytes) {
    const double ms = milliseconds([&] { check(call(), what); });
    std::printf("  %-36s %9.3f ms  %7.0f GB/s\n", what, ms, bytes / ms * 1e-6);
  };
  const double row_bytes = 2.0 * static_cast<double>(m.hidden);
  other(
      "  permute", [&] { return k::cuda::permute(order, s.permutation, forward_workspace, nullptr); },
      12.0 * static_cast<double>(rows));
  other(
      "  gather", [&] { return k::cuda::gather(s.permutation, shape, a.x, s.rows, nullptr); },
      row_bytes * static_cast<double>(rows + m.tokens));
  other(
      "  combine", [&] { return k::cuda::combine(s.permutation, shape, s.routed.out, a.weights, y, nullptr); },
      row_bytes * static_cast<double>(rows + m.tokens));
  return bad;
}

}  // namespace

int main(int argc, char** argv) {
  const double budget = argc > 1 ? std::atof(argv[1]) : 1e9;
  const auto start = std::chrono::steady_clock::now();
  cudaDeviceProp device;
  if (const cudaError_t e = cudaGetDeviceProperties(&device, 0); e != cudaSuccess) {
    std::printf("skipped, no CUDA device: %s\n", cudaGetErrorString(e));
    return 77;
  }
  Memory memory;
  const double limit = limit_of_device(memory);
  std::printf("%s, sm_%d%d; mma.sync from registers: %.1f TFLOP/s (bfloat16, float32 sums)\n", device.name,
              device.major, device.minor, limit);
  const Model models[] = {{"Mixtral-8x7B", 4096, 4096, 14336, 8, 2}, {"Qwen3-30B-A3B", 8192, 2048, 768, 128, 8}};
  int bad = 0;
  for (const Model& m : models) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > budget) {
      std::printf("\n%s: not started, the budget of %.0f s is used up\n", m.name, budget);
      continue;
    }
    bad += run(m, limit);
  }
  return bad == 0 ? 0 : 1;
}
