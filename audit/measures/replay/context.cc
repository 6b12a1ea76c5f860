#include "audit/measures/replay/context.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "audit/measures/replay/logits.h"
#include "audit/measures/replay/routing.h"
#include "audit/measures/router_replay.h"
#include "kernels/host/bounds.h"

namespace moeaudit::replay {
namespace {

constexpr std::int64_t kMostLogits = 1 << 28;  // of one layer of one micro-batch: 2 GiB

}  // namespace

Float float_of(DType d) {
  return d == DType::kF32    ? Float::kF32
         : d == DType::kBF16 ? Float::kBF16
         : d == DType::kF16  ? Float::kF16
                             : Float::kF64;
}
double unit(Float f) { return k::unit_roundoff(f); }

double reduction(double n) {
  return k::bounds::gamma(std::min(n, 128.0 + std::log2(std::max(n, 2.0))) + 4.0, unit(Float::kF32));
}

bool Row::add(double got, double want, double by, const Place& where) {
  ++compared;
  double d = got == want ? 0.0 : std::fabs(got - want) / by;
  if (std::isnan(d)) d = std::isnan(got) && std::isnan(want) ? 0.0 : kInf;
  if (compared == 1 || d > distance) {
    recorded = got, expected = want, band = by, distance = d;
    place = where;
  }
  differing += d > 1 ? 1 : 0;
  return d > 1;
}

void Row::observe(double got, double want, double relative, const Place& where) {
  add(got, want, relative * std::max(std::fabs(got), std::fabs(want)), where);
  all_recorded.push_back(got);
  all_expected.push_back(want);
  all_band.push_back(relative);
}

namespace {

void append(ReplayTable* t, Row r) {
  t->quantity.push_back(r.quantity);
  t->layer.push_back(r.layer);
  t->compared.push_back(r.compared);
  t->differing.push_back(r.differing);
  t->recorded.push_back(r.recorded);
  t->expected.push_back(r.expected);
  t->band.push_back(r.band);
  t->distance.push_back(r.distance);
  t->step.push_back(r.place.step);
  t->micro_batch.push_back(r.place.micro_batch);
  t->rank.push_back(r.place.rank);
  t->held_to.push_back(r.held_to);
  t->formula.push_back(r.name.found ? r.name.id : "");
  t->name.push_back(r.name.found ? r.name.name : "");
  t->factor.push_back(r.name.found ? r.name.factor : "");
  t->factor_value.push_back(r.name.found ? r.name.factor_value : 1);
  t->fit.push_back(r.name.found ? r.name.fit : 0);
  t->also.push_back(r.name.also);
  t->runner_up.push_back(r.name.runner_up);
  t->runner_up_fit.push_back(r.name.runner_up_fit);
  t->missing.push_back(r.compared > 0 ? "" : r.missing);
  t->file.push_back(r.place.file);
  t->line.push_back(r.place.line);
}

}  // namespace

Context::Context(const Trace& trace, std::vector<WeightProblem>* problems)
    : trace(trace), facts(trace.facts()), problems(problems) {
  folder_ = facts.path;
  while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  routing = routing_of(trace, &why_not_routed);
  const Family* family = facts.model_type.empty() ? nullptr : find_family_by_model_type(facts.model_type);
  const bool transformers = std::any_of(facts.packages.begin(), facts.packages.end(),
                                        [](const auto& p) { return p.first == "transformers"; });
  if (family) may_be_zero = std::string(family->not_replayed);
  if (family && family->routing.sparse_mixer)
    may_be_zero = "SparseMixer gives a token no gradient where no expert lies close enough to the one it picks";
  masks_with_zero = family && family->routing.group_mask_is_zero;
  // Its classes share load_balancing_loss_func; what they hand to it is known of the families of the table.
  if (transformers && (!family || family->balance == Balance::kAuxLoss)) balance = v::BalanceFamily::kTransformers;
  balance_known = transformers && family && family->balance == Balance::kAuxLoss;
  if (balance_known) counted_twice = family->aux_counted_twice;
  ranks_.insert(0);
  for (const MicroBatchRecord& m : trace.micro_batches()) ranks_.insert(m.rank);
  for (const TraceStep& s : trace.steps()) {
    std::map<std::int64_t, std::int64_t> of_rank;
    for (const MicroBatchRecord& m : trace.micro_batches_of(s)) {
      if (trains(m)) accumulation = std::max(accumulation, ++of_rank[m.rank]);
    }
  }
}

Place Context::place_of(const MicroBatchRecord& m) const {
  return {m.step, m.micro_batch, m.rank, records_file(m.rank), m.line};
}

Place Context::place_of(const StepRecord& s) const { return {s.step, -1, s.rank, records_file(s.rank), s.line}; }

std::string Context::records_file(std::int64_t rank) const {
  if (facts.format != "moe-audit-trace") return facts.path;
  return folder_ + (rank == 0 ? "/records.jsonl" : "/records_rank" + std::to_string(rank) + ".jsonl");
}

namespace {

/// Place of a quantity in the report.
int order_of(std::string_view quantity) {
  static constexpr std::string_view kOrder[] = {"finite_logits",
                                                "finite_losses",
                                                "finite_gradients",
                                                "logits",
                                                "evaluation_logits",
                                                "selection",
                                                "group_limit",
                                                "weights",
                                                "weight_sum",
                                                "recomputed_selection",
                                                "loads",
                                                "expert_counter",
                                                "capacity",
                                                "drop_order",
                                                "aux_loss",
                                                "z_loss",
                                                "aux_in_loss",
                                                "aux_weight",
                                                "loss_weight",
                                                "router_grad",
                                                "router_grad_ce",
                                                "router_grad_aux",
                                                "bias_step",
                                                "bias_kept"};
  return static_cast<int>(std::find(std::begin(kOrder), std::end(kOrder), quantity) - std::begin(kOrder));
}

}  // namespace

Row& Context::row(std::string_view quantity, int layer) {
  const std::scoped_lock lock(mutex_);
  Row& r = rows_[{order_of(quantity), layer}];
  if (r.quantity.empty()) r.quantity = quantity, r.layer = layer;
  return r;
}

Row* Context::find(std::string_view quantity) {
  const auto it = rows_.find({order_of(quantity), -1});
  return it == rows_.end() ? nullptr : &it->second;
}

std::vector<Row*> Context::layers_of(std::string_view quantity) {
  std::vector<Row*> out;
  for (auto& [key, row] : rows_) {
    if (row.quantity == quantity) out.push_back(&row);
  }
  return out;
}

void add(const Loads& more, Loads* sum) {
  const auto each = [](const std::vector<std::int64_t>& from, std::vector<std::int64_t>* to) {
    to->resize(std::max(to->size(), from.size()));
    for (std::size_t e = 0; e < from.size(); ++e) (*to)[e] += from[e];
  };
  each(more.valid, &sum->valid);
  each(more.all, &sum->all);
  each(more.kept, &sum->kept);
  sum->tokens += more.tokens;
}

void Context::begin_step(std::int64_t number) {
  step = number;
  for (const auto& [layer, of_layer] : loads) {
    for (const auto& [at, x] : of_layer) add(x, &earlier[layer][{0, at.second}]);
  }
  biases.clear();
  loads.clear();
  evaluation_before = std::move(evaluation);
  evaluation.clear();
  weights.clear();
  weights_after.clear();
}

void Context::fault(const MicroBatchRecord& m, const TensorView& view, const char* what) {
  const std::string file = m.file.empty() || facts.format != "moe-audit-trace" ? facts.path : folder_ + "/" + m.file;
  const std::scoped_lock lock(mutex_);
  for (const WeightProblem& p : *problems) {  // a layer is read again when a formula is looked for
    if (p.file == file && p.offset == view.offset && p.tensor == view.name && p.what == what) return;
  }
  problems->push_back({file, view.offset, std::string(view.name), what});
}

ReplayTable Context::table() {
  ReplayTable t;
  t.path = folder_;
  t.framework = facts.framework;
  t.trainer = facts.trainer.empty() ? facts.arguments_class : facts.trainer;
  t.model_type = facts.model_type;
  t.model_class = facts.model_class;
  for (const auto& [package, version] : facts.packages)
    t.packages += (t.packages.empty() ? "" : ", ") + package + " " + version;
  t.output_router_logits = !facts.output_router_logits ? "" : *facts.output_router_logits ? "true" : "false";
  t.aux_coefficient = facts.aux_coefficient.value_or(kNan);
  t.steps = static_cast<std::int64_t>(trace.steps().size());
  t.micro_batches = static_cast<std::int64_t>(trace.micro_batches().size());
  t.ranks = static_cast<std::int64_t>(ranks_.size());
  t.accumulation = accumulation;
  for (auto& [key, row] : rows_) append(&t, std::move(row));
  rows_.clear();
  return t;
}

bool Context::read_layer(const MicroBatchRecord& m, const Shared& shared, const LayerTensors& t, v::RoutedLayer* l) {
  const std::int64_t rows = t.rows(m);
  l->tokens = rows;
  l->experts = t.experts;
  const TraceLayer* stated = facts.layer(t.layer);
  l->top_k = t.top_k > 0 ? t.top_k : stated ? stated->top_k : 0;
  if (stated && !counted_twice.empty() && stated->module.find("." + std::string(counted_twice) + ".") != std::string::npos) l->times = 2;
  if (balance_known && chosen_by_table(facts, t.layer)) l->times = 0;  // deepseek_v4 hands the loss the logits of the other routers
  l->backend = backend;
  Shared seen = seen_of(shared, t);
  l->sequences = seen.sequences;
  l->valid = std::move(seen.valid);
  if ((!t.router_logits && !t.hidden_states) || rows < 1 || l->experts < 1 || l->top_k < 1 || l->top_k > l->experts)
    return false;
  if (rows > kMostLogits / l->experts)
    return fault(m, t.router_logits ? *t.router_logits : *t.hidden_states,
                 "more than 2^28 logits in one micro-batch are not replayed"),
           false;
  if (!t.router_logits) {
    Recomputed c;
    std::string why;
    if (!trains(m) || !recompute_logits(this, m, t, false, &c, &why)) return false;
    l->dtype = c.stated;
    l->logits = std::move(c.logits);
    l->logit_error = *std::max_element(c.band.begin(), c.band.end());
  } else {
    l->dtype = float_of(t.router_logits->dtype);
    l->logits.resize(static_cast<std::size_t>(rows * l->experts));
    if (!read_values(*t.router_logits, 0, rows * l->experts, l->logits.data()))
      return fault(m, *t.router_logits, "could not be read"), false;
  }
  // Under autocast softmax runs in float32 and is not rounded.
  l->scores_dtype = facts.mixed_precision == "bf16" || facts.mixed_precision == "fp16" ? Float::kF32 : l->dtype;
  if (routing) l->score = route_args<double>(*routing, 1, 1).score;
  if (routing && routing->logit_softcap > 0) {  // a trace holds the product of the gate; scores and losses see it capped
    l->softcap = routing->logit_softcap;
    for (double& logit : l->logits) logit = k::softcapped(logit, l->softcap, Float::kF64);
    l->logit_error += k::bounds::softcapped(l->softcap, Float::kF32);  // a cap brings nothing apart
  }
  if (!l->prepare()) return false;
  if (t.selected_experts) {
    l->chosen.resize(static_cast<std::size_t>(rows * l->top_k));
    if (!read_ids(*t.selected_experts, 0, rows * l->top_k, l->chosen.data()))
      return fault(m, *t.selected_experts, "could not be read"), false;
    for (std::int32_t& id : l->chosen) {
      if (id < l->experts) continue;
      fault(m, *t.selected_experts, "holds an id that is no expert");
      id = kNoSuchExpert;
    }
  }
  if (t.dropped && t.selected_experts) {
    l->dropped.resize(l->chosen.size());
    if (!read_flags(*t.dropped, 0, rows * l->top_k, l->dropped.data()))
      return fault(m, *t.dropped, "could not be read"), false;
  }
  const auto bias = biases.find({m.rank, t.layer});
  if (bias != biases.end() && static_cast<std::int64_t>(bias->second.size()) == l->experts) l->bias = bias->second;
  return true;
}

Shared Context::shared_of(const MicroBatch& mb) const {
  Shared s;
  const MicroBatchRecord& m = *mb.record;
  if (m.sequences > 0 && !m.sampled_tokens) s.sequences = m.sequences;
  if (mb.token_mask) {
    s.valid.resize(static_cast<std::size_t>(m.rows()));
    if (!read_flags(*mb.token_mask, 0, m.rows(), s.valid.data())) s.valid.clear();
  }
  return s;
}

Shared Context::seen_of(const Shared& all, const LayerTensors& t) {
  if (!t.seen) return all;
  Shared s;
  std::vector<std::int32_t> rows(static_cast<std::size_t>(all.valid.empty() ? 0 : t.seen->elements()));
  if (rows.empty() || !read_ids(*t.seen, 0, t.seen->elements(), rows.data())) return s;
  for (const std::int32_t row : rows) s.valid.push_back(all.valid[static_cast<std::size_t>(row)]);
  return s;
}

void Context::count_loads(const MicroBatchRecord& m, const Shared& of_all, const LayerTensors& t) {
  if (t.experts < 1 || t.saw_nothing()) return;
  const Shared shared = seen_of(of_all, t);
  const std::int64_t rows = t.rows(m);
  Loads counted;
  const auto e = static_cast<std::size_t>(t.experts);
  if (t.selected_experts && t.top_k > 0 && !m.sampled_tokens) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(rows * t.top_k));
    if (!read_ids(*t.selected_experts, 0, rows * t.top_k, ids.data())) return;
    std::vector<std::uint8_t> dropped(ids.size());
    if (t.dropped && !read_flags(*t.dropped, 0, rows * t.top_k, dropped.data())) return;
    counted.valid.resize(e), counted.all.resize(e), counted.kept.resize(e);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= t.experts) continue;
      const bool valid = shared.valid.empty() || shared.valid[i / static_cast<std::size_t>(t.top_k)];
      const auto id = static_cast<std::size_t>(ids[i]);
      ++counted.all[id];
      counted.valid[id] += valid;
      counted.kept[id] += valid && !dropped[i];
    }
    counted.tokens =
        shared.valid.empty() ? rows : std::accumulate(shared.valid.begin(), shared.valid.end(), std::int64_t{0});
  } else if (t.tokens_per_expert) {
    counted.all.resize(e);
    if (!read_counts(*t.tokens_per_expert, 0, t.experts, counted.all.data())) return;
    counted.valid = counted.kept = counted.all;
    counted.tokens = t.seen && !m.sampled_tokens ? rows : m.tokens;
  } else {
    return;
  }
  const std::scoped_lock lock(mutex_);
  (trains(m) ? loads : evaluation)[t.layer][{m.micro_batch, m.rank}] = std::move(counted);
}

