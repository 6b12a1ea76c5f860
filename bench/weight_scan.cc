// The weight scan in memory, by dtype and threads. of_read is its rate over the rate at which the same threads read the
// same memory, measured right before; two threads are also given over one (x_one_thread). Wall clock: a loaded machine
// shows in both, less in their ratio.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/weight_scan.cc"
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace moeaudit::bench::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// The fastest plain read: four independent sums, the memory asked for ahead.
std::uint64_t read_all(const std::uint8_t* data, std::int64_t bytes) {
  const hn::CappedTag<std::uint64_t, 8> d;
  const auto n = static_cast<std::int64_t>(hn::Lanes(d)) * 8;
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  const auto load = [&](std::int64_t at)
                        HWY_ATTR { return hn::LoadU(d, reinterpret_cast<const std::uint64_t*>(data + at)); };
  for (std::int64_t i = 0; i + 4 * n <= bytes; i += 4 * n) {
    for (std::int64_t line = 0; line < 4 * n; line += 64) hwy::Prefetch(data + i + line + 4096);
    s0 = hn::Xor(s0, load(i));
    s1 = hn::Xor(s1, load(i + n));
    s2 = hn::Xor(s2, load(i + 2 * n));
    s3 = hn::Xor(s3, load(i + 3 * n));
  }
  return hn::GetLane(hn::Xor(hn::Xor(s0, s1), hn::Xor(s2, s3)));
}

}  // namespace moeaudit::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/host/gaussian.h"
#include "kernels/host/router.h"
#include "kernels/host/weight_scan.h"

namespace moeaudit::bench {

HWY_EXPORT(read_all);

namespace {

namespace k = kernels;
using k::Stored;

constexpr std::int64_t kBytes = std::int64_t{1} << 30;

/// 1 GiB of Gaussian weights of width 0.02 in the format.
const std::uint8_t* weights(Stored type) {
  static std::uint8_t* memory = [] {
    void* m = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ::madvise(m, kBytes, MADV_HUGEPAGE);
    return static_cast<std::uint8_t*>(m);
  }();
  static int held = -1;
  if (held == static_cast<int>(type)) return memory;
  held = static_cast<int>(type);
  constexpr std::int64_t kSome = 1 << 18;
  const std::int64_t size = k::stored_size(type);
  std::vector<float> v(kSome);
  k::unit_gaussians(3, 1, 0, kSome, v.data());
  std::vector<std::uint8_t> some(static_cast<std::size_t>(kSome * size));
  for (std::int64_t i = 0; i < kSome; ++i) {
    const float f = 0.02f * v[i];
    const double d = f;
    std::uint8_t* const to = some.data() + i * size;
    std::uint32_t bits;
    std::memcpy(&bits, &f, 4);
    // The upper half of a float32, and of a binary16 an exponent and mantissa of the same spread: the values need not
    // be rounded well to be read at the speed of real ones.
    const auto half = static_cast<std::uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13) - (112 << 10)) % 0x7c00);
    if (type == Stored::kF64) std::memcpy(to, &d, 8);
    if (type == Stored::kF32) std::memcpy(to, &f, 4);
    if (type == Stored::kBF16) std::memcpy(to, reinterpret_cast<const char*>(&bits) + 2, 2);
    if (type == Stored::kF16) std::memcpy(to, &half, 2);
    if (type == Stored::kE5M2) *to = static_cast<std::uint8_t>(half >> 8);
    if (type == Stored::kE4M3 || type == Stored::kI8)
      *to = static_cast<std::uint8_t>((half >> 8 & 0x80) | (i * 7 + (bits >> 9)) % 0x7f);
  }
  for (std::int64_t at = 0; at < kBytes; at += static_cast<std::int64_t>(some.size())) {
    std::memcpy(memory + at, some.data(), some.size());
  }
  return memory;
}

double seconds(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Seconds of `f(first byte, bytes)` over all of the memory, each thread on its own stretch.
template <class F>
double on_threads(int threads, F&& f) {
  return seconds([&] {
    std::vector<std::thread> helpers;
    const std::int64_t each = kBytes / threads;
    for (int t = 1; t < threads; ++t) helpers.emplace_back([&, t] { f(t * each, each); });
    f(0, each);
    for (std::thread& h : helpers) h.join();
  });
}

double read_seconds(const std::uint8_t* data, int threads) {
  return on_threads(threads, [&](std::int64_t at, std::int64_t bytes) {
    benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(read_all)(data + at, bytes));
  });
}
double scan_seconds(Stored type, const std::uint8_t* data, int threads) {
  return on_threads(threads, [&](std::int64_t at, std::int64_t bytes) {
    k::ScanResult r;
    k::scan(type, data + at, bytes / k::stored_size(type), &r);
    benchmark::DoNotOptimize(r);
  });
}

void weight_scan(benchmark::State& state, Stored type) {
  const int threads = static_cast<int>(state.range(0));
  const std::uint8_t* data = weights(type);
  double read = 0, scan = 0, one = 0;
  for (auto _ : state) {
    read += read_seconds(data, threads);
    const double s = scan_seconds(type, data, threads);
    scan += s;
    if (threads > 1) one += scan_seconds(type, data, 1);
    state.SetIterationTime(s);
  }
  const auto rate = [&](double s) {
    return static_cast<double>(kBytes) * static_cast<double>(state.iterations()) / s / 1e9;
  };
  state.counters["GB/s"] = rate(scan);
  state.counters["read_GB/s"] = rate(read);
  state.counters["of_read"] = read / scan;
  if (threads > 1) state.counters["x_one_thread"] = one / scan;
  state.SetLabel(k::host_backend());
}

#define SCAN(name, type)                     \
  BENCHMARK_CAPTURE(weight_scan, name, type) \
      ->Arg(1)                               \
      ->Arg(2)                               \
      ->UseManualTime()                      \
      ->Iterations(3)                        \
      ->Unit(benchmark::kMillisecond)
SCAN(bf16, Stored::kBF16);
SCAN(f16, Stored::kF16);
SCAN(f32, Stored::kF32);
SCAN(f64, Stored::kF64);
SCAN(e4m3, Stored::kE4M3);
SCAN(e5m2, Stored::kE5M2);
SCAN(i8, Stored::kI8);
SCAN(hash_only, Stored::kBytes);

}  // namespace
}  // namespace moeaudit::bench

BENCHMARK_MAIN();
#endif  // HWY_ONCE
