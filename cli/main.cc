// The command line of moe-audit: finds the subcommand, turns errors into exit codes.
#include <malloc.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace {

constexpr int kUsage = 2, kInternal = 3;

int run(int argc, char** argv) {
  CLI::App app("Audits Mixture-of-Experts training: says what diverges from what was meant, how it knows, and what to change.",
               "moe-audit");
  app.set_version_flag("--version", "moe-audit " MOE_AUDIT_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  int exit_code = 0;
  for (int i = 0; i < moeaudit::kNumSubcommands; ++i) {
    const moeaudit::Subcommand& subcommand = *moeaudit::kSubcommands[i];
    CLI::App* sub = app.add_subcommand(std::string(subcommand.name), std::string(subcommand.summary));
    sub->callback([&exit_code, action = subcommand.define(*sub)] { exit_code = action(); });
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {  // --help, --version
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    const std::string first = argc > 1 ? argv[1] : "";
    if (app.get_subcommands().empty() && !first.empty() && first[0] != '-') {
      std::cerr << "moe-audit: there is no command '" << first << "'; commands:";
      for (const CLI::App* sub : app.get_subcommands({})) std::cerr << " " << sub->get_name();
      std::cerr << "\nRun moe-audit --help for what is accepted.\n";
      return kUsage;
    }
    std::cerr << "moe-audit: " << e.what() << "\n" << "Run moe-audit --help for what is accepted.\n";
    return kUsage;
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
#ifdef __GLIBC__
  // Arrays of a few MB come and go. Given back to the kernel each time, they took a quarter of a replay's time.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
  try {
    return run(argc, argv);
  } catch (const moeaudit::UsageError& e) {
    std::cerr << "moe-audit: " << e.message << "\n";
    return kUsage;
  } catch (const std::exception& e) {
    std::cerr << "moe-audit: internal error: " << e.what() << "\nThis is a bug of moe-audit; please report it with the command line.\n";
  } catch (...) {
    std::cerr << "moe-audit: internal error\n";
  }
  return kInternal;
}
