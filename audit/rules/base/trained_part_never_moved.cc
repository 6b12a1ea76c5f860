// BT007: the run trains routers or experts, and all of them are the base's.
#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
After a full fine-tune of at least one optimizer step, neither all routers nor all routed experts are bit for bit the
base's. An error if nothing at all moved.

## Why it matters
An optimizer step with a gradient moves a float32 parameter by about the learning rate under Adam, however small the
gradient. Weights that are bit for bit the base's were frozen, were not in the optimizer, or got no gradient; or they
are bfloat16 without float32 master weights, where an update below half a unit in the last place is lost: at |w| = 0.02
that is 6e-5, above every usual learning rate, so a pure bfloat16 run with lr 1e-5 moves only its smallest weights. A
model in which nothing moved is the base saved under another name.

## How to fix
See which parameters train, and whether the optimizer holds them in float32.

## Limits
It needs the base's weights, and trainer files or a config that say that the parts train; a script that freezes
parameters by hand is not seen. Top-1 routing with renormalised weights gives the router no gradient by construction:
that is RT002's finding.
)md";

struct PartChange {
  std::int64_t rows = 0, changed = 0, elements = 0;
  std::size_t first = 0;
};

Finding describe(Facts& f, const BaseChanges& c, const char* what, const PartChange& p, bool everything) {
  Finding finding;
  finding.severity = everything ? Severity::kError : Severity::kWarning;
  finding.message = everything ? "The run trains the whole model, and not one of " + say::count(p.elements) + " elements differs from the base."
                               : "The run trains the " + std::string(what) + ", and all " + say::count(p.elements) + " elements of them are bit for bit the base's while other parts moved.";
  finding.evidence = {{"elements changed", "0 of " + say::count(p.elements), pair::place_of(c, p.first)}, say::evidence(f->optimizer_steps)};
  finding.remedy =
      "See what trains and in which dtype the optimizer holds it:\n"
      "    print([(n, p.dtype) for n, p in model.named_parameters() if not p.requires_grad or p.dtype != torch.float32])\n"
      "and load float32 weights under mixed precision instead of pure bfloat16:\n"
      "    model = AutoModelForCausalLM.from_pretrained(\"BASE\", dtype=torch.float32)  # with TrainingArguments(bf16=True)";
  finding.does_not_show = "Which of freezing, optimizer, lost gradient and rounding it was.";
  finding.locations = {pair::place_of(c, p.first)};
  finding.sources = {"arXiv 1412.6980 section 2.1 (Adam's step is bounded by the learning rate)", "arXiv 1710.03740 section 3.1 (updates lost without float32 master weights)"};
  return finding;
}

Outcome check(Facts& f) {
  if (pair::no_pair(f)) return Outcome::not_applicable(pair::kNoPair);
  if (pair::trains_adapter(f)) return Outcome::not_applicable("the run trains an adapter: BT002 judges the merge");
  const std::int64_t* steps = f.want(f->optimizer_steps);
  if (steps && *steps < 1) return Outcome::not_applicable("no optimizer step yet");
  const bool* routers_train = f.require(f->router_trains);
  const bool* experts_train = f.require(f->experts_train);
  const BaseChanges* c = f.require(f->base_changes);
  f.require(f->optimizer_steps);
  if (f.missing()) return f.cannot_tell();
  PartChange router, experts, all;
  for (std::size_t i = 0; i < c->part.size(); ++i) {
    if (c->is_buffer[i]) continue;
    for (PartChange* p : {&all, c->part[i] == Part::kRouter ? &router : nullptr, c->part[i] == Part::kRoutedExpert ? &experts : nullptr}) {
      if (!p) continue;
      if (p->rows++ == 0) p->first = i;
      p->changed += c->changed[i];
      p->elements += c->elements[i];
    }
  }
  if (all.rows == 0) return Outcome::not_applicable("the two models have no tensor in common");
  if (!*routers_train && !*experts_train) return Outcome::not_applicable("the run trains neither routers nor experts");
  if (all.changed == 0) return Outcome::finding(describe(f, *c, "model", all, true));
  const std::int64_t* k = f.want(f->top_k);
  const bool* renormalised = f.want(f->renormalised);
  const bool no_gradient = k && *k == 1 && renormalised && *renormalised;  // RT002
  std::vector<Finding> findings;
  if (*routers_train && !no_gradient && router.rows > 0 && router.changed == 0) findings.push_back(describe(f, *c, "routers", router, false));
  if (*experts_train && experts.rows > 0 && experts.changed == 0) findings.push_back(describe(f, *c, "routed experts", experts, false));
  return Outcome::findings_or_pass(std::move(findings), say::count(all.changed) + " of " + say::count(all.elements) + " elements moved, routers and experts among them");
}

}  // namespace

extern const Rule rule_trained_part_never_moved;
const Rule rule_trained_part_never_moved = {
    .id = "BT007",
    .name = "trained-part-never-moved",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "The run trains routers or experts, and all of them are the base's.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
