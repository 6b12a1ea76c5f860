// Counts of expert ids against the limit of 1e9 ids a second and thread; and against the plain loop over one table.
#include "kernels/host/expert_load.h"

#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

namespace {

namespace k = moeaudit::kernels;

template <class Id>
std::vector<Id> ids(std::int64_t experts, bool one) {
  std::vector<Id> v(1 << 20);
  std::uint32_t x = 7;
  for (Id& id : v) {
    x = x * 1664525u + 1013904223u;
    id = one ? Id(3) : static_cast<Id>((x >> 8) % static_cast<std::uint32_t>(experts));
  }
  return v;
}

template <class Id>
void counts(benchmark::State& state) {
  const std::int64_t experts = state.range(0);
  const std::vector<Id> chosen = ids<Id>(experts, state.range(1) != 0);
  std::vector<std::int64_t> out(static_cast<std::size_t>(experts));
  std::int64_t outside = 0;
  const k::CountArgs<Id> a{chosen.data(), nullptr, static_cast<std::int64_t>(chosen.size()) / 8, 8, experts};
  for (auto _ : state) {
    k::count_choices(a, out.data(), &outside);
    benchmark::DoNotOptimize(out.data());
  }
  state.counters["ids/s"] =
      benchmark::Counter(static_cast<double>(chosen.size()), benchmark::Counter::kIsIterationInvariantRate);
  state.SetLabel("limit 1e9 ids/s");
}
BENCHMARK(counts<std::int16_t>)->ArgNames({"experts", "collapsed"})->Args({8, 0})->Args({128, 0})->Args({128, 1});
BENCHMARK(counts<std::int32_t>)->ArgNames({"experts", "collapsed"})->Args({128, 0});

void plain_loop(benchmark::State& state) {
  const std::vector<std::int16_t> chosen = ids<std::int16_t>(128, state.range(0) != 0);
  std::vector<std::int64_t> out(128);
  for (auto _ : state) {
    for (const std::int16_t id : chosen) ++out[static_cast<std::size_t>(id)];
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.counters["ids/s"] =
      benchmark::Counter(static_cast<double>(chosen.size()), benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(plain_loop)->ArgName("collapsed")->Arg(0)->Arg(1);

}  // namespace

BENCHMARK_MAIN();
