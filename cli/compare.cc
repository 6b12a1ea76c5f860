// moe-audit compare: a scaling pair of recorded runs.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>

#include "audit/measures/run_pair.h"
#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

struct CompareArguments {
  std::string a, b, format = "text";
  Arguments terminal;
};

int run(CompareArguments& args) {
  PairReport report;
  report.a = args.a;
  report.b = args.b;
  const std::unique_ptr<Trace> a = open_trace(args.a, {}, &report.problems);
  const std::unique_ptr<Trace> b = open_trace(args.b, {}, &report.problems);
  if (a && b)
    compare_runs(*a, *b, &report);
  else
    report.not_comparable = "one of them could not be opened";
  const WriterOptions options = terminal_options(args.terminal);
  if (args.format == "json")
    write_pair_json(report, options, std::cout);
  else
    write_pair_text(report, options, std::cout);
  return !report.not_comparable.empty() || !report.weight_problems.empty() || report.rows.empty() ? 2 : 0;
}

std::function<int()> define(CLI::App& app) {
  auto a = std::make_shared<CompareArguments>();
  app.add_option("a", a->a, "Trace of the first run")->required()->type_name("RUN_A");
  app.add_option("b", a->b,
                 "Trace of the same weights and data with another split: accumulation, ranks, TP, CP, EP, micro-batch")
      ->required()
      ->type_name("RUN_B");
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
    "compare", "Two recorded runs of the same data that split the batch differently: one ratio a quantity", define};

}  // namespace moeaudit
