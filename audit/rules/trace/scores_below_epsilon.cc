// TR031: scores are so small that the epsilon beside their sum takes weight from the experts.
#include <algorithm>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace of a router without softmax: routing weights that are divided by their sum add up to less than the
scaling factor. The epsilon that explains it, sum = scores / (scores + epsilon), is computed from the scores.

## Why it matters
Weights are scores / (sum of scores + 1e-20) (DeepSeek-V3's order). A sigmoid of -46 is 1e-20: tokens whose logits have all
drifted that low get a fraction of their experts' output, and the balance loss, divided by the same sum, fades with them
(NVIDIA/Megatron-LM issue 1545). An epsilon of 1e-6 (LFM2) does it at -14, and counts from a loss of 1e-3 on.

## How to fix
Normalise in the log domain, where no epsilon is needed: the same numbers, and the weights sum to 1.

## Limits
Tokens that are not padding; weights that are not the family's are TR008's. An error from 1 % on, else a warning.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "weight_sum");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "no router of the trace divides scores other than softmax by their sum",
                                   "the routing weights of every token add up");
  if (!replay::rows_of(*t, "weights").differ.empty())
    return Outcome::not_applicable("TR008 reports that the weights are not the family's");
  const std::size_t row = rows.differ[0];
  std::int64_t tokens = 0, all = 0;
  double least = 1;
  for (const std::size_t i : rows.differ)
    tokens += t->differing[i], all += t->compared[i], least = std::min(least, t->recorded[i]);
  Finding finding;
  finding.severity = least < 0.99 ? Severity::kError : Severity::kWarning;
  finding.message = "Routing weights of " + say::count(tokens) + " of " + say::count(all) + " tokens in " +
                    replay::layers_of(*t, rows.differ) + " do not add up: to " + say::number(least) +
                    " instead of 1 at the least. " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy =
      "Normalise in the log domain:\n    weights = "
      "torch.softmax(torch.nn.functional.logsigmoid(logits.float()).gather(-1, "
      "chosen), dim=-1)";
  finding.does_not_show = "Why the logits are that low: look at the z-loss and the router's weight decay.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"NVIDIA/Megatron-LM issue 1545"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_scores_below_epsilon;
const Rule rule_scores_below_epsilon = {
    .id = "TR031",
    .name = "scores-below-epsilon",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Routing weights do not sum to 1: the epsilon beside their sum is as large as the scores.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
