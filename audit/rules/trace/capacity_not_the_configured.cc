// TR022: experts take more or fewer tokens than the capacity says.
#include <algorithm>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace with `dropped`: how many choices an expert kept before it dropped, against the capacity that
capacity_factor gives in the framework's form (Megatron-LM, DeepSpeed, MegaBlocks, OLMo-core, Tutel, FastMoE). Another form
that gives exactly what was kept is named: without k, not over the experts, from the tokens of all ranks, without padding,
or another framework's.

## Why it matters
A capacity without k drops about (k - 1)/k of a balanced batch at factor 1; one that is not over the experts never drops
and pads every expert to the whole batch.

## How to fix
Compute the capacity as the framework documents it.

## Limits
Needs training.capacity_factor in trace.json, and a form that has a meaning for it: 0 and what is below are Tutel's (no drops,
or at most a capacity), 0 is MegaBlocks' as well. Tutel's alignment is training.capacity_alignment, 1 where it is not stated. Where
no framework is stated, any framework's form is right.
)md";

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;

  const replay::Rows rows = replay::rows_of(*t, "capacity");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace has no drops", "what was kept is what the capacity allows");
  const std::size_t row = rows.differ[0];
  Finding finding;
  finding.severity = t->formula[row].empty() ? Severity::kWarning : Severity::kError;
  finding.message = "Experts of " + replay::layers_of(*t, rows.differ) + " kept up to " + say::number(t->recorded[row]) +
                    " choices where " + t->held_to[row] + " gives " + say::number(t->expected[row]) + ". " +
                    replay::named(*t, row);
  const TraceLoads* loads = f.want(f->trace_loads);
  if (loads && !loads->dropped.empty()) {
    double most = 0;
    for (const double share : loads->dropped) most = std::max(most, share);
    finding.message += " Up to " + say::percent(most) + " of a layer's choices were dropped.";
  }
  for (const std::size_t i : rows.differ) finding.evidence.push_back(replay::evidence(*t, i));
  const bool by_counts = t->held_to[row].find("largest count") != std::string::npos;  // Tutel's and MegaBlocks' factors up to 0
  finding.remedy = by_counts ? "Compute the capacity as configured (counts of the choices before any is dropped):\n"
                               "    most = int(torch.bincount(chosen.flatten(), minlength=E).max())\n"
                               "    capacity = most if capacity_factor == 0 else min(most, k * int(-capacity_factor * math.ceil(T / E)))"
                             : "Compute the capacity as configured (T tokens of the rank, k choices, E experts):\n"
                               "    capacity = math.ceil(T * k / E * capacity_factor)";
  finding.does_not_show = "What the dropped tokens cost.";
  finding.locations = {replay::where(*t, row)};
  finding.sources = {"NVIDIA/Megatron-LM megatron/core/transformer/moe/moe_utils.py get_capacity",
                     "microsoft/DeepSpeed deepspeed/moe/sharded_moe.py _capacity"};
  if (by_counts) finding.sources = {"microsoft/Tutel tutel/impls/fast_dispatch.py extract_critical", "databricks/megablocks megablocks/layers/moe.py forward_once"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_capacity_not_the_configured;
const Rule rule_capacity_not_the_configured = {
    .id = "TR022",
    .name = "capacity-not-the-configured",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "Choices were dropped at another capacity than the settings give.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
