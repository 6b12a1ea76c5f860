// Traces of every format. The first byte says which file the rest of the input is; the files around it are sound.
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "audit/traces/trace.h"
#include "tests/fuzz/fuzz.h"

using namespace moeaudit;

namespace {

constexpr const char* kHead =
    R"({"format":"moe-audit-trace","version":1,"model":{"num_experts":3,"top_k":2,"hidden_size":2},"layers":[{"layer":0},{"layer":1}]})";
constexpr const char* kRecords =
    R"({"kind":"micro_batch","step":0,"micro_batch":0,"file":"a.safetensors","tokens":4,"batch":[2,2]}
{"kind":"step","step":0,"file":"a.safetensors"}
)";

/// A folder in memory where there is one.
const std::string& root() {
  static const std::string path = [] {
    std::error_code ec;
    std::string pattern =
        (std::filesystem::is_directory("/dev/shm", ec) ? "/dev/shm" : "/tmp") + std::string("/moe-audit-fuzz-XXXXXX");
    FUZZ_REQUIRE(::mkdtemp(pattern.data()));
    return pattern;
  }();
  return path;
}

void write(const std::string& name, std::string_view text) {
  std::ofstream(root() + "/" + name, std::ios::binary) << text;
}

void check(const TensorView& v) {
  FUZZ_REQUIRE(size_of(v.dtype) > 0);
  FUZZ_REQUIRE(v.elements() >= 0 && static_cast<std::size_t>(v.elements() * size_of(v.dtype)) == v.bytes.size());
  double value = 0;
  std::int32_t id = 0;
  if (v.elements() == 0) return;
  FUZZ_REQUIRE(read_values(v, v.elements() - 1, 1, &value));
  read_ids(v, v.elements() - 1, 1, &id);
  FUZZ_REQUIRE(!read_values(v, v.elements(), 1, &value));
  drop_pages(v, v.elements());
}

/// A matrix of a layer has the layer's columns, and the rows of the others.
void check_rows(const std::optional<TensorView>& v, std::int64_t columns, std::int64_t* rows) {
  if (!v) return;
  check(*v);
  FUZZ_REQUIRE(v->shape.size() == 2 && v->shape[1] == columns);
  if (*rows < 0) *rows = v->shape[0];
  FUZZ_REQUIRE(v->shape[0] == *rows);
}

void read_all(const Trace& trace) {
  std::vector<WeightProblem> problems;
  std::int64_t seen = 0;
  for (const TraceStep& step : trace.steps()) {
    for (const MicroBatchRecord& record : trace.micro_batches_of(step)) {
      FUZZ_REQUIRE(record.step == step.step);
      if (++seen > 50) return;
      const MicroBatch mb = trace.open(record, &problems);
      int last = -1;
      for (const LayerTensors& l : mb.layers) {
        FUZZ_REQUIRE(l.layer > last && trace.facts().layer(l.layer));
        last = l.layer;
        std::int64_t rows = -1;
        check_rows(l.router_logits, l.experts, &rows);
        check_rows(l.returned_router_logits, l.experts, &rows);
        check_rows(l.logits_grad, l.experts, &rows);
        check_rows(l.selected_experts, l.top_k, &rows);
        check_rows(l.recomputed_selected_experts, l.top_k, &rows);
        check_rows(l.routing_weights, l.top_k, &rows);
        check_rows(l.dropped, l.top_k, &rows);
        if (l.tokens_per_expert) {
          check(*l.tokens_per_expert);
          FUZZ_REQUIRE(l.tokens_per_expert->elements() == l.experts);
        }
      }
      for (const auto* v : {&mb.token_mask, &mb.label_mask, &mb.token_loss, &mb.sampled}) {
        if (*v) check(**v);
      }
    }
    for (const StepRecord& record : trace.ranks_of(step)) {
      if (++seen > 50) return;
      const StepTensors s = trace.open(record, &problems);
      for (const StepLayerTensors& l : s.layers) {
        for (const auto* v : {&l.router_weight, &l.router_grad, &l.router_grad_ce, &l.router_grad_aux,
                              &l.correction_bias_before, &l.correction_bias_after, &l.expert_grad_norm}) {
          if (*v) check(**v);
        }
      }
    }
  }
  for (const WeightProblem& p : problems) FUZZ_REQUIRE(!p.what.empty());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  if (size < 1 || size > (1 << 16)) return 0;
  const std::string_view text = as_text(data + 1, size - 1);
  const int kind = (data[0] & 63) % 9;
  static const char* const kFolders[] = {"own", "own", "own", "router", "tokens_per_expert", "array", "counts", "array", "array"};
  static const char* const kFiles[] = {"trace.json",  "records.jsonl", "a.safetensors", "router_trace_rank0.jsonl",
                                       "rank0.jsonl", "a.npy",         "a.json",         "a.npz",
                                       "a.safetensors"};
  const std::string folder = kFolders[kind];
  std::filesystem::create_directories(root() + "/" + folder);
  if (folder == "own") {
    write("own/trace.json", kHead);
    write("own/records.jsonl", kRecords);
  } else if (folder == "router") {
    write("router/logits_rank0.bin", std::string(96, '\x3f'));
    write("router/hidden_states_rank0.bin", std::string(96, '\x3f'));
  }
  write(folder + "/" + kFiles[kind], text);
  TraceOptions options;
  options.experts = data[0] & 64 ? 4 : 0;
  options.layers_first = data[0] & 128;
  std::vector<InputProblem> problems;
  const bool file = folder == "array" || folder == "counts";
  const auto trace =
      open_trace(root() + "/" + folder + (file ? std::string("/") + kFiles[kind] : ""), options, &problems);
  for (const InputProblem& p : problems) FUZZ_REQUIRE(!p.what.empty() && !p.file.empty());
  if (trace)
    read_all(*trace);
  else
    FUZZ_REQUIRE(!problems.empty());
  return 0;
}
