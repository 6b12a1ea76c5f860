#include "audit/measures/trace_replay.h"

#include <algorithm>
#include <optional>

#include "audit/measures/measure.h"
#include "audit/measures/replay/balance.h"
#include "audit/measures/replay/bias.h"
#include "audit/measures/replay/counts.h"
#include "audit/measures/replay/drops.h"
#include "audit/measures/replay/finite.h"
#include "audit/measures/replay/gradients.h"
#include "audit/measures/replay/loads.h"
#include "audit/measures/replay/logits.h"
#include "audit/measures/replay/losses.h"
#include "audit/measures/replay/routing.h"
#include "audit/measures/replay/weight_sums.h"
#include "audit/measures/replay_backend.h"
#include "audit/measures/router_inputs.h"

namespace moeaudit {

ReplayTable replay_trace(const Trace& trace, const ReplayOptions& options, std::vector<WeightProblem>* problems) {
  replay::Context ctx(trace, problems);
  ctx.backend = options.backend;
  replay::BalanceLosses balance(&ctx);
  replay::StepLosses losses(&ctx);
  replay::Logits logits(&ctx);
  replay::Drops drops(&ctx);
  replay::Biases bias(&ctx);
  replay::Gradients gradients(&ctx);
  const auto steps = static_cast<double>(trace.steps().size());
  std::size_t done = 0;
  for (const TraceStep& s : trace.steps()) {
    if (options.progress) options.progress("replay", static_cast<double>(done++) / steps);
    ctx.begin_step(s.step);
    std::vector<StepTensors> of_ranks, of_next;
    const auto keep = [](const StepTensors& of, auto* into) {
      for (const StepLayerTensors& l : of.layers) {
        if (l.router_weight) into->insert_or_assign({of.record->rank, l.layer}, *l.router_weight);
      }
    };
    const auto batches = trace.micro_batches_of(s);
    const bool evaluates = std::any_of(batches.begin(), batches.end(), [](const auto& m) { return !m.training.value_or(true); });
    if (const auto next = static_cast<std::size_t>(&s - trace.steps().data()) + 1; evaluates && next < trace.steps().size()) {
      std::vector<WeightProblem> told_later;  // when it is that step's turn
      for (const StepRecord& r : trace.ranks_of(trace.steps()[next])) {
        if (r.step != s.step + 1) continue;
        of_next.push_back(trace.open(r, &told_later));
        keep(of_next.back(), &ctx.weights_after);
      }
    }
    for (const StepRecord& r : trace.ranks_of(s)) {
      of_ranks.push_back(trace.open(r, problems));
      keep(of_ranks.back(), &ctx.weights);
      bias.read(of_ranks.back());
      gradients.read(of_ranks.back());
    }
    for (const MicroBatchRecord& m : batches) {
      const MicroBatch mb = trace.open(m, problems);
      const replay::Shared shared = ctx.shared_of(mb);
      // Layers side by side: what one does touches rows of its own layer alone. Sums over layers are in their order.
      replay::BalanceLosses::Sums sums(&balance, mb);
      std::vector<std::optional<replay::BalanceLosses::LayerSums>> of_layers(mb.layers.size());
      const std::size_t known = problems->size();
      parallel_for(options.threads, static_cast<std::int64_t>(mb.layers.size()), [&](std::int64_t i, int) {
        const LayerTensors& t = mb.layers[static_cast<std::size_t>(i)];
        if (t.saw_nothing()) {
          of_layers[static_cast<std::size_t>(i)] = sums.of_nothing();
          return;
        }
        ctx.count_loads(m, shared, t);
        replay::replay_loads(&ctx, m, t);
        logits.add(mb, t);
        replay::v::RoutedLayer l;
        const bool read = ctx.read_layer(m, shared, t, &l);
        replay::replay_finite(&ctx, m, t, read);
        drops.add(mb, shared, t, read ? &l : nullptr);
        if (!read) return;
        replay::replay_selection(&ctx, m, t, l);
        replay::replay_weight_sums(&ctx, m, t, l);
        of_layers[static_cast<std::size_t>(i)] = sums.of(l);
      });
      std::stable_sort(problems->begin() + static_cast<std::ptrdiff_t>(known), problems->end(),
                       [](const WeightProblem& a, const WeightProblem& b) { return a.offset < b.offset; });
      for (const auto& of_layer : of_layers) sums.add(of_layer);
      sums.finish();
      gradients.add(mb, shared);
      losses.add(mb);
      replay::replay_finite(&ctx, m);
    }
    gradients.step(of_ranks);
    for (const StepTensors& tensors : of_ranks) {
      bias.step(tensors);
      replay::replay_finite(&ctx, tensors);
      replay::replay_counter(&ctx, tensors);
    }
    losses.add(s);
  }
  logits.finish();
  drops.finish();
  bias.finish();
  gradients.finish();
  balance.name();
  losses.finish();
  return ctx.table();
}

namespace {
constexpr double kSecondsALogit = 1e-8;  // measured: docs/bench.md
}

double host_seconds(const Trace& trace) {
  double logits = 0;
  for (const TraceLayer& l : trace.facts().layers) logits += static_cast<double>(l.experts);
  double rows = 0;
  for (const MicroBatchRecord& m : trace.micro_batches()) rows += static_cast<double>(m.rows());
  return logits * rows * kSecondsALogit;
}

namespace {

void run(MeasureContext& ctx) {
  if (!ctx.trace) return ctx.facts.replay.explain_unknown("no trace was given, or it could not be opened");
  std::vector<WeightProblem> problems;
  ReplayOptions options;
  options.progress = ctx.progress;
  options.threads = ctx.threads;
  ReplayBackend backend(ctx, host_seconds(*ctx.trace) / std::max(ctx.threads, 1));
  options.backend = &backend;
  ReplayTable table = replay_trace(*ctx.trace, options, &problems);
  Source source;
  source.role = Role::kTrace;
  source.file = ctx.trace->facts().head;
  std::size_t compared = 0;
  for (const std::int64_t n : table.compared) compared += n > 0;
  ctx.records.push_back(
      {"trace_replay", backend.name_beside_host(kReplayedOnBackend),
       std::to_string(table.quantity.size()) + " quantities, " + std::to_string(compared) + " compared",
       backend.warning()});
  ctx.facts.replay.set(std::move(table), Origin::kMeasured, std::move(source));
}

constexpr std::string_view kSupplies[] = {"trace.replay"};

}  // namespace

extern const Measure measure_trace_replay;
const Measure measure_trace_replay = {.name = "trace_replay", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
