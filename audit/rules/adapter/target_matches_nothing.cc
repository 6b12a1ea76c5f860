// AD004: an entry of the adapter configuration matches no module.
#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
An entry of target_modules, target_parameters or modules_to_save matches nothing in this model, or makes PEFT stop, under
every PEFT and transformers version this run may use.

## Why it matters
PEFT raises an error only if the whole list matches nothing; a dead entry beside live ones is passed over in
silence, and what it named stays frozen. Names differ between families (`w1` in Mixtral, `gate_proj` in Qwen) and
between versions: transformers 5 renames `block_sparse_moe` to `mlp` and turns `gate` and the experts into
parameters that a module name does not reach. A list entry matches whole path components at the end of the path, so
`gate` matches `mlp.gate` and not `gate_proj`; a single string is a regex over the whole path, so a bare `q_proj`
matches nothing (peft tuners/tuners_utils.py).

Other entries end the run before its first step: PEFT 0.19 on transformers 5 takes the string `all-linear` apart into its
letters (PEFT issue 3229); `w1` cannot be adapted without `w3` where they are one fused parameter; LoRA on a parameter
refuses a dropout other than 0.

## How to fix
Correct the name or delete the entry; where PEFT stops, the finding names the cure. `moe-audit facts` lists what each entry
reaches.

## Limits
Entries of exclude_modules are not judged: PEFT warns about those. Expert names that match nothing while no routed
expert is adapted are AD003's, where the reason stands. An entry that matches under one possible version and not
under another is passed. A vision or audio tower is known by the tensors in the files of the model: without them, or where they name
it otherwise than memory does, an entry that reaches nothing of the language model is not judged.
)md";

/// PEFT stops: what makes it accept the entry.
std::string cure(Facts& f, const AdapterTargets& targets, std::size_t i) {
  if (targets.fault[i] == TargetFault::kSplitString) return "Use PEFT 0.20 or later:\n    pip install \"peft==0.20.0\"";
  if (targets.fault[i] == TargetFault::kDropout) return say::lora(f, {{"lora_dropout", "0.0"}});
  if (targets.fault[i] != TargetFault::kLacksPartner || targets.partner[i].empty()) return {};
  std::vector<std::string> all = adapter::without(targets, targets.field[i], {});
  all.push_back(targets.partner[i]);
  return say::lora(f, {{targets.field[i], say::list_literal(all)}});
}

std::string remedy(Facts& f, const AdapterTargets& targets, std::size_t i) {
  if (std::string text = cure(f, targets, i); !text.empty()) return text;
  std::vector<std::string> dead;  // all of them: a list that keeps another dead entry is no remedy
  for (std::size_t j = 0; j < targets.entry.size(); ++j) {
    if (targets.field[j] == targets.field[i] && targets.hits[j] == 0) dead.push_back(targets.entry[j]);
  }
  const std::vector<std::string> rest = adapter::without(targets, targets.field[i], dead);
  const std::string delete_it = rest.empty() ? "Delete it:\n    " + say::lora_key(f, targets.field[i]) + ": null"
                                             : say::lora(f, {{targets.field[i], say::list_literal(rest)}});
  const bool* linear = f.want(f->router_is_linear);
  if (targets.field[i] == "target_modules" && targets.entry[i] == say::router_leaf(f) && linear && !*linear) {
    return delete_it + "\nThe router is a parameter here, not a linear module; to train it, " +
           say::lora(f, {{"modules_to_save", say::list_literal({targets.entry[i]})}});
  }
  return delete_it;
}

/// One finding for all entries that PEFT refuses for the same dropout.
bool told_before(const AdapterTargets& targets, std::size_t i) {
  for (std::size_t j = 0; j < i && targets.fault[i] == TargetFault::kDropout; ++j) {
    if (targets.hits[j] == 0 && targets.fault[j] == TargetFault::kDropout) return true;
  }
  return false;
}

std::string message(const AdapterTargets& targets, std::size_t i) {
  const std::string entry = "\"" + targets.entry[i] + "\" in " + targets.field[i];
  if (targets.fault[i] == TargetFault::kNone) {
    const std::string why = targets.why[i].empty() ? "" : " (" + targets.why[i] + ")";
    return entry + " matches 0 modules of this model" + why + ": what it names stays frozen.";
  }
  constexpr std::string_view kStops = "PEFT stops: ";
  const std::string why = targets.why[i].rfind(kStops, 0) == 0 ? targets.why[i].substr(kStops.size()) : targets.why[i];
  return "PEFT stops at " + entry + " and the run does not start: " + why + ".";
}

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterTargets* targets = f.require(f->adapter_targets);
  if (f.missing()) return f.cannot_tell();
  const AdapterModules* modules = f.want(f->adapter_modules);
  std::vector<Finding> findings;
  for (std::size_t i = 0; i < targets->entry.size(); ++i) {
    if (targets->hits[i] > 0 || targets->field[i] == "exclude_modules" || targets->fault[i] == TargetFault::kElsewhere) continue;
    if (modules && adapter::missed_experts(*targets, i, *modules)) continue;
    if (told_before(*targets, i)) continue;
    const Location where = adapter::place_of(f, *targets, i);
    Finding finding;
    finding.severity = Severity::kError;
    finding.message = message(*targets, i);
    finding.evidence = {{targets->field[i], targets->entry[i], where}, {"modules matched", "0", where}};
    if (targets->fault[i] == TargetFault::kDropout) finding.evidence.push_back(say::evidence(f->adapter_dropout));
    if (f.want(f->transformers)) finding.evidence.push_back(say::evidence(f->transformers));
    if (f.want(f->peft)) finding.evidence.push_back(say::evidence(f->peft));
    finding.remedy = remedy(f, *targets, i);
    finding.does_not_show = "Which module was meant.";
    finding.locations = {where};
    finding.sources = say::sources({"huggingface/peft src/peft/tuners/tuners_utils.py (check_target_module_exists)"});
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "each entry that is judged here reaches something");
}

}  // namespace

extern const Rule rule_target_matches_nothing;
const Rule rule_target_matches_nothing = {
    .id = "AD004",
    .name = "target-matches-nothing",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "An entry of the adapter configuration matches nothing.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
