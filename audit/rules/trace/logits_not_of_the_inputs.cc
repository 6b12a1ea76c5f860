// TR020: recorded logits are not those of the router's input and weight.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with hidden states: the logits of each router in training, recomputed from its input and weight in the
dtype that the framework takes the product in. What differs by more than the roundings is named: computed in a narrower
dtype; noise on the input (multiplicative) or on the logits (additive, Gumbel), with its size. A configured
router_jitter_noise of that size is no finding.

## Why it matters
Noise that nobody asked for changes which experts run. A router in bfloat16 under a class that documents float32 decides near
ties by rounding. On a recomputed forward both choose again.

## How to fix
Set the noise to 0, or take the router out of autocast.

## Limits
Families of the table whose router has no bias and no adapter. A jitter that the block applies before it calls the router
(Mixtral, MiniMax-M2, PhiMoE in transformers) is in the recorded input and does not show. Sums are taken to run in blocks of
128, so noise below about 1e-3 is within the band at a width of 4096 in float32. Noise and another weight than the recorded
one look alike; both are given.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;

  const replay::Rows rows = replay::rows_of(*t, "logits");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no hidden states beside the logits",
                                   "the logits are those of the routers' inputs and weights");
  const std::size_t row = rows.differ[0];
  const bool narrow = t->formula[row] == "W12";
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "Logits of " + replay::layers_of(*t, rows.differ) + " are not " + t->held_to[row] + ": " +
                    say::number(t->recorded[row]) + " where that gives " + say::number(t->expected[row]) + " (" +
                    replay::bands(t->distance[row]) + "). " + replay::named(*t, row);
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  finding.remedy = narrow ? "Compute the router in float32, outside autocast:\n    with torch.autocast(x.device.type, enabled=False): "
                            "logits = torch.nn.functional.linear(x.float(), weight.float())"
                          : "Take the noise out, or configure it:\n    model.config.router_jitter_noise = 0.0";
  finding.does_not_show = "How many tokens went to other experts for it.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"Switch Transformer, arXiv 2101.03961 section 2.4 (selective precision, input jitter)"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_logits_not_of_the_inputs;
const Rule rule_logits_not_of_the_inputs = {
    .id = "TR020",
    .name = "logits-not-of-the-inputs",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "Router logits are not the product of the recorded inputs and weight.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
