// BT001: the run does not train the router, and the router is not the base's.
#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Adapter and configuration say that no gradient reaches the router, and every router weight is bit for bit the base's
(a base in a wider dtype is first rounded to the dtype of the trained tensor, as loading does).

## Why it matters
An adapter is trained against the routing of its base. A router from another checkpoint sends tokens to experts that
never saw such tokens: the loss of a merge with a foreign router has nothing to do with the loss of the run. It
happens when an adapter is merged into another revision or another fine-tune of the base, when tensors of two
checkpoints are mixed, or when a merge tool averages routers along with the rest. Three steps of another fine-tune
change 1.3 % of the choices of the small model in fixtures/pairs; an unrelated router keeps what chance keeps, k / E.

## How to fix
Merge again, into the base that the adapter's base_model_name_or_path names.

## Limits
It needs the base's weights. Which parameters train is resolved from the adapter's configuration; a script that also
unfreezes the router by hand trains it, and this rule then says that the claim and the weights disagree. Correction
biases have rule BT003.
)md";

Outcome check(Facts& f) {
  if (pair::no_pair(f)) return Outcome::not_applicable(pair::kNoPair);
  const bool* trains = f.require(f->router_trains);
  if (trains && *trains) return Outcome::not_applicable("the run trains the router");
  const BaseChanges* changes = f.require(f->base_changes);
  if (f.missing()) return f.cannot_tell();
  std::vector<std::size_t> moved;
  std::int64_t routers = 0;
  double largest = 0;
  for (std::size_t i = 0; i < changes->part.size(); ++i) {
    if (changes->part[i] != Part::kRouter || changes->is_buffer[i]) continue;
    ++routers;
    if (changes->changed[i] == 0) continue;
    moved.push_back(i);
    largest = std::max(largest, pair::relative(*changes, i));
  }
  if (routers == 0) return Outcome::not_applicable("the two models have no router tensor in common");
  if (moved.empty()) return Outcome::pass(say::plural(routers, "router tensor is", "router tensors are") + " bit for bit the base's");
  std::vector<std::string> tensors;
  for (std::size_t i : moved) tensors.push_back(changes->tensor[i]);
  Finding finding;
  finding.message = "No gradient reaches the router in this run, and " + say::plural(static_cast<std::int64_t>(moved.size()), "router tensor differs", "router tensors differ") +
                    " from the base: " + say::some(tensors) + ". The largest relative change ||W1 - W0|| / ||W0|| is " + say::number(largest) + ".";
  finding.evidence = {say::evidence(f->router_trains),
                      {"elements changed", say::count(changes->changed[moved.front()]) + " of " + say::count(changes->elements[moved.front()]), pair::place_of(*changes, moved.front())}};
  finding.remedy =
      "Merge the adapter into the base it was trained on:\n"
      "    base = AutoModelForCausalLM.from_pretrained(\"BASE\", dtype=torch.bfloat16)\n"
      "    PeftModel.from_pretrained(base, \"ADAPTER\").merge_and_unload().save_pretrained(\"MERGED\")";
  finding.does_not_show = "Which checkpoint these routers come from.";
  for (std::size_t i : moved) {
    if (finding.locations.size() < 8) finding.locations.push_back(pair::place_of(*changes, i));
  }
  finding.sources = {"huggingface/peft src/peft/tuners/tuners_utils.py (merge_and_unload leaves modules without an adapter alone)"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_frozen_router_moved;
const Rule rule_frozen_router_moved = {
    .id = "BT001",
    .name = "frozen-router-moved",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The run does not train the router, and the router is not the base's.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
