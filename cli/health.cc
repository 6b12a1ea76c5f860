// moe-audit health: how tokens spread over the experts, measured.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <thread>

#include "audit/inputs/inputs.h"
#include "audit/measures/expert_health.h"
#include "audit/measures/routed_states.h"
#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

struct HealthArguments {
  std::string path, hidden_states, against, expert_map, format = "text", score;
  TraceOptions trace;
  HealthOptions health;
  Arguments terminal;
  Device device = Device::kAuto;
};

bool is_model(const std::string& path) {
  std::error_code ec;
  return path.ends_with(".safetensors") || std::filesystem::exists(std::filesystem::path(path) / "config.json", ec);
}

int run(HealthArguments& a) {
  static const std::map<std::string, Scoring> kScores = {
      {"softmax", Scoring::kSoftmax}, {"sigmoid", Scoring::kSigmoid}, {"sqrtsoftplus", Scoring::kSqrtSoftplus}};
  if (!a.score.empty()) a.health.score = kScores.at(a.score);
  HealthReport report;
  report.path = a.path;
  PlacementOptions& placement = a.health.placement;
  if (placement.ranks == 0) placement.ranks = static_cast<std::int64_t>(placement.speeds.size());
  if (!a.expert_map.empty()) {
    placement.map = read_expert_map(a.expert_map, placement.ranks, &report.problems);
    if (!placement.map) placement.ranks = 0;  // no forecast of another placement than was asked for
  }
  // A trace, or a checkpoint whose routers are run on hidden states.
  std::vector<LoadedRun> checkpoint;
  std::shared_ptr<ReplayBackend> backend;
  if (a.device == Device::kCuda) open_cuda_or_throw();
  std::unique_ptr<Trace> trace;
  if (recognise_trace(a.path) == TraceFormat::kNone && (!a.hidden_states.empty() || is_model(a.path))) {
    RunOptions options;
    options.paths = {a.path};
    options.hidden_states = a.hidden_states;
    checkpoint = load_runs(options);
    LoadedRun& run = checkpoint.front();
    report.problems = std::move(run.problems);
    trace = route_hidden_states(&run.facts, run.model, run.hidden_states, a.device, &backend, &report.problems);
  } else {
    trace = open_trace(a.path, a.trace, &report.problems);
  }
  std::unique_ptr<Trace> against;
  if (!a.against.empty()) against = open_trace(a.against, a.trace, &report.problems);
  if (trace) {
    ProgressBar bar(!a.terminal.no_progress);
    a.health.against = against.get();
    if (!backend) backend = std::make_shared<ReplayBackend>(a.device, kernels::open_cuda, health_seconds(*trace) / a.health.threads);
    a.health.backend = backend.get();
    a.health.progress = [&](std::string_view stage, double done) { bar(stage, done); };
    std::vector<InputProblem> problems = std::move(report.problems);
    report = measure_health(*trace, a.health);
    report.problems.insert(report.problems.begin(), problems.begin(), problems.end());
    report.backend = backend->name_beside_host(kMeasuredOnBackend);
    report.warning = backend->warning();
  }
  const WriterOptions options = terminal_options(a.terminal);
  if (a.format == "json")
    write_health_json(report, options, std::cout);
  else
    write_health_text(report, options, std::cout);
  const bool fatal =
      std::any_of(report.problems.begin(), report.problems.end(), [](const InputProblem& p) { return p.fatal; });
  return fatal || !report.weight_problems.empty() || report.layers.empty() ? 2 : 0;
}

std::function<int()> define(CLI::App& app) {
  auto a = std::make_shared<HealthArguments>();
  app.add_option("path", a->path,
                 "A trace: a folder with trace.json, Megatron-LM's router_trace_rank*.jsonl or tokens_per_expert/, a "
                 "routed-experts array (.npy, .npz, .safetensors), or the JSON of expert counts; with --hidden-states a model")
      ->required()
      ->type_name("PATH");
  app.add_option("--against", a->against,
                 "A trace of the same tokens, routed by another checkpoint: saturation and change of the routing")
      ->type_name("PATH");
  app.add_option("--hidden-states", a->hidden_states,
                 "PATH is a model: run its routers on these inputs, safetensors [tokens, hidden]")
      ->type_name("FILE");
  app.add_option("--experts", a->trace.experts, "Experts a layer, where the trace does not say")
      ->type_name("E")
      ->check(CLI::Range(1, 1 << 16));
  app.add_flag("--layers-first", a->trace.layers_first,
               "A routed-experts array is [layers, tokens, k], not [tokens, layers, k]");
  app.add_option(
         "--score", a->score,
         "What makes probabilities of logits, where the model's family is not known: softmax, sigmoid or sqrtsoftplus")
      ->check(CLI::IsMember({"softmax", "sigmoid", "sqrtsoftplus"}))
      ->type_name("SCORE");
  PlacementOptions& placement = a->health.placement;
  app.add_option("--expert-parallel", placement.ranks, "Forecast the load of N expert-parallel ranks")
      ->type_name("N")
      ->check(CLI::Range(2, 1 << 16));
  app.add_option("--expert-map", a->expert_map,
                 "JSON that says where the experts lie: [rank of each expert], one list or one a layer, or EPLB's "
                 "physical_to_logical_map; else contiguous runs")
      ->type_name("FILE");
  app.add_option("--device-speeds", placement.speeds, "Relative speed of each rank: 1,1,0.5,1")
      ->delimiter(',')
      ->check(CLI::Range(1e-6, 1e6))
      ->type_name("LIST");
  app.add_option("--hidden-size", placement.hidden_size, "d of the bytes between ranks, where the trace does not say")
      ->type_name("D")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--value-bytes", placement.bytes_per_value, "Bytes of a value sent between ranks: 2 of bfloat16, 1 of FP8")
      ->type_name("B")
      ->check(CLI::IsMember({1, 2, 4}));
  app.add_flag("--co-activation", a->health.co_activation, "JSON: the whole table of pairs a layer, up to 512 experts");
  app.add_option("--format", a->format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  a->health.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  app.add_option("--threads", a->health.threads, "Threads; the result does not depend on it")
      ->type_name("N")
      ->check(CLI::Range(1, 1024));
  add_device_option(app, a->device);
  app.add_flag("-v,--verbose", a->terminal.verbose, "Text: the busiest and the least used experts of each layer");
  app.add_flag("--no-progress", a->terminal.no_progress, "No progress bar on stderr");
  app.add_option("--color", a->terminal.color, "auto, always or never (NO_COLOR is respected)")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->type_name("WHEN");
  app.footer(
      "Measures and judges nothing: each number stands beside what chance and too few tokens would show. Exit code 0, "
      "or 2 if\n"
      "a piece of the input could not be read or there was nothing to measure.");
  return [a] { return run(*a); };
}

}  // namespace

extern const Subcommand subcommand_health;
const Subcommand subcommand_health = {
    "health", "Measure how tokens spread over the experts, from a trace, Megatron-LM's logs, routed experts or counts",
    define};

}  // namespace moeaudit
