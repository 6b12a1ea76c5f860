// The gate GEMM and the route stage on one core. The GEMM is given as a share of this core's own multiply-add peak,
// measured right before it (of_peak: 2 E d T flops over the fused peak of the sum's type), and as a share of the core's
// own read bandwidth (of_read: bytes of x over that), whichever limit is nearer. Absolute numbers of a shared machine
// mean little.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/router_gemm.cc"
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace moeaudit::bench::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// `rounds` rounds of 12 independent multiply-adds; returns flops. The starts differ, or the compiler would do one of
/// them.
template <class T>
double multiply_adds(std::int64_t rounds, T* seed) {
  const hn::CappedTag<T, 64 / sizeof(T)> d;
  constexpr int kChains = 12;
  hn::Vec<decltype(d)> v[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) v[i] = hn::Set(d, seed[i]);
  const auto a = hn::Set(d, seed[12]), b = hn::Set(d, seed[13]);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) v[i] = hn::MulAdd(v[i], a, b);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) seed[i] = hn::GetLane(v[i]);
  return 2.0 * kChains * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}
double multiply_adds_f32(std::int64_t rounds, float* seed) { return multiply_adds(rounds, seed); }
double multiply_adds_f64(std::int64_t rounds, double* seed) { return multiply_adds(rounds, seed); }

float read_all(const float* data, std::int64_t count) {
  const hn::CappedTag<float, 16> d;
  const auto n = static_cast<std::int64_t>(hn::Lanes(d));
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  for (std::int64_t i = 0; i + 4 * n <= count; i += 4 * n) {
    s0 = hn::Add(s0, hn::LoadU(d, data + i));
    s1 = hn::Add(s1, hn::LoadU(d, data + i + n));
    s2 = hn::Add(s2, hn::LoadU(d, data + i + 2 * n));
    s3 = hn::Add(s3, hn::LoadU(d, data + i + 3 * n));
  }
  return hn::GetLane(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

}  // namespace moeaudit::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/host/gaussian.h"
#include "kernels/host/router.h"

namespace moeaudit::bench {

HWY_EXPORT(multiply_adds_f32);
HWY_EXPORT(multiply_adds_f64);
HWY_EXPORT(read_all);

namespace {

namespace k = kernels;

/// Seconds of this thread's processor time, as Google Benchmark counts its rates: neighbours on the machine do not
/// show.
template <class F>
double seconds(F&& f) {
  const auto now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  const double start = now();
  f();
  return now() - start;
}

/// Best of five, a few milliseconds each.
template <class Sum>
double peak_flops() {
  Sum seed[14] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, Sum(0.999), Sum(1e-3)};
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    double flops = 0;
    const double s = seconds([&] {
      if constexpr (std::is_same_v<Sum, float>)
        flops = HWY_DYNAMIC_DISPATCH(multiply_adds_f32)(1'500'000, seed);
      else
        flops = HWY_DYNAMIC_DISPATCH(multiply_adds_f64)(1'500'000, seed);
    });
    best = std::max(best, flops / s);
  }
  benchmark::DoNotOptimize(seed);
  return best;
}

double read_bandwidth() {
  static const std::vector<float> data(std::size_t{64} << 20, 1.0f);  // 256 MiB, beyond every cache
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const double s = seconds([&] {
      benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(read_all)(data.data(), static_cast<std::int64_t>(data.size())));
    });
    best = std::max(best, 4.0 * static_cast<double>(data.size()) / s);
  }
  return best;
}

template <class T>
T* aligned(std::vector<T>& storage, std::int64_t count) {
  storage.resize(static_cast<std::size_t>(count) + 64 / sizeof(T));
  const auto at = reinterpret_cast<std::uintptr_t>(storage.data());
  return storage.data() + ((at + 63) / 64 * 64 - at) / sizeof(T);
}

template <class Sum>
void gate(benchmark::State& state) {
  const std::int64_t experts = state.range(0), hidden = state.range(1), tokens = state.range(2);
  std::vector<float> x(static_cast<std::size_t>(tokens * hidden)), w(static_cast<std::size_t>(experts * hidden));
  k::unit_gaussians(1, 0, 0, tokens * hidden, x.data());
  k::unit_gaussians(1, 1, 0, experts * hidden, w.data());
  std::vector<Sum> storage, logits(static_cast<std::size_t>(tokens * experts));
  Sum* packed = aligned(storage, k::packed_gate_size<Sum>(experts, hidden));
  k::pack_gate(w.data(), experts, hidden, packed);
  const double peak = peak_flops<Sum>(), bandwidth = read_bandwidth();
  for (auto _ : state) {
    k::gate_logits(k::GateArgs<float, Sum>{x.data(), packed, nullptr, tokens, hidden, experts, logits.data()});
    benchmark::ClobberMemory();
  }
  using C = benchmark::Counter;
  const double flops = 2.0 * static_cast<double>(experts * hidden * tokens);
  state.counters["flops"] = C(flops, C::kIsIterationInvariantRate);
  state.counters["of_peak"] = C(flops / peak, C::kIsIterationInvariantRate);
  state.counters["of_read"] = C(4.0 * static_cast<double>(tokens * hidden) / bandwidth, C::kIsIterationInvariantRate);
  state.SetLabel(k::host_backend());
}

void shapes(benchmark::internal::Benchmark* b) {
  b->Args({8, 4096, 2048})
      ->Args({64, 2048, 1024})
      ->Args({128, 2048, 1024})
      ->Args({256, 7168, 384})
      ->Unit(benchmark::kMillisecond);
}
BENCHMARK(gate<float>)->Name("gate_float32")->Apply(shapes);
BENCHMARK(gate<double>)->Name("gate_wide")->Apply(shapes);

void route(benchmark::State& state) {
  const std::int64_t experts = state.range(0), top_k = state.range(1), tokens = 4096;
  std::vector<float> logits(static_cast<std::size_t>(tokens * experts)),
      weights(static_cast<std::size_t>(tokens * top_k));
  k::unit_gaussians(1, 2, 0, tokens * experts, logits.data());
  std::vector<std::int32_t> chosen(weights.size());
  k::RouteArgs<float> a;
  a.logits = logits.data(), a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.renormalise = true;
  for (auto _ : state) {
    k::route(a, k::RouteResult<float>{chosen.data(), weights.data(), nullptr, nullptr});
    benchmark::ClobberMemory();
  }
  state.counters["tokens"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
  state.SetLabel(k::host_backend());
}
BENCHMARK(route)->Args({8, 2})->Args({64, 8})->Args({128, 8})->Args({256, 8})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace moeaudit::bench

BENCHMARK_MAIN();
#endif  // HWY_ONCE
