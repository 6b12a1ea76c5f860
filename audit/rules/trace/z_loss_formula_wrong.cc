// TR012: z_loss is not the z-loss of these logits.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: z_loss is not the mean over tokens of the squared log-sum-exp of the recorded logits, averaged over
layers. What it is is named.

## Why it matters
On probabilities instead of logits it lies between 4.86 and 5.17 for 8 experts whatever the logits, and restrains nothing
(Megatron-LM, January 2024). Scaled by layers or ranks it weighs what nobody configured.

## How to fix
ST-MoE's form: mean over tokens of logsumexp(logits)^2 (arXiv 2202.08906 eq. 5).

## Limits
Warnings: a sum over layers (Z2), a convention of MegaBlocks; a log-sum-exp in bfloat16 (Z14), off by up to 2^-8; one
rank's number in the others' records (Z16), which misleads the reader and not the run.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "z_loss");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace reports no z-loss",
                                   "the reported z-loss is that of the recorded logits");
  const std::size_t row = rows.differ[0];
  Finding finding;
  const std::string& formula = t->formula[row];
  const bool mild = t->name[row].empty() || formula == "Z2" || formula == "Z14" || formula == "Z16";
  finding.severity = mild ? Severity::kWarning : Severity::kError;
  finding.message = "z_loss is " + say::number(t->recorded[row]) + ", and the logits give " +
                    say::number(t->expected[row]) + " (" + t->held_to[row] + "; " + replay::bands(t->distance[row]) +
                    " apart). " + replay::named(*t, row);
  finding.evidence = {replay::evidence(*t, row)};
  finding.remedy =
      "For each layer, then the mean over layers:\n    z_loss = torch.logsumexp(router_logits.float(), "
      "dim=-1).square().mean()";
  finding.does_not_show = "That the logits are large.";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"arXiv 2202.08906 eq. 5"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_z_loss_formula_wrong;
const Rule rule_z_loss_formula_wrong = {
    .id = "TR012",
    .name = "z-loss-formula-wrong",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The reported router z-loss is another formula than the mean of lse squared.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
