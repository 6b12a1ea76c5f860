// AD001: the adapter trains the routers.
#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Under the pinned PEFT and transformers, the resolved target_modules, target_parameters or modules_to_save include
the routers.

## Why it matters
It mostly happens unasked. In transformers 4 the router is an nn.Linear called `gate`, so `all-linear`, Axolotl's
`lora_target_linear` and LLaMA-Factory's `lora_target: all` take it; PEFT from 0.20 with transformers 5 rewrites
`all-linear` and `gate` to it (utils/transformers_weight_conversion.py). ms-swift's Megatron path leaves routers out
unless `all-router` is listed.

A small change of a router sends tokens to other experts: the one part of the network whose output jumps. ESFT gets
50.2 of 51.0 points of full fine-tuning with routers frozen (arXiv 2407.01906 Table 1). With gradient checkpointing,
a recomputed near-tie can route differently and stop the run (pytorch/pytorch issue 171355; gone once the gate is no
LoRA target).

## How to fix
Take the entry out, or name the targets instead of taking all. If routers are to be trained, watch loads and the
balance loss.

## Limits
A warning: no controlled experiment on adapters on routers alone was found, in either direction. What the adapter
does to the router's values is not judged here; its size is (AD002).
)md";

/// Entries that reach a router, as rows of AdapterTargets.
struct Culprits {
  std::vector<std::size_t> pure;   // they reach routers only ("gate") and can be dropped
  std::vector<std::size_t> mixed;  // "all-linear", a regex
};

Culprits find_culprits(const AdapterTargets& targets) {
  Culprits found;
  for (std::size_t i = 0; i < targets.entry.size(); ++i) {
    const std::string& reaches = targets.reaches[i];
    if (targets.field[i] == "exclude_modules" || reaches.find("router") == std::string::npos) continue;
    const bool only = reaches.rfind("router", 0) == 0 && reaches.find(',') == std::string::npos;
    (only ? found.pure : found.mixed).push_back(i);
  }
  return found;
}

/// Rows that are routers of their own: a module inside one (ERNIE's gate.moe_statics) is part of it.
std::int64_t num_routers(const AdapterModules& modules, const std::vector<std::size_t>& rows) {
  return std::count_if(rows.begin(), rows.end(), [&](std::size_t i) {
    const std::string& name = modules.module[i];
    return std::none_of(rows.begin(), rows.end(), [&](std::size_t j) {
      const std::string& other = modules.module[j];
      return name.size() > other.size() && name[other.size()] == '.' && name.compare(0, other.size(), other) == 0;
    });
  });
}

std::string drop(Facts& f, const AdapterTargets& targets, const std::vector<std::size_t>& rows) {
  say::Settings settings;
  for (const char* field : {"target_modules", "target_parameters", "modules_to_save"}) {
    std::vector<std::string> entries;
    for (std::size_t i : rows) {
      if (targets.field[i] == field) entries.push_back(targets.entry[i]);
    }
    if (entries.empty()) continue;
    const std::vector<std::string> rest = adapter::without(targets, field, entries);
    settings.emplace_back(field, rest.empty() ? "null" : say::list_literal(rest));
  }
  return say::lora(f, settings);
}

std::string remedy(Facts& f, const Culprits& culprits, const AdapterTargets* targets, bool by_parameter) {
  if (targets && culprits.mixed.empty() && !culprits.pure.empty()) return drop(f, *targets, culprits.pure);
  const std::string* framework = f.want(f->framework);
  const bool axolotl = framework && framework->rfind("axolotl", 0) == 0;
  if (!axolotl && !by_parameter) return say::lora(f, {{"exclude_modules", say::list_literal({say::router_leaf(f)})}});
  // Axolotl's schema drops lora_exclude_modules, and an exclusion of modules does not take a parameter out.
  const std::string attention = say::list_literal({"q_proj", "k_proj", "v_proj", "o_proj"});
  return "Name the targets instead of taking all, here attention alone. " +
         say::lora(f, axolotl ? say::Settings{{"lora_target_linear", "false"}, {"target_modules", attention}}
                              : say::Settings{{"target_modules", attention}});
}

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterModules* modules = f.require(f->adapter_modules);
  if (f.missing()) return f.cannot_tell();
  std::vector<std::size_t> rows;
  for (std::size_t i = 0; i < modules->part.size(); ++i) {
    if (modules->part[i] == Part::kRouter) rows.push_back(i);
  }
  if (rows.empty()) return Outcome::pass("no adapter module is a router");

  const AdapterTargets* targets = f.want(f->adapter_targets);
  const Culprits culprits = targets ? find_culprits(*targets) : Culprits{};
  const std::size_t first = rows.front();
  const std::int64_t routers = num_routers(*modules, rows);
  const std::int64_t rank = modules->rank[first];
  std::int64_t parameters = 0;
  for (std::size_t i : rows) parameters += modules->adapter_parameters[i];
  std::vector<std::string> entries;
  std::vector<Location> places;
  for (const auto* group : {&culprits.pure, &culprits.mixed}) {
    for (std::size_t i : *group) {
      entries.push_back(targets->entry[i]);
      places.push_back(adapter::place_of(f, *targets, i));
    }
  }
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "The adapter trains " + say::plural(routers, "router", "routers") +
                    (rank == 0 ? std::string(" whole") : " with rank " + std::to_string(rank)) + ", " +
                    say::count(parameters) + " parameters" +
                    (entries.empty() ? "" : ", through the entry " + say::some(entries)) + ".";
  finding.evidence = {{"adapter.modules router", modules->module[first], location_of(f->adapter_modules.source())},
                      {"adapter.modules routers", std::to_string(routers), {}},
                      {"adapter.modules router parameters", say::count(parameters), {}}};
  if (f.want(f->adapter_rank)) finding.evidence.push_back(say::evidence(f->adapter_rank));
  finding.remedy = remedy(f, culprits, targets, modules->by_parameter[first]);
  finding.does_not_show = "That training the routers harms this run, or that somebody did not mean it.";
  finding.locations = std::move(places);
  if (finding.locations.empty()) finding.locations.push_back(location_of(f->adapter_modules.source()));
  finding.sources = say::sources({"arXiv 2407.01906 Table 1", "pytorch/pytorch issue 171355"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_adapter_on_router;
const Rule rule_adapter_on_router = {
    .id = "AD001",
    .name = "adapter-on-router",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "The adapter trains the routers.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
