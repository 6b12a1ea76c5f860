// What the experts got in a recorded trace, by layer, and what of its tensor files is not sound.
#include <algorithm>
#include <cmath>
#include <limits>

#include "audit/facts/fact_sheet.h"
#include "audit/families/family.h"
#include "audit/measures/expert_health.h"
#include "audit/measures/measure.h"
#include "audit/measures/replay/routing.h"
#include "audit/measures/replay_backend.h"

namespace moeaudit {
namespace {

constexpr std::string_view kSupplies[] = {"trace.loads", "trace.problems"};

double value(const LayerHealth& layer, std::string_view name) {
  const HealthMetric* m = layer.find(name);
  return m ? m->value : HealthMetric::kNone;
}

std::string idle_of(const LayerHealth& l) {
  std::vector<std::int64_t> idle;
  for (std::size_t e = 0; e < l.load.size(); ++e) {
    if (l.load[e] == 0) idle.push_back(static_cast<std::int64_t>(e));
  }
  return to_text(idle);
}

void append(const LayerHealth& l, TraceLoads* t) {
  const HealthMetric none;
  const HealthMetric* vio = l.find("max_violation_pooled");
  if (!vio) vio = &none;
  const HealthMetric *cold = l.find("cold_experts"), *dead = l.find("dead_experts");
  t->layer.push_back(l.layer);
  t->module.push_back(l.module);
  t->experts.push_back(l.experts);
  t->top_k.push_back(l.top_k);
  t->tokens.push_back(l.tokens);
  t->fair_share.push_back(static_cast<double>(l.choices) / static_cast<double>(l.experts));
  t->max_violation.push_back(vio->value);
  t->max_violation_floor.push_back(vio->floor);
  t->low.push_back(vio->low);
  t->high.push_back(vio->high);
  t->normalised_entropy.push_back(value(l, "normalised_entropy"));
  t->idle.push_back(static_cast<std::int64_t>(value(l, "idle_experts")));
  t->idle_experts.push_back(idle_of(l));
  t->below_tenth.push_back(static_cast<std::int64_t>(value(l, "cold_experts")));
  t->can_judge.push_back(cold && cold->cannot_tell.empty());
  t->idle_is_dead.push_back(dead && dead->cannot_tell.empty());
  t->off_the_top_k.push_back(value(l, "choices_off_the_top_k"));
  t->near_ties_bf16.push_back(value(l, "near_ties_in_bf16"));
  t->non_finite.push_back(value(l, "tokens_with_non_finite_logits"));
  t->recompute_changed.push_back(value(l, "recompute_changed"));
  t->dropped.push_back(value(l, "dropped_choices"));
  t->busiest_rank.push_back(HealthMetric::kNone);
}

/// Why loads cannot be judged where a router has rows beyond one an expert: a choice that runs no expert may stay untaken. Empty
/// if the trace counts the experts alone.
std::string counts_more_than_experts(const TraceFacts& t) {
  const Family* family = t.model_type.empty() ? nullptr : find_family_by_model_type(t.model_type);
  const auto row = [&](std::string_view fact) -> const FamilyKey* {
    if (!family) return nullptr;
    const auto at = std::find_if(family->keys.begin(), family->keys.end(), [&](const FamilyKey& k) { return k.fact == fact; });
    return at == family->keys.end() ? nullptr : &*at;
  };
  const FamilyKey* experts = row("router.num_experts");
  if (!experts || !row("router.extra_rows")) return {};
  std::optional<std::int64_t> stated;
  for (std::string_view key : experts->keys) {
    const Node* v = replay::config_value(t, key);
    if (v && !stated) stated = v->as_int();
  }
  const bool alone = stated && std::all_of(t.layers.begin(), t.layers.end(), [&](const TraceLayer& l) { return l.experts == *stated; });
  return alone ? "" : "the router of " + t.model_type + " has rows beyond one an expert, and the trace may count them as experts";
}

void run(MeasureContext& ctx) {
  FactSheet& f = ctx.facts;
  if (ctx.trace == nullptr) {
    f.trace_loads.explain_unknown("no trace was given");
    f.trace_problems.explain_unknown("no trace was given");
    return;
  }
  HealthOptions options;
  options.threads = ctx.threads;
  ReplayBackend backend(ctx, health_seconds(*ctx.trace) / std::max(ctx.threads, 1));
  options.backend = &backend;
  if (ctx.trace->facts().expert_parallel.value_or(1) > 1) options.placement.ranks = *ctx.trace->facts().expert_parallel;
  options.progress = ctx.progress;
  HealthReport report = measure_health(*ctx.trace, options);
  TraceLoads loads;
  // Where a table gives the experts, no router and no loss can do anything about the load.
  for (const LayerHealth& l : report.layers) {
    if (!replay::chosen_by_table(ctx.trace->facts(), l.layer)) append(l, &loads);
  }
  for (const PlacementLayer& p : report.placement.layers) {
    const auto at = std::find(loads.layer.begin(), loads.layer.end(), p.layer);
    if (at != loads.layer.end()) loads.busiest_rank[static_cast<std::size_t>(at - loads.layer.begin())] = p.max_over_mean;
  }
  loads.straggler_factor = report.placement.straggler_factor;
  Source source;
  source.role = Role::kTrace;
  source.file = ctx.trace->facts().head;
  if (const std::string why = counts_more_than_experts(ctx.trace->facts()); !why.empty())
    f.trace_loads.explain_unknown(why);
  else if (loads.layer.empty())
    f.trace_loads.explain_unknown("the trace holds neither choices nor counts, nor logits with a known k");
  else
    f.trace_loads.set(std::move(loads), Origin::kMeasured, source);
  f.trace_problems.set(std::move(report.weight_problems), Origin::kMeasured, source);
  ctx.records.push_back(
      {"trace_loads", backend.name_beside_host(kMeasuredOnBackend),
       std::to_string(report.micro_batches) + " micro-batches of " + std::to_string(report.steps) + " steps",
       backend.warning()});
}

}  // namespace

extern const Measure measure_trace_loads;
const Measure measure_trace_loads = {.name = "trace_loads", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