const Loads* Context::loads_of(const MicroBatchRecord& m, int layer) {
  const std::scoped_lock lock(mutex_);
  const auto of_layer = loads.find(layer);
  if (of_layer == loads.end()) return nullptr;
  const auto it = of_layer->second.find({m.micro_batch, m.rank});
  return it == of_layer->second.end() ? nullptr : &it->second;
}

const TensorView* Context::router_weight(const MicroBatchRecord& m, int layer, bool after) const {
  if (m.step != step) return nullptr;
  const auto& of = after ? weights_after : weights;
  const auto it = of.find({m.rank, layer});
  return it == of.end() || it->second.shape.size() != 2 ? nullptr : &it->second;
}

std::vector<v::Symbol> Context::symbols(bool of_gradient) const {
  const auto number = [](const std::optional<std::int64_t>& n) { return static_cast<double>(n.value_or(1)); };
  const TraceLayer* first = facts.layers.empty() ? nullptr : &facts.layers.front();
  std::vector<v::Symbol> s = {{"M", static_cast<double>(accumulation)},
                              {"W", number(facts.world_size)},
                              {"2", 2},
                              {"TP", number(facts.tensor_parallel)},
                              {"CP", number(facts.context_parallel)},
                              {"EP", number(facts.expert_parallel)}};
  if (facts.aux_coefficient) s.push_back({"coefficient", *facts.aux_coefficient, true});
  std::set<std::int64_t> sequences;
  std::int64_t tokens = 0, labels = 0;
  for (const MicroBatchRecord& m : trace.micro_batches()) {
    sequences.insert(m.sequences);
    tokens += m.tokens;
    labels += m.label_tokens.value_or(0);
  }
  if (sequences.size() == 1 && *sequences.begin() > 1) s.push_back({"S", static_cast<double>(*sequences.begin())});
  if (of_gradient) {
    if (tokens > 0 && !trace.micro_batches().empty())
      s.push_back({"T", static_cast<double>(tokens) / static_cast<double>(trace.micro_batches().size())});
    if (labels > 0) s.push_back({"T / labels", static_cast<double>(tokens) / static_cast<double>(labels), true});
    return s;
  }
  const auto layers = static_cast<double>(facts.layers.size());
  s.push_back({"L", layers});
  // Layers without experts, too: what a loss is divided by where it should be L (A35).
  const Node* all = facts.config.is_map() ? facts.config.find("num_hidden_layers") : nullptr;
  if (all && all->as_int() && static_cast<double>(*all->as_int()) != layers)
    s.push_back({"layers", static_cast<double>(*all->as_int())});
  if (first) {
    s.push_back({"k", static_cast<double>(first->top_k)});
    s.push_back({"E", static_cast<double>(first->experts)});
  }
  return s;
}

}  // namespace moeaudit::replay
