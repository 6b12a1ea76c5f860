// TR008: routing weights are not those of the family.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: the weights of the chosen experts, recomputed from the recorded logits by the family's order (score,
renormalise, scale), differ from the recorded ones by more than the roundings of their dtypes.

## Why it matters
Experts are then mixed in other proportions than in pre-training: biased scores as gates shift every token's output
(huggingface/transformers issue 39581), a missing renormalisation scales the whole block, k = 1 renormalised has weight 1
and no gradient at all.

## How to fix
Compare the routing code with the family's; the named form says which step differs.

## Limits
Tokens whose choice agrees; families whose order moe-audit replays. PhiMoE in training: a weight must be one of the two that
SparseMixer can give; which of them it was to be is drawn, and not recorded. In bfloat16 or float16 a softmax in float32 that is
rounded once gives the same weights.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "weights");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no routing weights", "the routing weights are the family's");
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "Routing weights of " + replay::layers_of(*t, rows.differ) + " are not those of " + t->model_type +
                    ": " + say::number(t->recorded[row]) + " where the logits give " + say::number(t->expected[row]) +
                    " (" + replay::bands(t->distance[row]) + "). " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = "Compare the routing code with that of " + t->model_type +
                   ", then record again and look at the layers:\n    moe-audit replay -v " + t->path;
  finding.does_not_show = "How much the outputs change.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"huggingface/transformers issue 39581"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_weights_not_the_familys;
const Rule rule_weights_not_the_familys = {
    .id = "TR008",
    .name = "weights-not-the-familys",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Routing weights are not those that the family makes of these logits.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
