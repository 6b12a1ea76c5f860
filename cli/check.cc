// moe-audit check: the audit.
#include <CLI/CLI.hpp>
#include <memory>

#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

std::function<int()> define(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  add_input_options(app, *arguments);
  add_output_options(app, *arguments);
  app.footer(
      "Exit code: 0 nothing at or over --fail-on; 1 findings at or over it; 2 an input could not be read, nothing could be\n"
      "judged, wrong usage, or --strict and a rule could not tell; 3 internal error. The report is written in every case\n"
      "but wrong usage.\n\n"
      "Examples:\n"
      "  moe-audit check outputs/my-run                          a folder a trainer left behind\n"
      "  moe-audit check train.yml --assume transformers=4.57.1  before the run\n"
      "  moe-audit check model/ --format json=report.json        a model directory, report to a file");
  return [arguments] {
    finish(*arguments);
    const AuditResult result = audit(*arguments);
    return write_reports(result, *arguments) ? result.exit_code : 2;
  };
}

}  // namespace

extern const Subcommand subcommand_check;
const Subcommand subcommand_check = {"check", "Audit a model, a training config, an adapter, or a folder a trainer left behind",
                                     define};

}  // namespace moeaudit
