// The weight scan against what one writes with LibTorch, on the same bfloat16 tensor in memory, with the same number of
// threads. x_three_calls: isfinite().all(), abs().max(), norm(), as checkpoint scripts have it; x_best: aminmax() and
// norm(), the fastest phrasing found (LibTorch's norm of a large tensor is also wrong by up to some per cent:
// norm_error).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <thread>
#include <vector>

#include "kernels/host/weight_scan.h"

namespace {

namespace k = moeaudit::kernels;

template <class F>
double seconds(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void against_libtorch(benchmark::State& state) {
  const int threads = static_cast<int>(state.range(0));
  at::set_num_threads(threads);
  static const at::Tensor t = (at::randn({std::int64_t{1} << 26}) * 0.02).to(at::kBFloat16);  // 128 MiB
  const auto* data = static_cast<const std::uint8_t*>(t.data_ptr());
  const std::int64_t each = t.numel() / threads;
  std::vector<k::ScanResult> parts(static_cast<std::size_t>(threads));
  const auto scan = [&] {
    std::vector<std::thread> helpers;
    const auto part = [&](int i) {
      k::scan(k::Stored::kBF16, data + 2 * i * each, each, &parts[static_cast<std::size_t>(i)]);
    };
    for (int i = 1; i < threads; ++i) helpers.emplace_back(part, i);
    part(0);
    for (std::thread& h : helpers) h.join();
  };
  double ours = 0, three = 0, best = 0, norm = 0;
  const auto three_calls = [&] {
    benchmark::DoNotOptimize(at::isfinite(t).all().item<bool>());
    benchmark::DoNotOptimize(t.abs().max().item<float>());
    benchmark::DoNotOptimize(at::norm(t).item<float>());
  };
  const auto best_calls = [&] {
    const auto [low, high] = at::aminmax(t);
    benchmark::DoNotOptimize(low.item<float>() + high.item<float>());
    norm = at::norm(t).item<float>();
  };
  best_calls();
  for (auto _ : state) {
    three += seconds(three_calls);
    best += seconds(best_calls);
    scan();
    double s = 0;
    for (int i = 0; i < 5; ++i) s += seconds(scan) / 5;
    ours += s;
    state.SetIterationTime(s);
  }
  double squares = 0;
  for (const k::ScanResult& r : parts) squares += r.sum_of_squares;
  state.counters["GB/s"] = static_cast<double>(2 * t.numel()) * static_cast<double>(state.iterations()) / ours / 1e9;
  state.counters["x_three_calls"] = three / ours;
  state.counters["x_best"] = best / ours;
  state.counters["norm_error"] = norm / std::sqrt(squares) - 1;
  state.SetLabel("LibTorch " TORCH_VERSION_TEXT);
}
BENCHMARK(against_libtorch)->Arg(1)->Arg(2)->UseManualTime()->Iterations(3)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
