// The header of a 94,000-tensor checkpoint (DeepSeek-V3's shape: 61 layers, 512 experts of three matrices; 12.0 MB):
// parsed and checked, and opened as a file with its index. Target: 60 ms for the whole. Peers on the same bytes:
// copying them, which is the limit of the machine, and nlohmann::json::parse, which checks nothing of the format.
#include <benchmark/benchmark.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "audit/tensors/safetensors.h"
#include "audit/tensors/tensor_store.h"

namespace {

using namespace moeaudit;

struct Header {
  std::string text = "{";
  std::int64_t data = 0;
};

const Header& header() {
  static const Header made = [] {
    Header h;
    for (int layer = 0; layer < 61; ++layer) {
      for (int expert = 0; expert < 512; ++expert) {
        for (const char* matrix : {"gate_proj", "up_proj", "down_proj"}) {
          const std::int64_t begin = h.data;
          h.data += std::int64_t{2048} * 768 * 2;
          h.text += (h.text.size() > 1 ? ",\"model.layers." : "\"model.layers.") + std::to_string(layer) +
                    ".mlp.experts." + std::to_string(expert) + "." + matrix +
                    R"(.weight":{"dtype":"BF16","shape":[2048,768],"data_offsets":[)" + std::to_string(begin) + "," +
                    std::to_string(h.data) + "]}";
        }
      }
    }
    h.text += "}";
    return h;
  }();
  return made;
}

/// A sparse file: only the header takes space on disk.
const std::string& sparse_file() {
  static const std::string path = [] {
    const std::string p = (std::filesystem::temp_directory_path() / "moe_audit_bench_header.safetensors").string();
    const std::uint64_t length = header().text.size();
    std::ofstream(p, std::ios::binary).write(reinterpret_cast<const char*>(&length), 8) << header().text;
    std::filesystem::resize_file(p, 8 + length + static_cast<std::uint64_t>(header().data));
    return p;
  }();
  return path;
}

void set_rate(benchmark::State& state) {
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) *
                          static_cast<std::int64_t>(header().text.size()));
}

void parse_and_check(benchmark::State& state) {
  const Header& h = header();
  const std::int64_t size = 8 + static_cast<std::int64_t>(h.text.size()) + h.data;
  for (auto _ : state) {
    const SafetensorsHeader parsed = parse_safetensors_header(h.text, size);
    if (parsed.tensors.size() != 93'696 || !parsed.faults.empty()) state.SkipWithError("wrong result");
  }
  set_rate(state);
}

void open_and_index(benchmark::State& state) {
  for (auto _ : state) {
    std::vector<WeightProblem> problems;
    const TensorStore store = TensorStore::open(sparse_file(), "model", &problems);
    if (!store.find("model.layers.60.mlp.experts.511.down_proj.weight") || !problems.empty())
      state.SkipWithError("wrong result");
  }
  set_rate(state);
}

void find_by_name(benchmark::State& state) {
  std::vector<WeightProblem> problems;
  const TensorStore store = TensorStore::open(sparse_file(), "model", &problems);
  std::size_t i = 0;
  for (auto _ : state) {
    i = (i + 7919) % store.size();
    benchmark::DoNotOptimize(store.find(store[i].name));
  }
}

void peer_copy(benchmark::State& state) {
  std::string copy(header().text.size(), ' ');
  for (auto _ : state) {
    std::memcpy(copy.data(), header().text.data(), copy.size());
    benchmark::ClobberMemory();
  }
  set_rate(state);
}

void peer_nlohmann(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(nlohmann::json::parse(header().text));
  set_rate(state);
}

BENCHMARK(parse_and_check)->Unit(benchmark::kMillisecond);
BENCHMARK(open_and_index)->Unit(benchmark::kMillisecond);
BENCHMARK(find_by_name)->Unit(benchmark::kNanosecond);
BENCHMARK(peer_copy)->Unit(benchmark::kMillisecond);
BENCHMARK(peer_nlohmann)->Unit(benchmark::kMillisecond);

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  std::filesystem::remove(sparse_file());
}
