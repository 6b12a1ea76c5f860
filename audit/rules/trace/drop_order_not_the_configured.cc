// TR023: a full expert does not drop what the policy says.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with `dropped`: whether the drop policy that trace.json states (position, choices, probs,
batch_prioritised) drops exactly what was dropped. An order that does is named.

## Why it matters
By position the end of every batch loses its experts, whatever its text; by weights those that matter least do. The order
decides which tokens go without.

DeepSpeed's `probs` ranks logits and fills those of other tokens with 0 (0.18.9, issue 7986): a token whose logit is negative
is dropped while its expert has room.

## How to fix
Set the policy that is meant (Megatron-LM: --moe-token-drop-policy probs or position).

## Limits
Experts that dropped must have kept equally many, and a random order cannot be checked. probs needs routing weights or logits,
batch_prioritised logits.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;

  const replay::Rows rows = replay::rows_of(*t, "drop_order");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no drops", "the choices that were dropped are those of the policy, or none is stated");
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "In " + replay::layers_of(*t, rows.differ) + " the choices that were dropped are not those of " +
                    t->held_to[row] + ". " +
                    (t->name[row].empty() ? std::string("No order that moe-audit knows drops them.")
                                          : "They are " + t->name[row] + (t->also[row].empty() ? "" : ", or " + t->also[row]) + ".");
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  const bool by_logits = t->formula[row] == "X5";
  finding.remedy = by_logits ? "Rank by the gates, which are positive where a token chose the expert and 0 elsewhere:\n    "
                               "capacity_probs, capacity_indices = torch.topk(gates * mask, k=capacity, dim=0, sorted=False)"
                             : "Say the policy that is meant; Megatron-LM:\n    --moe-token-drop-policy probs";
  finding.does_not_show = "Which policy learns better.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"NVIDIA/Megatron-LM megatron/core/transformer/moe/moe_utils.py apply_router_token_dropping",
                     "GShard, arXiv 2006.16668 algorithm 1", "deepspeedai/DeepSpeed issue 7986"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_drop_order_not_the_configured;
const Rule rule_drop_order_not_the_configured = {
    .id = "TR023",
    .name = "drop-order-not-the-configured",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "Choices were dropped in another order than the configured policy.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
