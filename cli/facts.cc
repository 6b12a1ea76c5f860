// moe-audit facts: what was understood, and where each fact comes from.
#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

std::function<int()> define(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  auto format = std::make_shared<std::string>("text");
  add_input_options(app, *arguments);
  app.add_option("--format", *format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  app.footer("Prints each fact with its origin (stated, framework default, family, derived, measured, assumed), the place it\n"
             "was read from and what it shadowed, and what the trainer would really do. Judges nothing; exit code 0, or 2 if\n"
             "an input could not be read.");
  return [arguments, format] {
    finish(*arguments);
    arguments->engine.replays = false;
    arguments->engine.measure_everything = true;
    const AuditResult result = audit(*arguments);
    if (*format == "json") write_facts_json(result, terminal_options(*arguments), std::cout);
    else write_facts_text(result, terminal_options(*arguments), std::cout);
    for (const RunResult& run : result.runs) {
      for (const InputProblem& problem : run.problems) {
        if (problem.fatal) return 2;
      }
    }
    return 0;
  };
}

}  // namespace

extern const Subcommand subcommand_facts;
const Subcommand subcommand_facts = {"facts", "Print what was understood: every fact, its origin, and what it shadowed", define};

}  // namespace moeaudit
