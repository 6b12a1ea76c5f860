// Dequantisation to float64 on one thread, by format, alone and with the scan of the values behind it (what `check
// --full` does with a quantised tensor). Bytes are those stored, scales included.
#include "kernels/host/quantised_weights.h"

#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "kernels/host/router.h"
#include "kernels/host/weight_scan.h"

namespace moeaudit::bench {
namespace {

namespace k = kernels;
using k::ScaleType;
using k::WeightCode;

constexpr std::int64_t kBytes = std::int64_t{1} << 22;   // codes: beyond the caches next to the core
constexpr std::int64_t kValues = std::int64_t{1} << 13;  // at a time, as ValueScan has it

struct Format {
  WeightCode code;
  ScaleType scale;
  int scale_size;
  std::int64_t row_block, column_block;
  double divisor = 1;
};

void dequantise(benchmark::State& state, Format f, bool scan) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(kBytes));
  std::uint32_t random = 1;
  for (std::uint8_t& c : codes) {
    random = random * 1664525 + 1013904223;
    c = static_cast<std::uint8_t>(random >> 24 & 0xbb);  // no NaN and no infinity in any format
  }
  const std::int64_t columns = 4096, values = kBytes * (k::two_a_byte(f.code) ? 2 : 1);
  const std::int64_t scales = values / (f.row_block * f.column_block);
  std::vector<std::uint8_t> stored(static_cast<std::size_t>(scales * f.scale_size), 60);  // a number in every format
  std::vector<float> map(256, 0.5f), absmax(static_cast<std::size_t>(scales / 256 + 1), 0.03f);
  k::QuantisedWeights w;
  w.codes = codes.data(), w.code = f.code, w.table = k::kNf4Values, w.rows = values / columns, w.columns = columns;
  w.row_block = f.row_block, w.column_block = f.column_block, w.divisor = f.divisor;
  w.scales = stored.data(), w.scale_type = f.scale;
  w.nested_map = map.data(), w.nested_absmax = absmax.data(), w.nested_block = 256, w.nested_offset = 0.1f;
  std::vector<double> out(static_cast<std::size_t>(kValues));
  for (auto _ : state) {
    for (std::int64_t i = 0; i < values; i += kValues) {
      k::dequantise(w, i, kValues, out.data());
      benchmark::DoNotOptimize(out.data());
      if (!scan) continue;
      k::ScanResult r;
      k::scan_piece(k::Stored::kF64, out.data(), kValues, &r);
      benchmark::DoNotOptimize(r);
    }
  }
  state.SetBytesProcessed(state.iterations() * (kBytes + scales * f.scale_size));
  state.counters["values/s"] =
      benchmark::Counter(static_cast<double>(state.iterations() * values), benchmark::Counter::kIsRate);
  state.SetLabel(k::host_backend());
}

#define DEQUANTISE(name, ...)                                      \
  BENCHMARK_CAPTURE(dequantise, name, Format{__VA_ARGS__}, false); \
  BENCHMARK_CAPTURE(dequantise, name##_and_scan, Format{__VA_ARGS__}, true)
DEQUANTISE(e4m3_128x128, WeightCode::kE4M3, ScaleType::kF32, 4, 128, 128);
DEQUANTISE(e5m2_128x128, WeightCode::kE5M2, ScaleType::kF32, 4, 128, 128);
DEQUANTISE(int8_rows, WeightCode::kInt8, ScaleType::kF32, 4, 1, 4096, 127);
DEQUANTISE(mxfp4, WeightCode::kE2M1, ScaleType::kE8M0, 1, 1, 32);
DEQUANTISE(nvfp4, WeightCode::kE2M1, ScaleType::kE4M3, 1, 1, 16, 777);
DEQUANTISE(nf4, WeightCode::kTable, ScaleType::kF32, 4, 1, 64);
DEQUANTISE(nf4_nested, WeightCode::kTable, ScaleType::kNested, 1, 1, 64);

}  // namespace
}  // namespace moeaudit::bench

BENCHMARK_MAIN();
