// TR021: the router is noisy in an evaluation.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with an evaluation and hidden states: the logits of the evaluation forward, recomputed from the
router's input and weight, are off by noise.

## Why it matters
Jitter (Switch Transformer's is 1e-2 of the input) is a regulariser of training. Left on, the evaluation loss is that of another model and changes from run to run.
Megatron-LM's input jitter does not look at eval mode (megatron/core/transformer/moe/router.py apply_input_jitter).

## How to fix
Apply the noise only where `self.training` is true.

## Limits
As TR020's. The weights before and after the evaluation must be recorded, steps 0 and 1 for one between them.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;

  const replay::Rows rows = replay::rows_of(*t, "evaluation_logits");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no evaluation with hidden states",
                                   "the logits of the evaluation are those of the routers' inputs and weights");
  const std::size_t row = rows.differ[0];
  const bool noise = t->formula[row] == "W13" || t->formula[row] == "W14";
  Finding finding;
  finding.severity = noise && t->also[row].empty() ? Severity::kError : Severity::kWarning;
  finding.message = "In an evaluation the logits of " + replay::layers_of(*t, rows.differ) + " are not " + t->held_to[row] +
                    ": " + say::number(t->recorded[row]) + " where that gives " + say::number(t->expected[row]) + " (" +
                    replay::bands(t->distance[row]) + "). " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = "Apply the noise in training only:\n    if self.training and self.jitter_noise > 0:";
  finding.does_not_show = "How much the evaluation loss changes.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"NVIDIA/Megatron-LM megatron/core/transformer/moe/router.py apply_input_jitter"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_jitter_at_evaluation;
const Rule rule_jitter_at_evaluation = {
    .id = "TR021",
    .name = "jitter-at-evaluation",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The router adds noise while the model evaluates.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
