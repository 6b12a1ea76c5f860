// moe-audit advisories: faults of releases that moe-audit knows, and whom they bite.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "audit/rules/advisory.h"
#include "cli/arguments.h"
#include "cli/subcommand.h"

namespace moeaudit {
namespace {

bool concerns(const Advisory& a, const std::string& package) {
  return package.empty() || std::any_of(a.affected.begin(), a.affected.end(), [&](const AffectedPackage& p) { return p.name == package; });
}

std::vector<const Advisory*> selected(const std::string& package) {
  std::vector<const Advisory*> list;
  for (int i = 0; i < kNumAdvisories; ++i) {
    if (concerns(kAdvisories[i], package)) list.push_back(&kAdvisories[i]);
  }
  return list;
}

void print_text(const std::vector<const Advisory*>& list) {
  for (const Advisory* a : list) {
    std::cout << a->id << "  " << name_of(a->severity) << "  " << a->name << "\n";
    for (const AffectedPackage& p : a->affected) std::cout << "       " << p.name << " " << text_of(p) << "\n";
    std::cout << "       " << a->summary << "\n";
  }
}

void print_json(const std::vector<const Advisory*>& list) {
  using Json = nlohmann::ordered_json;
  Json out = Json::array();
  for (const Advisory* a : list) {
    Json affected = Json::array(), when = Json::array();
    for (const AffectedPackage& p : a->affected) {
      Json windows = Json::array();
      for (const AdvisoryWindow& w : p.windows) {
        Json window = Json::object();
        for (const auto& [key, value] : {std::pair{"from", w.from}, {"fixed_in", w.until}, {"newest_seen", w.seen}}) {
          if (!value.empty()) window[key] = value;
        }
        windows.push_back(std::move(window));
      }
      affected.push_back({{"package", p.name}, {"releases", text_of(p)}, {"windows", std::move(windows)}});
    }
    for (const AdvisoryCondition& c : a->when) when.push_back(c.text);
    out.push_back({{"id", a->id}, {"name", a->name}, {"package", a->package}, {"severity", name_of(a->severity)},
                   {"evidence", a->evidence}, {"affected", std::move(affected)}, {"when", std::move(when)},
                   {"summary", a->summary}, {"text", a->text}, {"release", a->release}, {"issues", a->issues},
                   {"sources", a->sources}});
  }
  std::cout << out.dump(2) << "\n";
}

std::function<int()> define(CLI::App& app) {
  auto package = std::make_shared<std::string>();
  auto format = std::make_shared<std::string>("text");
  app.add_option("--package", *package, "Only advisories that concern this package")->type_name("NAME");
  app.add_option("--format", *format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  app.footer("Each advisory is a rule: `moe-audit check` judges it, --select AV or AV001 selects it, `moe-audit explain AV001`\n"
             "says what it checks and why it matters.");
  return [package, format] {
    const std::vector<const Advisory*> list = selected(*package);
    if (list.empty()) throw UsageError{"no advisory concerns '" + *package + "'; `moe-audit advisories` lists them all"};
    *format == "json" ? print_json(list) : print_text(list);
    return 0;
  };
}

}  // namespace

extern const Subcommand subcommand_advisories;
const Subcommand subcommand_advisories = {"advisories", "List the known faults of releases, and which releases have them", define};

}  // namespace moeaudit
