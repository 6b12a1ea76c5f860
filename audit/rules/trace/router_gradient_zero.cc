// TR009: a router that trains has a gradient of exactly zero.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the router's weight requires a gradient, and the gradient that the optimizer got is exactly 0 in every
element and every recorded step; or the cross-entropy's part of it is. That part is router_grad_ce, or what the gradient
of the logits holds beside the balance loss's (aux_loss_grad x d aux / d logits, by transformers' formula): nothing in any
element, up to the rounding of the balance loss's own part of that element.

## Why it matters
The router stays what it was while the experts move under it. Usual causes: k = 1 renormalised (weight 1 whatever the logits),
a detach between gate and weights, selection by a kernel without a backward.

## How to fix
Let the weights of the chosen experts carry the gradient; freeze the router openly if that is what is meant.

## Limits
Routers that the trace calls frozen are left out. PhiMoE's SparseMixer gives a token no gradient unless another expert lies within twice
router_jitter_noise (0.01) of one that it picks: its zeros cannot be judged. A gradient that underflowed in float16 is zero, too: look at the loss scale.
In the gradient of bfloat16 logits, a cross-entropy's part that is under 3 % of the balance loss's in every element is
not told from none.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  replay::Rows rows = replay::rows_of(*t, "router_grad");
  const replay::Rows ce = replay::rows_of(*t, "router_grad_ce");
  const auto always = [&](const std::vector<std::size_t>& all) {
    std::vector<std::size_t> out;
    for (const std::size_t i : all) {
      if (t->differing[i] == t->compared[i]) out.push_back(i);
    }
    return out;
  };
  const std::vector<std::size_t> zero = always(rows.differ), zero_ce = always(ce.differ);
  if (zero.empty() && zero_ce.empty()) {
    rows.agree.insert(rows.agree.end(), rows.differ.begin(), rows.differ.end());
    return replay::nothing_differs(f, rows, "the trace has no gradient of a trainable router",
                                   "every trainable router has a gradient");
  }
  const bool whole = !zero.empty();
  const std::vector<std::size_t>& found = whole ? zero : zero_ce;
  const bool by_difference = t->held_to[found[0]] == "a gradient beside the balance loss's";
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = std::string(whole ? "The gradient" : "The cross-entropy's part of the gradient") +
                    " of the router in " + replay::layers_of(*t, found) +
                    (by_difference ? " is 0, to rounding," : " is exactly 0") +
                    " in every recorded step, although it requires one" +
                    (whole ? "." : ": it learns from the balance loss alone.") +
                    (t->name[found[0]].empty() ? "" : " " + replay::named(*t, found[0]));
  for (const std::size_t i : found) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy =
      "If the router is meant to stay as it is, say so:\n    [p.requires_grad_(False) for n, p in "
      "model.named_parameters() if \".gate.\" in n]\n"
      "Else look for detach() between the gate and the weights, and for top-1 weights that are divided by themselves.";
  finding.does_not_show = "Why: the trace holds the gradient, not the graph.";
  finding.locations = {replay::where(*t, found[0])};
  finding.sources = {"NVIDIA/Megatron-LM issue 894", "jingyaogong/minimind issue 859"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_router_gradient_zero;
const Rule rule_router_gradient_zero = {
    .id = "TR009",
    .name = "router-gradient-zero",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "A trainable router has a gradient of exactly zero.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
