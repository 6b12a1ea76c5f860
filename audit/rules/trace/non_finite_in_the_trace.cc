// TR034: what was recorded is not a number.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: router logits with a NaN or +inf (or without a finite one) in a token, a loss or a gradient norm that is not
finite, NaN or infinity in the gradient of a router or of an expert.

## Why it matters
A top-k of NaN is arbitrary, and a NaN gradient is written into every weight by the next update: what follows is lost. The
Trainer's log need not show it (logging_nan_inf_filter): of a recorded run at learning rate 1e20 (transformers 4.57.6), whose second
step has NaN logits in 32 of 32 tokens and a NaN loss, it says loss 0.0. Layers with such logits are left out of the other checks, which
would otherwise pass in silence.

## How to fix
Go back to a checkpoint before that step and change one thing: learning rate, clipping, or the precision of the router.

## Limits
-inf beside finite logits masks an expert and is sound. Gradients and their norm are not judged under float16's loss scaler,
which skips such a step and lowers its scale.
)md";

struct Quantity {
  const char *name, *what, *of;
};
constexpr Quantity kQuantities[] = {{"finite_logits", "the router logits", "tokens"},
                                    {"finite_losses", "the recorded losses", "numbers"},
                                    {"finite_gradients", "the gradients of routers and experts", "elements"}};

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  Finding finding;
  std::string bad;
  bool any = false;
  std::size_t first = t->quantity.size();
  for (const Quantity& q : kQuantities) {
    const replay::Rows rows = replay::rows_of(*t, q.name);
    any = any || rows.any();
    if (rows.differ.empty()) continue;
    std::int64_t n = 0, of = 0;
    for (const std::size_t i : rows.differ) {
      n += t->differing[i], of += t->compared[i];
      if (first == t->quantity.size() || t->step[i] < t->step[first]) first = i;
      finding.evidence.push_back({"trace " + t->quantity[i] + (t->layer[i] >= 0 ? " of layer " + std::to_string(t->layer[i]) : ""),
                                  say::count(t->differing[i]) + " of " + say::count(t->compared[i]) + " not " + t->held_to[i],
                                  replay::where(*t, i)});
    }
    bad += (bad.empty() ? "" : ", ") + std::string(q.what) + (t->layer[rows.differ[0]] >= 0 ? " of " + replay::layers_of(*t, rows.differ) : "") +
                  " (" + say::count(n) + " of " + say::count(of) + " " + q.of + ")";
  }
  if (!any) return Outcome::not_applicable("the trace has no logits, losses or gradients");
  if (bad.empty()) return Outcome::pass("logits, losses and gradients are finite");
  const std::string step = std::to_string(t->step[first]);
  finding.severity = Severity::kError;
  finding.message = "NaN or infinity in " + bad + "; first in step " + step + ".";
  finding.remedy = "Stop" + (step == "0" ? ". " : ", and resume from a checkpoint before step " + step + ". ") +
                   say::training(f, {{"learning_rate", "1.0e-05"}, {"max_grad_norm", "1.0"}});
  finding.does_not_show = "What made it non-finite: data, precision, learning rate or a kernel.";
  finding.locations = {replay::where(*t, first)};
  finding.sources = {"huggingface/transformers src/transformers/trainer.py (logging_nan_inf_filter)"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_non_finite_in_the_trace;
const Rule rule_non_finite_in_the_trace = {
    .id = "TR034",
    .name = "non-finite-in-the-trace",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Router logits, losses or gradients of the trace are NaN or infinite.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
