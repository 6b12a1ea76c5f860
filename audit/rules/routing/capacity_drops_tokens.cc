// RT005: the experts together take fewer tokens than a full sequence has.
#include <cmath>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
In families with a fixed capacity (Switch Transformers, NLLB-MoE), whether `num_experts` x `expert_capacity` places are enough
for the k choices of every token among which the places are counted: one sequence in Switch, one micro-batch in NLLB-MoE.

## Why it matters
A token beyond the capacity skips the experts of that layer. With too few places a part of every full sequence is dropped in
every MoE layer however evenly the router spreads it: 8 experts of capacity 64 take 512 tokens of a sequence of 1,024. Switch
Transformers was trained with capacity factors of 1 to 2 and typically dropped less than 1 % (arXiv 2101.03961 section 2.2).

## How to fix
Raise `expert_capacity` to at least k x tokens / num_experts, with a quarter on top for uneven routing.

## Limits
It counts sequences of the full length; padding is routed, too, and shorter ones may fit. Even a capacity factor above 1 drops
tokens where routing is uneven: that is for a recorded step to show. transformers 5.0 to 5.17 drops no token of Switch whatever the
capacity says (AV015).
)md";

Outcome check(Facts& f) {
  const std::int64_t* capacity = f.want(f->expert_capacity);
  if (!capacity) {
    const std::string* family = f.require(f->family);
    if (!family) return f.cannot_tell();
    if (*family != "unknown") return Outcome::not_applicable("this family has no fixed expert capacity");
    f.require(f->expert_capacity);
    return f.cannot_tell();
  }
  const std::string* group = f.require(f->capacity_group);
  const std::int64_t *experts = f.require(f->num_experts), *k = f.require(f->top_k);
  if (group && *group == "none") return Outcome::not_applicable("this release drops no token");
  const std::int64_t* length = f.require(f->sequence_length);
  const std::int64_t* sequences = group && *group == "micro-batch" ? f.require(f->micro_batch) : nullptr;
  if (f.missing()) return f.cannot_tell();
  const double places = static_cast<double>(*experts) * static_cast<double>(*capacity);
  const double tokens = static_cast<double>(*length) * static_cast<double>(sequences ? *sequences : 1);
  const double wanted = tokens * static_cast<double>(*k);
  if (wanted <= places) return Outcome::pass("capacity factor " + say::number(places / wanted) + " for full sequences");
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = say::count(*experts) + " experts of capacity " + say::count(*capacity) + say::at(f->expert_capacity.source()) + " take " +
                    say::count(static_cast<std::int64_t>(places)) + " of the " + say::count(static_cast<std::int64_t>(wanted)) +
                    " places that a full " + *group + " of " + say::count(static_cast<std::int64_t>(tokens)) +
                    " tokens needs: at least " + say::percent(1 - places / wanted) + " of its choices are dropped in every MoE layer.";
  finding.evidence = {say::evidence(f->expert_capacity), say::evidence(f->num_experts), say::evidence(f->top_k), say::evidence(f->sequence_length)};
  if (sequences) finding.evidence.push_back(say::evidence(f->micro_batch));
  const double enough = std::ceil(1.25 * wanted / static_cast<double>(*experts));
  finding.remedy = say::model_config(f, {{"expert_capacity", std::to_string(static_cast<std::int64_t>(enough))}});
  finding.does_not_show = "How long the sequences of this run are, or what uneven routing drops on top.";
  finding.locations = {location_of(f->expert_capacity.source())};
  finding.sources = say::sources({f->capacity_group.source().cite, "arXiv 2101.03961 section 2.2"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_capacity_drops_tokens;
const Rule rule_capacity_drops_tokens = {
    .id = "RT005",
    .name = "capacity-drops-tokens",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "The experts together take fewer tokens than a full sequence has.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
