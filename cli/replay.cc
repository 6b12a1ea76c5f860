// moe-audit replay: what a recorded run computed, recomputed.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>
#include <thread>

#include "audit/measures/replay_backend.h"
#include "audit/measures/trace_replay.h"
#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

struct ReplayArguments {
  std::string path, format = "text";
  Arguments terminal;
  Device device = Device::kAuto;
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
};

int run(ReplayArguments& a) {
  if (a.device == Device::kCuda) open_cuda_or_throw();
  ReplayReport report;
  const std::unique_ptr<Trace> trace = open_trace(a.path, {}, &report.problems);
  report.table.path = a.path;
  if (trace) {
    ProgressBar bar(!a.terminal.no_progress);
    ReplayOptions options;
    options.progress = [&](std::string_view stage, double done) { bar(stage, done); };
    ReplayBackend backend(a.device, kernels::open_cuda, host_seconds(*trace) / a.threads);
    options.backend = &backend;
    options.threads = a.threads;
    report.table = replay_trace(*trace, options, &report.weight_problems);
    report.backend = backend.name_beside_host(kReplayedOnBackend);
    report.warning = backend.warning();
  }
  const WriterOptions options = terminal_options(a.terminal);
  if (a.format == "json")
    write_replay_json(report, options, std::cout);
  else
    write_replay_text(report, options, std::cout);
  const bool fatal =
      std::any_of(report.problems.begin(), report.problems.end(), [](const InputProblem& p) { return p.fatal; });
  const bool any =
      std::any_of(report.table.compared.begin(), report.table.compared.end(), [](std::int64_t n) { return n > 0; });
  return fatal || !report.weight_problems.empty() || !any ? 2 : 0;
}

std::function<int()> define(CLI::App& app) {
  auto a = std::make_shared<ReplayArguments>();
  app.add_option("path", a->path, "A trace: a folder with trace.json, or another that docs/trace.md lists")
      ->required()
      ->type_name("PATH");
  app.add_option("--format", a->format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  app.add_option("--threads", a->threads, "Threads; the result does not depend on it")
      ->type_name("N")
      ->check(CLI::Range(1, 1024));
  add_device_option(app, a->device);
  app.add_flag("-v,--verbose", a->terminal.verbose, "Text: every layer, not only those that differ");
  app.add_flag("--no-progress", a->terminal.no_progress, "No progress bar on stderr");
  app.add_option("--color", a->terminal.color, "auto, always or never (NO_COLOR is respected)")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->type_name("WHEN");
  app.footer(
      "Recomputes selection, weights, losses and their scales, and names what was computed instead; judges nothing: "
      "that is\n"
      "`moe-audit check --trace PATH`. Exit code 0, or 2 if a piece of the trace could not be read or there was "
      "nothing to compare.");
  return [a] { return run(*a); };
}

}  // namespace

extern const Subcommand subcommand_replay;
const Subcommand subcommand_replay = {
    "replay", "Recompute a recorded training step and name the formulas that were computed", define};

}  // namespace moeaudit
