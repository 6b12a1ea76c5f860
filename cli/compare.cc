// moe-audit compare: a scaling pair of recorded runs, or of their logs.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <filesystem>
#include <iostream>
#include <memory>

#include "audit/inputs/inputs.h"
#include "audit/measures/run_pair.h"
#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

struct CompareArguments {
  std::string a, b, set_a, set_b, format = "text";
  Arguments terminal;
};

/// "M=8,W=2" over what the run's files say.
void set(const std::string& text, const char* option, RunSettings* settings) {
  constexpr std::string_view kNames[] = {"M", "W", "S", "TP", "CP", "EP", "L", "k", "E", "recompute"};
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string piece = text.substr(begin, end - begin);
    const std::size_t equals = piece.find('=');
    const std::string name = piece.substr(0, equals);
    int value = 0;
    const char* const last = piece.data() + piece.size();
    const bool number =
        equals != std::string::npos && std::from_chars(piece.data() + equals + 1, last, value).ptr == last && value > 0;
    if (!number || std::find(std::begin(kNames), std::end(kNames), name) == std::end(kNames)) {
      throw UsageError{std::string(option) +
                       " takes settings such as M=8,W=2 (M accumulation steps, W processes, S "
                       "sequences of a micro-batch, TP, CP, EP, L MoE layers, k, E), not '" +
                       piece + "'"};
    }
    (*settings)[name] = value;
    begin = end + 1;
  }
}

/// A run by its log: a folder that a trainer left, or a log file with what else of the run lies beside it.
FactSheet facts_of(const std::string& path, std::vector<InputProblem>* problems) {
  namespace fs = std::filesystem;
  std::error_code ec;
  RunOptions options;
  if (fs::is_regular_file(path, ec)) {
    options.logs.push_back(path);
    const std::string folder = fs::path(path).parent_path().string();
    options.paths.push_back(folder.empty() ? "." : folder);
  } else {
    options.paths.push_back(path);
  }
  LoadedRun run = std::move(load_runs(options).front());
  if (!options.logs.empty() && !run.facts.log.known()) {
    options.paths.clear();
    run = std::move(load_runs(options).front());
  }
  for (InputProblem& p : run.problems) {
    if (!run.facts.log.known() || p.file == path) problems->push_back(std::move(p));
  }
  return std::move(run.facts);
}

int run(CompareArguments& args) {
  PairReport report;
  report.a = args.a;
  report.b = args.b;
  const auto is_trace = [](const std::string& path) { return recognise_trace(path) != TraceFormat::kNone; };
  if (is_trace(args.a) || is_trace(args.b)) {
    if (!args.set_a.empty() || !args.set_b.empty())
      throw UsageError{"--set-a and --set-b are for logs: a trace says how it was recorded"};
    const std::unique_ptr<Trace> a = open_trace(args.a, {}, &report.problems);
    const std::unique_ptr<Trace> b = open_trace(args.b, {}, &report.problems);
    if (a && b)
      compare_runs(*a, *b, &report);
    else
      report.not_comparable = (a ? args.b : args.a) + " could not be opened as a trace";
  } else {
    const FactSheet a = facts_of(args.a, &report.problems), b = facts_of(args.b, &report.problems);
    RunSettings of_a = settings_of(a), of_b = settings_of(b);
    set(args.set_a, "--set-a", &of_a);
    set(args.set_b, "--set-b", &of_b);
    compare_logs(a, b, of_a, of_b, &report);
  }
  const WriterOptions options = terminal_options(args.terminal);
  if (args.format == "json")
    write_pair_json(report, options, std::cout);
  else
    write_pair_text(report, options, std::cout);
  return !report.not_comparable.empty() || !report.weight_problems.empty() || report.rows.empty() ? 2 : 0;
}

std::function<int()> define(CLI::App& app) {
  auto a = std::make_shared<CompareArguments>();
  app.add_option("a", a->a, "Trace, run folder or log of the first run")->required()->type_name("RUN_A");
  app.add_option("b", a->b,
                 "The same of a run of the same weights and data with another split: accumulation, ranks, TP, CP, EP, "
                 "micro-batch")
      ->required()
      ->type_name("RUN_B");
  app.add_option("--set-a", a->set_a, "What the files of a log do not say: M=8,W=2,S=1,TP=1,CP=1,EP=1,L=16,k=8,E=64")
      ->type_name("SETTINGS");
  app.add_option("--set-b", a->set_b, "The same for RUN_B")->type_name("SETTINGS");
  app.add_option("--format", a->format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  app.add_option("--color", a->terminal.color, "auto, always or never (NO_COLOR is respected)")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->type_name("WHEN");
  app.footer(
      "How a batch is split over micro-batches and ranks must not change what a step computes: every ratio should be "
      "1. Exit\n"
      "code 0, or 2 if the two are no pair or could not be read.");
  return [a] { return run(*a); };
}

}  // namespace

extern const Subcommand subcommand_compare;
const Subcommand subcommand_compare = {
    "compare", "Two runs of the same data that split the batch differently, by trace or log: one ratio a quantity",
    define};

}  // namespace moeaudit
