// moe-audit rules: the list of rules.
#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "audit/rules/rule.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

void print_text() {
  std::size_t width = 0;
  for (const Rule* rule : all_rules()) width = std::max(width, rule->name.size());
  for (const Rule* each : all_rules()) {
    const Rule& rule = *each;
    std::cout << rule.id << "  " << rule.name << std::string(width - rule.name.size() + 2, ' ');
    const std::string severity = name_of(rule.severity);
    std::cout << severity << std::string(9 - severity.size(), ' ') << rule.summary << "\n";
  }
}

void print_json() {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Rule* each : all_rules()) {
    const Rule& rule = *each;
    list.push_back({{"id", rule.id}, {"name", rule.name}, {"since", rule.since}, {"severity", name_of(rule.severity)},
                    {"summary", rule.summary}, {"doc", rule.doc}});
  }
  std::cout << list.dump(2) << "\n";
}

std::function<int()> define(CLI::App& app) {
  auto format = std::make_shared<std::string>("text");
  app.add_option("--format", *format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  return [format] {
    *format == "json" ? print_json() : print_text();
    return 0;
  };
}

}  // namespace

extern const Subcommand subcommand_rules;
const Subcommand subcommand_rules = {"rules", "List the rules", define};

}  // namespace moeaudit
