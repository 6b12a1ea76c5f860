// TR004: padding counts in the balance loss.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with a token mask: aux_loss is what comes out if padding is counted (A16), or left out of the sums and
not of the number that divides them (A17), and not what the tokens alone give.

## Why it matters
Padding tokens are all alike and go to the same experts: the loss then balances padding. With 30 % padding on two
experts of eight those look overloaded by padding alone (huggingface/transformers issue 28505, Megatron-LM issue 1984).

## How to fix
Hand the attention mask to the balance loss.

## Limits
Needs micro-batches with padding.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "aux_loss");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace reports no balance loss",
                                   "the balance loss is that of the tokens without padding");
  const std::size_t row = rows.differ[0];
  if (t->formula[row] != "A16" && t->formula[row] != "A17")
    return Outcome::not_applicable("TR002 reports another formula");
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "Padding counts in the balance loss: aux_loss is " + say::number(t->recorded[row]) + ", and " +
                    say::number(t->expected[row]) + " without padding (" + replay::bands(t->distance[row]) + "). " +
                    replay::named(*t, row);
  finding.evidence = {replay::evidence(*t, row), {"trace packages", t->packages, replay::head(*t)}};
  finding.remedy =
      "Hand the mask to the model, which hands it to the balance loss:\n    model(input_ids=input_ids, "
      "attention_mask=attention_mask, labels=labels)";
  finding.does_not_show = "How much of the imbalance comes from padding.";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"huggingface/transformers issue 28505", "NVIDIA/Megatron-LM issue 1984"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_padding_in_balance_loss;
const Rule rule_padding_in_balance_loss = {
    .id = "TR004",
    .name = "padding-in-balance-loss",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Padding tokens count in the balance loss.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
