// moe-audit explain: the documentation of one rule, from the rule's own file.
#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "audit/rules/rule.h"
#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

std::function<int()> define(CLI::App& app) {
  auto id = std::make_shared<std::string>();
  app.add_option("RULE", *id, "Rule id (BL001) or name (aux-loss-not-in-loss)")->required();
  return [id] {
    const Rule* rule = find_rule(*id);
    if (!rule) throw UsageError{"no rule is called '" + *id + "'; `moe-audit rules` lists them"};
    std::cout << "# " << rule->id << " " << rule->name << " (" << name_of(rule->severity) << ", since " << rule->since << ")\n\n"
              << rule->summary << "\n";
    std::string_view doc = rule->doc;
    while (!doc.empty() && doc.front() == '\n') doc.remove_prefix(1);
    while (!doc.empty() && doc.back() == '\n') doc.remove_suffix(1);
    std::cout << "\n" << doc << "\n";
    return 0;
  };
}

}  // namespace

extern const Subcommand subcommand_explain;
const Subcommand subcommand_explain = {"explain", "Explain a rule: what it checks, why it matters, how to fix it, its limits", define};

}  // namespace moeaudit
