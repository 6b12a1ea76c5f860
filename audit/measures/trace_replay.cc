#include "audit/measures/trace_replay.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "audit/families/family.h"
#include "audit/measures/measure.h"
#include "audit/measures/router_replay.h"
#include "audit/variants/forms.h"
#include "audit/variants/naming.h"
#include "kernels/host/bounds.h"

namespace moeaudit {
namespace {

namespace k = kernels;
namespace v = variants;
using k::Float;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr std::size_t kMoved = 8;              // micro-batches whose logits are moved by a rounding
constexpr std::size_t kNamed = 16;             // micro-batches that a name must fit
constexpr std::size_t kNamedWeights = 4096;    // routing weights of a layer that it must fit
constexpr std::int64_t kMostLogits = 1 << 28;  // of one layer of one micro-batch: 2 GiB

Float float_of(DType d) {
  return d == DType::kF32    ? Float::kF32
         : d == DType::kBF16 ? Float::kBF16
         : d == DType::kF16  ? Float::kF16
                             : Float::kF64;
}
double unit(Float f) { return k::unit_roundoff(f); }

/// Relative error of a framework's float32 reduction of n terms: blocks and trees on every backend, so no term goes
/// through more than 128 + log2 n additions (torch's cascade_sum: 4 levels of at most n^(1/4) terms).
double reduction(double n) {
  return k::bounds::gamma(std::min(n, 128.0 + std::log2(std::max(n, 2.0))) + 4.0, unit(Float::kF32));
}

// ---- rows of the table
// -----------------------------------------------------------------------------------------------

struct Place {
  std::int64_t step = -1, micro_batch = -1, rank = -1;
  std::string file;
  int line = 0;
};

/// One row while it grows.
struct Row {
  std::string quantity, held_to, missing;
  int layer = -1;
  std::int64_t compared = 0, differing = 0;
  double recorded = kNan, expected = kNan, band = kNan, distance = 0;
  Place place;
  v::Name name;
  std::vector<double> all_recorded, all_expected, all_band;  // relative bands; of the observations that names must fit
  std::vector<Place> places;

  /// `band`: absolute. Returns whether it lies outside.
  bool add(double got, double want, double by, const Place& where) {
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
  void observe(double got, double want, double relative, const Place& where) {
    add(got, want, relative * std::max(std::fabs(got), std::fabs(want)), where);
    all_recorded.push_back(got);
    all_expected.push_back(want);
    all_band.push_back(relative);
    places.push_back(where);
  }
};

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

// ---- conventions
// -----------------------------------------------------------------------------------------------------

/// The family's routing with what the recorded config says; `why` where the order is not known.
std::optional<Routing> routing_of(const Trace& trace, std::string* why) {
  const TraceFacts& f = trace.facts();
  const Family* family = f.model_type.empty() ? nullptr : find_family_by_model_type(f.model_type);
  if (!family) {
    *why = f.model_type.empty() ? "trace.json does not say model_type" : "no family for model_type " + f.model_type;
    return std::nullopt;
  }
  if (!family->not_replayed.empty()) {
    *why = std::string(family->not_replayed);
    return std::nullopt;
  }
  const auto config = [&](std::string_view key) -> const Node* {
    const Node* found = f.config.is_map() ? f.config.find(key) : nullptr;
    if (!found && f.config.is_map()) {
      const Node* text = f.config.find("text_config");
      if (text && text->is_map()) found = text->find(key);
    }
    return found;
  };
  for (const FamilyCondition& c : family->routing_if) {
    const Node* node = config(c.key);
    const std::string has = !node ? "" : node->as_bool() ? (*node->as_bool() ? "true" : "false") : node->text;
    if (node && has != c.value) {
      *why = "the order is known for " + std::string(c.key) + " " + std::string(c.value) + " only";
      return std::nullopt;
    }
  }
  Routing r = family->routing;
  const auto fact = [&](std::string_view name, auto&& set) {
    for (const FamilyKey& key : family->keys) {
      if (key.fact != name) continue;
      for (const std::string_view spelt : key.keys) {
        if (const Node* node = config(spelt)) return set(*node);
      }
    }
  };
  fact("router.num_groups",
       [&](const Node& n) { r.groups = std::max<std::int64_t>(1, n.as_int().value_or(r.groups)); });
  fact("router.top_groups",
       [&](const Node& n) { r.top_groups = std::max<std::int64_t>(1, n.as_int().value_or(r.top_groups)); });
  fact("router.renormalised", [&](const Node& n) { r.renormalise = n.as_bool().value_or(r.renormalise); });
  fact("router.routed_scaling", [&](const Node& n) { r.scaling = n.as_double().value_or(r.scaling); });
  if (!family->groups_if.key.empty()) {
    const Node* node = config(family->groups_if.key);
    if (!node || node->text != family->groups_if.value) r.groups = r.top_groups = 1;
  }
  if (r.groups <= 1) r.group_score = GroupScore::kNone;
  for (const auto& [package, version] : f.packages) {
    // Masked groups got 0.0 before transformers 5.6 (pull request 45441), -inf since.
    const auto at = Version::parse(version), since = Version::parse("5.6.0");
    if (package == "transformers" && at && since && r.groups > 1) r.group_mask_is_zero = compare(*at, *since) < 0;
  }
  return r;
}

// ---- one layer of one micro-batch
// ------------------------------------------------------------------------------------

/// What the layers of a micro-batch share.
struct Shared {
  std::vector<std::uint8_t> valid;
  std::int64_t sequences = 1;
};

class Replay {
 public:
  Replay(const Trace& trace, const ReplayOptions& options, std::vector<WeightProblem>* problems)
      : trace_(trace), facts_(trace.facts()), options_(options), problems_(problems) {
    folder_ = facts_.path;
    while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
    routing_ = routing_of(trace, &why_not_routed_);
    const Family* family = facts_.model_type.empty() ? nullptr : find_family_by_model_type(facts_.model_type);
    const bool transformers = std::any_of(facts_.packages.begin(), facts_.packages.end(),
                                          [](const auto& p) { return p.first == "transformers"; });
    if (transformers && family && family->balance == Balance::kAuxLoss) balance_ = v::BalanceFamily::kTransformers;
    ranks_.insert(0);
    for (const MicroBatchRecord& m : trace.micro_batches()) ranks_.insert(m.rank);
    for (const TraceStep& s : trace.steps()) {
      std::map<std::int64_t, std::int64_t> of_rank;
      for (const MicroBatchRecord& m : trace.micro_batches_of(s)) {
        if (trains(m)) accumulation_ = std::max(accumulation_, ++of_rank[m.rank]);
      }
    }
  }

  ReplayTable run() {
    std::size_t done = 0;
    for (const TraceStep& s : trace_.steps()) {
      if (options_.progress)
        options_.progress("replay", static_cast<double>(done++) / static_cast<double>(trace_.steps().size()));
      replay_step(s);
    }
    ReplayTable t;
    describe(&t);
    finish_balance();
    finish_losses();
    for (auto& [key, row] : rows_) append(&t, std::move(row));
    return t;
  }

 private:
  static bool trains(const MicroBatchRecord& m) { return m.training.value_or(true); }
  Place place_of(const MicroBatchRecord& m) const {
    return {m.step, m.micro_batch, m.rank, records_file(m.rank), m.line};
  }
  Place place_of(const StepRecord& s) const { return {s.step, -1, s.rank, records_file(s.rank), s.line}; }
  std::string records_file(std::int64_t rank) const {
    if (facts_.format != "moe-audit-trace") return facts_.path;
    return folder_ + (rank == 0 ? "/records.jsonl" : "/records_rank" + std::to_string(rank) + ".jsonl");
  }

  /// Rows in the order of the report: whole-model quantities first, in the order of kOrder.
  Row& row(std::string_view quantity, int layer = -1) {
    static constexpr std::string_view kOrder[] = {
        "selection",  "weights",     "recomputed_selection", "aux_loss",       "z_loss",   "aux_in_loss",
        "aux_weight", "loss_weight", "router_grad",          "router_grad_ce", "bias_step"};
    const auto order = std::find(std::begin(kOrder), std::end(kOrder), quantity) - std::begin(kOrder);
    Row& r = rows_[{static_cast<int>(order), layer}];
    if (r.quantity.empty()) r.quantity = quantity, r.layer = layer;
    return r;
  }

  void fault(const TensorView& view, std::string what) {
    problems_->push_back({"", view.offset, std::string(view.name), std::move(what)});
  }

  void describe(ReplayTable* t) const {
    t->path = folder_;
    t->framework = facts_.framework;
    t->trainer = facts_.trainer.empty() ? facts_.arguments_class : facts_.trainer;
    t->model_type = facts_.model_type;
    t->model_class = facts_.model_class;
    for (const auto& [package, version] : facts_.packages)
      t->packages += (t->packages.empty() ? "" : ", ") + package + " " + version;
    t->output_router_logits = !facts_.output_router_logits ? "" : *facts_.output_router_logits ? "true" : "false";
    t->aux_coefficient = facts_.aux_coefficient.value_or(kNan);
    t->steps = static_cast<std::int64_t>(trace_.steps().size());
    t->micro_batches = static_cast<std::int64_t>(trace_.micro_batches().size());
    t->ranks = static_cast<std::int64_t>(ranks_.size());
    t->accumulation = accumulation_;
  }

  // ---- reading ---------------------------------------------------------------------------------------------------
  bool read_layer(const MicroBatchRecord& m, const Shared& shared, const LayerTensors& t, v::RoutedLayer* l) {
    const std::int64_t rows = m.rows();
    l->tokens = rows;
    l->experts = t.experts;
    const TraceLayer* stated = facts_.layer(t.layer);
    l->top_k = t.top_k > 0 ? t.top_k : stated ? stated->top_k : 0;
    l->sequences = shared.sequences;
    l->valid = shared.valid;
    if (!t.router_logits || rows < 1 || l->experts < 1 || l->top_k < 1 || l->top_k > l->experts) return false;
    if (rows > kMostLogits / l->experts)
      return fault(*t.router_logits, "more than 2^28 logits in one micro-batch are not replayed"), false;
    l->dtype = float_of(t.router_logits->dtype);
    // Under autocast softmax runs in float32 and is not rounded.
    l->scores_dtype = facts_.mixed_precision == "bf16" || facts_.mixed_precision == "fp16" ? Float::kF32 : l->dtype;
    l->logits.resize(static_cast<std::size_t>(rows * l->experts));
    if (!read_values(*t.router_logits, 0, rows * l->experts, l->logits.data()))
      return fault(*t.router_logits, "could not be read"), false;
    if (!std::all_of(l->logits.begin(), l->logits.end(), [](double x) { return std::isfinite(x); })) return false;
    if (t.selected_experts) {
      l->chosen.resize(static_cast<std::size_t>(rows * l->top_k));
      if (!read_ids(*t.selected_experts, 0, rows * l->top_k, l->chosen.data()))
        return fault(*t.selected_experts, "could not be read"), false;
      for (const std::int32_t id : l->chosen) {
        if (id >= l->experts) return fault(*t.selected_experts, "holds an id that is no expert"), false;
      }
    }
    if (t.dropped && t.selected_experts) {
      l->dropped.resize(l->chosen.size());
      if (!read_flags(*t.dropped, 0, rows * l->top_k, l->dropped.data()))
        return fault(*t.dropped, "could not be read"), false;
    }
    if (routing_) l->score = route_args<double>(*routing_, 1, 1).score;
    const auto bias = biases_.find({m.rank, t.layer});
    if (bias != biases_.end() && static_cast<std::int64_t>(bias->second.size()) == l->experts) l->bias = bias->second;
    return true;
  }

  Shared shared_of(const MicroBatch& mb) {
    Shared s;
    const MicroBatchRecord& m = *mb.record;
    if (m.sequences > 0 && !m.sampled_tokens) s.sequences = m.sequences;
    if (mb.token_mask) {
      s.valid.resize(static_cast<std::size_t>(m.rows()));
      if (!read_flags(*mb.token_mask, 0, m.rows(), s.valid.data())) s.valid.clear();
    }
    return s;
  }

  // ---- one step --------------------------------------------------------------------------------------------------
  void replay_step(const TraceStep& s) {
    biases_.clear();
    std::map<std::int64_t, StepTensors> steps;
    for (const StepRecord& r : trace_.ranks_of(s)) {
      StepTensors tensors = trace_.open(r, problems_);
      for (const StepLayerTensors& l : tensors.layers) {
        if (!l.correction_bias_before) continue;
        const std::int64_t n = l.correction_bias_before->shape.empty() ? 0 : l.correction_bias_before->shape[0];
        std::vector<double> bias(static_cast<std::size_t>(n));
        if (read_values(*l.correction_bias_before, 0, n, bias.data())) biases_[{r.rank, l.layer}] = std::move(bias);
      }
      replay_gradients(r, tensors);
      steps.emplace(r.rank, std::move(tensors));
    }
    loads_.clear();
    for (const MicroBatchRecord& m : trace_.micro_batches_of(s)) replay_micro_batch(m);
    for (const auto& [rank, tensors] : steps) replay_bias(*tensors.record, tensors);
    collect_losses(s);
  }

  void replay_micro_batch(const MicroBatchRecord& m) {
    const MicroBatch mb = trace_.open(m, problems_);
    const Shared shared = shared_of(mb);
    v::BalanceForm right = v::held_to(balance_.value_or(v::BalanceFamily::kPerLayer));
    v::BalanceSum loss(right), up(right), down(right);
    double z = 0, z_error = 0, range = 0;
    bool all = !mb.layers.empty() && mb.layers.size() == facts_.layers.size() && !m.sampled_tokens;
    Float dtype = Float::kF32;
    std::int64_t experts = 1;
    for (const LayerTensors& t : mb.layers) {
      count_loads(m, shared, t);
      v::RoutedLayer l;
      if (!read_layer(m, shared, t, &l)) {
        all = false;
        continue;
      }
      replay_selection(m, t, l);
      if (!all || (!m.aux_loss && !m.z_loss)) continue;
      const auto [low, high] = std::minmax_element(l.logits.begin(), l.logits.end());
      range = std::max(range, *high - *low);
      experts = std::max(experts, l.experts);
      if (l.dtype == Float::kBF16 || l.dtype == Float::kF16) dtype = l.dtype;
      if (m.aux_loss) {
        loss.add(l);
      }
      if (m.aux_loss && balance_seen_.size() < kMoved) {
        // One rounding of the recorded dtype up and down, alternating, so that a common shift does not cancel.
        v::RoutedLayer moved = l;
        for (std::size_t i = 0; i < l.logits.size(); ++i)
          moved.logits[i] += (i % 2 ? 0.5 : -0.5) * k::spacing(l.logits[i], l.dtype);
        up.add(moved);
        for (std::size_t i = 0; i < l.logits.size(); ++i) moved.logits[i] = 2 * l.logits[i] - moved.logits[i];
        down.add(moved);
      }
      if (m.z_loss) {
        const double value = v::z_value(v::z_forms()[0], l);
        z += value;
        z_error += k::bounds::log_sum_exp(l.experts, *high - *low, std::sqrt(std::fabs(value))) * 2 *
                       std::sqrt(std::fabs(value)) +
                   unit(l.dtype) * std::max(std::fabs(*high), std::fabs(*low)) * 2 * std::sqrt(std::fabs(value));
      }
    }
    if (m.aux_loss) {
      Row& r = row("aux_loss");
      if (!all) {
        r.missing = m.sampled_tokens ? "the per-token tensors are a sample: record without max_tokens"
                                     : "needs router_logits of every layer, finite";
      } else {
        const double want = loss.value();
        if (!std::isfinite(want)) r.missing = "layers of several sizes make no one set";
        if (std::isfinite(want) && balance_seen_.size() < kMoved) {
          moved_ = std::max({moved_, std::fabs(up.value() - want) / std::fabs(want),
                             std::fabs(down.value() - want) / std::fabs(want)});
        }
        const double narrow = dtype == Float::kF32 ? 0.0 : 3 * unit(dtype);
        const double band = moved_ + k::bounds::softmax_relative(experts, 0, range, Float::kF32) + narrow +
                            reduction(static_cast<double>(m.tokens) * static_cast<double>(mb.layers.size())) +
                            loss.tie_slack();
        r.held_to = right.name;
        if (std::isfinite(want)) {
          r.observe(*m.aux_loss, want, band, place_of(m));
          balance_seen_.push_back(&m);
        }
      }
    }
    if (m.z_loss) {
      Row& r = row("z_loss");
      if (!all) {
        r.missing = "needs router_logits of every layer, finite and not sampled";
      } else {
        const double layers = static_cast<double>(mb.layers.size());
        const double want = z / layers;
        const double band = z_error / layers / std::max(want, 1e-300) + reduction(static_cast<double>(m.tokens)) +
                            8 * unit(Float::kF32) * (1 + range);
        r.held_to = v::z_forms()[0].name;
        r.observe(*m.z_loss, want, band, place_of(m));
        z_seen_.push_back(&m);
      }
    }
    if (mb.token_loss && mb.label_mask && !m.sampled_tokens) sum_token_losses(m, mb);
  }

  // ---- loads -----------------------------------------------------------------------------------------------------
  struct Loads {
    std::vector<std::int64_t> valid, all, kept;  // [experts]: of tokens that are not padding, of all, after drops
    std::int64_t tokens = 0;                     // not padding
  };
  /// Loads by layer, micro-batch and rank, of the step at hand.
  std::map<int, std::map<std::pair<std::int64_t, std::int64_t>, Loads>> loads_;

  void count_loads(const MicroBatchRecord& m, const Shared& shared, const LayerTensors& t) {
    if (!trains(m) || t.experts < 1) return;
    Loads loads;
    const auto e = static_cast<std::size_t>(t.experts);
    if (t.selected_experts && t.top_k > 0 && !m.sampled_tokens) {
      std::vector<std::int32_t> ids(static_cast<std::size_t>(m.rows() * t.top_k));
      if (!read_ids(*t.selected_experts, 0, m.rows() * t.top_k, ids.data())) return;
      std::vector<std::uint8_t> dropped(ids.size());
      if (t.dropped && !read_flags(*t.dropped, 0, m.rows() * t.top_k, dropped.data())) return;
      loads.valid.resize(e), loads.all.resize(e), loads.kept.resize(e);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || ids[i] >= t.experts) continue;
        const bool valid = shared.valid.empty() || shared.valid[i / static_cast<std::size_t>(t.top_k)];
        const auto id = static_cast<std::size_t>(ids[i]);
        ++loads.all[id];
        loads.valid[id] += valid;
        loads.kept[id] += valid && !dropped[i];
      }
      loads.tokens =
          shared.valid.empty() ? m.rows() : std::accumulate(shared.valid.begin(), shared.valid.end(), std::int64_t{0});
    } else if (t.tokens_per_expert) {
      loads.all.resize(e);
      if (!read_counts(*t.tokens_per_expert, 0, t.experts, loads.all.data())) return;
      loads.valid = loads.kept = loads.all;
      loads.tokens = m.tokens;
    } else {
      return;
    }
    loads_[t.layer][{m.micro_batch, m.rank}] = std::move(loads);
  }

  // ---- selection and weights -------------------------------------------------------------------------------------
  /// Whether a set of experts is one that the choice values allow, each value moved by no more than its band.
  static bool allowed(const k::RouteArgs<double>& a, const double* choice, const double* band,
                      const std::vector<char>& in) {
    const std::int64_t size = a.experts / a.groups;
    const auto group_score = [&](std::int64_t g, double sign) {
      double best = -kInf, second = -kInf;
      for (std::int64_t e = g * size; e < (g + 1) * size; ++e) {
        const double value = choice[e] + sign * band[e];
        if (value > best)
          second = best, best = value;
        else
          second = std::max(second, value);
      }
      return a.group_score == k::GroupScore::kTop2Sum && size > 1 ? best + second : best;
    };
    std::vector<char> certain(static_cast<std::size_t>(a.groups), 1), possible(static_cast<std::size_t>(a.groups), 1);
    if (a.groups > 1) {
      for (std::int64_t g = 0; g < a.groups; ++g) {
        std::int64_t surely_better = 0, maybe_better = 0;
        for (std::int64_t h = 0; h < a.groups; ++h) {
          if (h == g) continue;
          surely_better += group_score(h, -1) > group_score(g, 1);
          maybe_better += group_score(h, 1) >= group_score(g, -1);
        }
        possible[static_cast<std::size_t>(g)] = surely_better < a.top_groups;
        certain[static_cast<std::size_t>(g)] = maybe_better < a.top_groups;
      }
    }
    double lowest = kInf;
    for (std::int64_t e = 0; e < a.experts; ++e) {
      if (!in[static_cast<std::size_t>(e)]) continue;
      if (!possible[static_cast<std::size_t>(e / size)]) {
        // A mask of 0 leaves the others in the race, with choice 0.
        if (!a.group_mask_is_zero) return false;
        lowest = std::min(lowest, 0.0);
        continue;
      }
      lowest = std::min(lowest, choice[e] + band[e]);
    }
    for (std::int64_t e = 0; e < a.experts; ++e) {
      if (!in[static_cast<std::size_t>(e)] && certain[static_cast<std::size_t>(e / size)] &&
          choice[e] - band[e] > lowest)
        return false;
    }
    return true;
  }

  void replay_selection(const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l) {
    if (t.recomputed_selected_experts && !l.chosen.empty()) replay_recomputation(m, t, l);
    if (l.chosen.empty()) return;
    Row& r = row("selection", t.layer);
    Row none;
    Row& w = t.routing_weights ? row("weights", t.layer) : none;
    const auto unknown = [&](const std::string& why) {
      if (r.missing.empty()) r.missing = why;
      if (w.missing.empty()) w.missing = why;
    };
    if (!routing_) return unknown(why_not_routed_);
    if (routing_->correction_bias && l.bias.empty()) return unknown("needs correction_bias_before of the step");
    const k::RouteArgs<double> args = route_args<double>(*routing_, l.experts, l.top_k);
    if (args.groups < 1 || args.groups > 1024 || l.experts % args.groups != 0)
      return unknown("the groups do not divide the experts");
    const v::RouteForm right = v::route_forms(args, !l.bias.empty())[0];
    // Choice values without the groups, which allowed() looks at with their bands.
    k::RouteArgs<double> plain = args;
    plain.logits = l.logits.data();
    plain.correction_bias = l.bias.empty() ? nullptr : l.bias.data();
    plain.tokens = l.tokens;
    plain.groups = plain.top_groups = 1;
    plain.group_score = k::GroupScore::kNone;
    std::vector<std::int32_t> chosen(l.chosen.size()), plain_chosen(l.chosen.size());
    std::vector<double> choice(l.logits.size()), weights, band(static_cast<std::size_t>(l.experts));
    if (k::route(plain, k::RouteResult<double>{plain_chosen.data(), nullptr, nullptr, choice.data()}) !=
            k::Status::kOk ||
        !v::route_with(right, l, &chosen, &weights)) {
      return unknown("this order of routing is not replayed");
    }
    const Float scores = score_dtype(l.dtype);
    std::vector<char> in(static_cast<std::size_t>(l.experts));
    r.held_to = "the k largest of the recorded logits, by " + family_words();
    std::vector<double> recorded_weights;
    if (t.routing_weights) {
      recorded_weights.resize(l.chosen.size());
      if (!read_values(*t.routing_weights, 0, l.tokens * l.top_k, recorded_weights.data())) recorded_weights.clear();
      w.held_to = "weights of the chosen, by " + family_words();
    }
    std::int64_t differing = 0;
    for (std::int64_t token = 0; token < l.tokens; ++token) {
      const std::int32_t* got = l.chosen.data() + token * l.top_k;
      const std::int32_t* want = chosen.data() + token * l.top_k;
      std::fill(in.begin(), in.end(), 0);
      for (std::int64_t j = 0; j < l.top_k; ++j) {
        if (got[j] >= 0) in[static_cast<std::size_t>(got[j])] = 1;
      }
      bool same = true;
      for (std::int64_t j = 0; j < l.top_k; ++j) same = same && in[static_cast<std::size_t>(want[j])];
      const double* logits = l.logits.data() + token * l.experts;
      const auto [low, high] = std::minmax_element(logits, logits + l.experts);
      const double relative = score_error(l, *high - *low, scores);
      ++r.compared;
      if (!same) {
        for (std::int64_t e = 0; e < l.experts; ++e) {
          const double value = choice[static_cast<std::size_t>(token * l.experts + e)];
          const double score = args.softmax_after_top_k
                                   ? 0.0
                                   : std::fabs(value - (l.bias.empty() ? 0.0 : l.bias[static_cast<std::size_t>(e)]));
          band[static_cast<std::size_t>(e)] = relative * score + 2 * unit(Float::kF32) * std::fabs(value);
        }
        if (!allowed(args, choice.data() + token * l.experts, band.data(), in)) {
          ++differing;
          if (r.differing + differing == 1) r.place = place_of(m);
        }
        continue;  // weights of another set say nothing
      }
      if (recorded_weights.empty()) continue;
      for (std::int64_t j = 0; j < l.top_k; ++j) {
        const auto at = static_cast<std::size_t>(token * l.top_k + j);
        const auto* place = std::find(want, want + l.top_k, got[j]);
        const double expected =
            weights[static_cast<std::size_t>(token * l.top_k) + static_cast<std::size_t>(place - want)];
        const double by =
            std::expm1(2 * std::log1p(relative) + k::bounds::gamma(static_cast<double>(l.top_k) + 5, unit(scores))) *
                std::fabs(expected) +
            0.5 * k::spacing(expected, float_of(t.routing_weights->dtype));
        w.add(recorded_weights[at], expected, by, place_of(m));
      }
    }
    r.differing += differing;
    r.recorded = static_cast<double>(r.differing);
    r.expected = 0;
    r.band = 0;
    r.distance = static_cast<double>(r.differing);
    if (differing > 0 && !r.name.found) name_selection(args, l, &r);
    if (w.differing > 0 && !recorded_weights.empty() && !w.name.found && w.name.runner_up.empty())
      name_weights(args, t, l, recorded_weights, &w);
  }

  std::string family_words() const { return facts_.model_type + "'s order"; }

  /// The dtype in which the scores exist before the choice.
  Float score_dtype(Float logits) const {
    if (routing_->scores_cast_back || routing_->scores_dtype == DType::kUnknown) return logits;
    const Float f = float_of(routing_->scores_dtype);
    return f == Float::kF64 ? Float::kF32 : f;
  }
  double score_error(const v::RoutedLayer& l, double range, Float f) const {
    if (l.score == k::Score::kSoftmax) return k::bounds::softmax_relative(l.experts, 0, range, f);
    return l.score == k::Score::kSigmoid ? k::bounds::sigmoid_relative(0, f) : k::bounds::sqrt_softplus_relative(0, f);
  }

  /// A form that makes every recorded choice.
  static void name_selection(const k::RouteArgs<double>& args, const v::RoutedLayer& l, Row* r) {
    double nearest = kInf;
    for (const v::RouteForm& form : v::route_forms(args, !l.bias.empty())) {
      if (form.id.empty()) continue;
      std::vector<std::int32_t> chosen;
      std::vector<double> weights;
      if (!v::route_with(form, l, &chosen, &weights)) continue;
      std::int64_t off = 0;
      for (std::int64_t token = 0; token < l.tokens; ++token) {
        std::vector<std::int32_t> a(chosen.begin() + token * l.top_k, chosen.begin() + (token + 1) * l.top_k);
        std::vector<std::int32_t> b(l.chosen.begin() + token * l.top_k, l.chosen.begin() + (token + 1) * l.top_k);
        std::sort(a.begin(), a.end());
        std::sort(b.begin(), b.end());
        off += a != b;
      }
      const std::string text = std::string(form.id) + " " + std::string(form.name);
      if (off == 0 && r->name.found) {
        r->name.also += (r->name.also.empty() ? "" : "; ") + text;
      } else if (off == 0) {
        r->name.found = true;
        r->name.id = form.id;
        r->name.name = form.name;
      } else if (static_cast<double>(off) < nearest) {
        nearest = static_cast<double>(off);
        r->name.runner_up = text;
        r->name.runner_up_fit = nearest;
      }
    }
  }

  void name_weights(const k::RouteArgs<double>& args, const LayerTensors& t, const v::RoutedLayer& l,
                    const std::vector<double>& recorded, Row* w) const {
    const std::size_t n = std::min(recorded.size(), kNamedWeights) / static_cast<std::size_t>(l.top_k) *
                          static_cast<std::size_t>(l.top_k);
    const Float stored = float_of(t.routing_weights->dtype), scores = score_dtype(l.dtype);
    const auto [low, high] = std::minmax_element(l.logits.begin(), l.logits.end());
    const double relative = 2 * score_error(l, *high - *low, scores) +
                            k::bounds::gamma(static_cast<double>(l.top_k) + 5, unit(scores)) + 2 * unit(stored);
    std::vector<v::Formula> formulas;
    for (const v::RouteForm& form : v::route_forms(args, !l.bias.empty())) {
      std::vector<std::int32_t> chosen;
      std::vector<double> weights;
      if (!v::route_with(form, l, &chosen, &weights)) continue;
      v::Formula f{std::string(form.id), std::string(form.name), std::vector<double>(n, kNan)};
      for (std::size_t i = 0; i < n; ++i) {
        const std::size_t first = i / static_cast<std::size_t>(l.top_k) * static_cast<std::size_t>(l.top_k);
        for (std::size_t j = first; j < first + static_cast<std::size_t>(l.top_k); ++j) {
          if (chosen[j] == l.chosen[i]) f.values[i] = weights[j];
        }
      }
      formulas.push_back(std::move(f));
    }
    const std::vector<v::Symbol> symbols = {{"k", static_cast<double>(l.top_k)}, {"2", 2}, {"scaling", args.scaling}};
    const std::vector<double> got(recorded.begin(), recorded.begin() + static_cast<std::ptrdiff_t>(n)),
        band(n, relative);
    w->name = v::name_formula("weights", {got, band}, formulas, v::factors_of(symbols));
  }

  void replay_recomputation(const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l) {
    std::vector<std::int32_t> again(l.chosen.size());
    if (!read_ids(*t.recomputed_selected_experts, 0, static_cast<std::int64_t>(again.size()), again.data())) return;
    Row& r = row("recomputed_selection", t.layer);
    r.held_to = "the choice of the first forward";
    for (std::int64_t token = 0; token < l.tokens; ++token) {
      std::vector<std::int32_t> a(again.begin() + token * l.top_k, again.begin() + (token + 1) * l.top_k);
      std::vector<std::int32_t> b(l.chosen.begin() + token * l.top_k, l.chosen.begin() + (token + 1) * l.top_k);
      std::sort(a.begin(), a.end());
      std::sort(b.begin(), b.end());
      ++r.compared;
      if (a != b && ++r.differing == 1) r.place = place_of(m);
    }
    r.recorded = r.distance = static_cast<double>(r.differing);
    r.expected = r.band = 0;
  }

  // ---- gradients of the routers ----------------------------------------------------------------------------------
  void replay_gradients(const StepRecord& s, const StepTensors& tensors) {
    for (const StepLayerTensors& t : tensors.layers) {
      const TraceLayer* stated = facts_.layer(t.layer);
      if (stated && stated->trainable && !*stated->trainable) continue;
      const auto largest = [&](const TensorView& g) {
        std::int64_t n = 1;
        for (const std::int64_t d : g.shape) n *= d;
        std::vector<double> values(static_cast<std::size_t>(n));
        double most = 0;
        if (!read_values(g, 0, n, values.data())) return kNan;
        for (const double x : values) most = std::max(most, std::fabs(x));
        return most;
      };
      const auto judge = [&](std::string_view quantity, const TensorView& g) {
        const double most = largest(g);
        if (std::isnan(most)) return;
        Row& r = row(quantity, t.layer);
        ++r.compared;
        r.held_to = "a gradient that is not zero";
        r.differing += most == 0.0;
        if (r.compared == 1 || most == 0.0) r.place = place_of(s);
        r.recorded = r.compared == 1 ? most : std::min(r.recorded, most);
      };
      if (t.router_grad) judge("router_grad", *t.router_grad);
      if (t.router_grad_ce) judge("router_grad_ce", *t.router_grad_ce);
    }
  }

  // ---- correction bias -------------------------------------------------------------------------------------------
  void replay_bias(const StepRecord& s, const StepTensors& tensors) {
    for (const StepLayerTensors& t : tensors.layers) {
      if (!t.correction_bias_before || !t.correction_bias_after) continue;
      const auto before = biases_.find({s.rank, t.layer});
      if (before == biases_.end()) continue;
      const auto n = static_cast<std::int64_t>(before->second.size());
      std::vector<double> after(before->second.size());
      if (!read_values(*t.correction_bias_after, 0, n, after.data())) continue;
      Row& r = row("bias_step", t.layer);
      const auto loads = loads_.find(t.layer);
      if (!facts_.bias_update_rate) {
        r.missing = "needs coefficients.bias_update_rate in trace.json";
        continue;
      }
      if (loads == loads_.end()) {
        r.missing = "needs selected_experts or tokens_per_expert of every micro-batch";
        continue;
      }
      name_bias(s, before->second, after, loads->second, float_of(t.correction_bias_after->dtype), &r);
    }
  }

  using StepLoads = std::map<std::pair<std::int64_t, std::int64_t>, Loads>;

  /// The bias after the step under one form; empty where the trace lacks what it needs.
  std::vector<double> bias_after(const v::BiasForm& form, const std::vector<double>& before, const StepLoads& loads,
                                 std::int64_t rank) const {
    std::vector<double> bias = before;
    std::map<std::int64_t, std::vector<double>> counts;  // by micro-batch, or all under 0
    for (const auto& [at, l] : loads) {
      if (form.own_rank && at.second != rank) continue;
      const auto& c = form.padding ? l.all : form.kept ? l.kept : l.valid;
      if (c.size() != before.size()) return {};
      auto& sum = counts[form.per_micro_batch ? at.first : 0];
      sum.resize(before.size());
      for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += static_cast<double>(c[e]);
    }
    for (const auto& [micro, c] : counts) {
      k::BiasUpdateArgs a;
      a.bias = bias.data();
      a.counts = c.data();
      a.experts = static_cast<std::int64_t>(bias.size());
      a.rate = form.rate * *facts_.bias_update_rate;
      a.step = form.step;
      a.centre = form.centre;
      a.counts_dtype = form.counts_dtype;
      a.step_dtype = form.step_dtype;
      a.bias_dtype = form.bias_dtype;
      if (k::bias_update(a, bias.data()) != k::Status::kOk) return {};
    }
    return bias;
  }

  void name_bias(const StepRecord& s, const std::vector<double>& before, const std::vector<double>& after,
                 const StepLoads& loads, Float stored, Row* r) {
    const double rate = std::fabs(*facts_.bias_update_rate);
    double size = rate;
    for (std::size_t e = 0; e < before.size(); ++e) size = std::max({size, std::fabs(before[e]), std::fabs(after[e])});
    // Two roundings of the dtype that the bias is stored in: of the step, which is added, and of the sum.
    const double band = k::spacing(size, stored) + 2 * unit(Float::kF32) * rate;
    const auto worst = [&](const std::vector<double>& bias, std::size_t* where, double updates = 1) {
      double most = 0;
      for (std::size_t e = 0; e < bias.size(); ++e) {
        const double off = std::fabs(bias[e] - after[e]) / (updates * band);
        if (off > most) most = off, *where = e;
      }
      return bias.empty() ? kInf : most;
    };
    // Where centring cannot be told apart, the first of the right ones counts.
    const auto forms = v::bias_forms();
    std::size_t at = 0;
    const std::vector<double> plain = bias_after(forms[0], before, loads, s.rank);
    double off = worst(plain, &at);
    std::size_t ignored = 0;
    const bool centred = off > 1 && std::min(worst(bias_after(forms[1], before, loads, s.rank), &ignored),
                                             worst(bias_after(forms[2], before, loads, s.rank), &ignored)) <= 1;
    if (centred) off = 0;
    r->held_to = centred ? forms[1].name : forms[0].name;
    if (plain.empty()) return;
    r->add(centred ? plain[at] - before[at] : after[at] - before[at], plain[at] - before[at], band, place_of(s));
    if (off <= 1) return;
    v::Name name;
    double nearest = kInf;
    for (const v::BiasForm& form : forms) {
      if (&form == &forms[0]) continue;
      const double d = worst(bias_after(form, before, loads, s.rank), &ignored,
                             form.per_micro_batch ? static_cast<double>(accumulation_) : 1);
      const std::string text = std::string(form.id) + " " + std::string(form.name);
      if (d <= 1 && name.found)
        name.also += (name.also.empty() ? "" : "; ") + text;
      else if (d <= 1)
        name.found = true, name.id = form.id, name.name = form.name, name.fit = d;
      else if (d < nearest)
        nearest = d, name.runner_up = text, name.runner_up_fit = d;
    }
    if (after == before) {
      name.found = true, name.id = "B17", name.name = "the bias did not move", name.fit = 0, name.factor = "0",
      name.factor_value = 0;
    } else if (!name.found) {
      name_bias_multiple(before, after, plain, band, &name);
    }
    // A name must hold in every step: the same again, or none.
    if (!r->name.found && r->name.runner_up.empty())
      r->name = name;
    else if (r->name.id != name.id)
      r->name.found = false;
  }

  /// A step that is the right one times a constant.
  static void name_bias_multiple(const std::vector<double>& before, const std::vector<double>& after,
                                 const std::vector<double>& plain, double band, v::Name* name) {
    std::optional<double> ratio;
    for (std::size_t e = 0; e < before.size(); ++e) {
      const double want = plain[e] - before[e], got = after[e] - before[e];
      if (want == 0.0) {
        if (std::fabs(got) > band) return;
        continue;
      }
      if (!ratio) ratio = got / want;
      if (std::fabs(got - *ratio * want) > 2 * band) return;
    }
    if (!ratio || *ratio == 0.0) return;
    name->found = true;
    name->id = "B12";
    name->name = "another rate than the configured one";
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", *ratio);
    name->factor = text;
    name->factor_value = *ratio;
  }

  // ---- losses ----------------------------------------------------------------------------------------------------
  struct TokenLoss {
    double sum = 0;
    std::int64_t labels = 0;
  };
  std::map<const MicroBatchRecord*, TokenLoss> token_losses_;

  void sum_token_losses(const MicroBatchRecord& m, const MicroBatch& mb) {
    std::vector<double> loss(static_cast<std::size_t>(m.rows()));
    std::vector<std::uint8_t> mask(loss.size());
    if (!read_values(*mb.token_loss, 0, m.rows(), loss.data()) || !read_flags(*mb.label_mask, 0, m.rows(), mask.data()))
      return;
    TokenLoss t;
    for (std::size_t i = 0; i < loss.size(); ++i) {
      if (!mask[i]) continue;
      t.sum += loss[i];
      ++t.labels;
    }
    token_losses_[&m] = t;
  }

  struct StepLosses {
    std::vector<const MicroBatchRecord*> micro_batches;  // that train, ordered by micro-batch, then rank
    bool all_ranks = true;
  };
  std::vector<StepLosses> step_losses_;

  void collect_losses(const TraceStep& s) {
    StepLosses l;
    std::set<std::int64_t> ranks;
    for (const MicroBatchRecord& m : trace_.micro_batches_of(s)) {
      if (!trains(m)) continue;
      l.micro_batches.push_back(&m);
      ranks.insert(m.rank);
    }
    l.all_ranks = !facts_.world_size || static_cast<std::int64_t>(ranks.size()) == *facts_.world_size;
    if (!l.micro_batches.empty()) step_losses_.push_back(std::move(l));
  }

  std::vector<v::Symbol> symbols(bool of_gradient) const {
    const auto number = [](const std::optional<std::int64_t>& n) { return static_cast<double>(n.value_or(1)); };
    const TraceLayer* first = facts_.layers.empty() ? nullptr : &facts_.layers.front();
    std::vector<v::Symbol> s = {{"M", static_cast<double>(accumulation_)},
                                {"W", number(facts_.world_size)},
                                {"2", 2},
                                {"TP", number(facts_.tensor_parallel)},
                                {"CP", number(facts_.context_parallel)},
                                {"EP", number(facts_.expert_parallel)}};
    if (facts_.aux_coefficient) s.push_back({"coefficient", *facts_.aux_coefficient, true});
    std::set<std::int64_t> sequences;
    std::int64_t tokens = 0, labels = 0;
    for (const MicroBatchRecord& m : trace_.micro_batches()) {
      sequences.insert(m.sequences);
      tokens += m.tokens;
      labels += m.label_tokens.value_or(0);
    }
    if (sequences.size() == 1 && *sequences.begin() > 1) s.push_back({"S", static_cast<double>(*sequences.begin())});
    if (of_gradient) {
      if (tokens > 0 && !trace_.micro_batches().empty())
        s.push_back({"T", static_cast<double>(tokens) / static_cast<double>(trace_.micro_batches().size())});
      if (labels > 0) s.push_back({"T / labels", static_cast<double>(tokens) / static_cast<double>(labels), true});
      return s;
    }
    s.push_back({"L", static_cast<double>(facts_.layers.size())});
    if (first) {
      s.push_back({"k", static_cast<double>(first->top_k)});
      s.push_back({"E", static_cast<double>(first->experts)});
    }
    return s;
  }

  /// Second pass over a few micro-batches, with every form.
  void finish_balance() {
    if (const auto it = rows_.find({3, -1}); it != rows_.end()) name_aux(&it->second);
    if (const auto it = rows_.find({4, -1}); it != rows_.end()) name_z(&it->second);
  }

  /// Loads of the steps that the named micro-batches belong to, for the forms that count beyond a micro-batch.
  void load_step(std::int64_t step) {
    loads_.clear();
    for (const TraceStep& s : trace_.steps()) {
      if (s.step != step) continue;
      for (const MicroBatchRecord& m : trace_.micro_batches_of(s)) {
        const MicroBatch mb = trace_.open(m, problems_);
        const Shared shared = shared_of(mb);
        for (const LayerTensors& t : mb.layers) count_loads(m, shared, t);
      }
    }
  }
  void add_loads(const MicroBatchRecord& m, int layer, v::RoutedLayer* l) const {
    const auto of_layer = loads_.find(layer);
    if (of_layer == loads_.end()) return;
    const auto add = [&](const Loads& x, std::vector<std::int64_t>* counts, std::int64_t* tokens) {
      counts->resize(x.valid.size());
      for (std::size_t e = 0; e < x.valid.size(); ++e) (*counts)[e] += x.valid[e];
      *tokens += x.tokens;
    };
    for (const auto& [at, x] : of_layer->second) {
      add(x, &l->step_counts, &l->step_tokens);
      if (at.first == m.micro_batch) add(x, &l->rank_counts, &l->rank_tokens);
      if (at.first <= m.micro_batch) add(x, &l->running_counts, &l->running_tokens);
    }
  }

  void name_aux(Row* r) {
    const bool known = balance_.has_value();
    if (r->differing == 0) return;
    const auto forms = v::balance_forms(balance_.value_or(v::BalanceFamily::kPerLayer),
                                        !routing_ || routing_->scoring == Scoring::kSoftmax);
    std::vector<v::Formula> formulas;
    for (const v::BalanceForm& f : forms) formulas.push_back({std::string(f.id), std::string(f.name), {}});
    const std::size_t n = std::min(kNamed, balance_seen_.size());
    std::int64_t step = -1;
    for (std::size_t i = 0; i < n; ++i) {
      const MicroBatchRecord& m = *balance_seen_[i];
      if (m.step != step) load_step(step = m.step);
      const MicroBatch mb = trace_.open(m, problems_);
      const Shared shared = shared_of(mb);
      std::vector<v::BalanceSum> sums(forms.begin(), forms.end());
      for (const LayerTensors& t : mb.layers) {
        v::RoutedLayer l;
        if (!read_layer(m, shared, t, &l)) continue;
        add_loads(m, t.layer, &l);
        for (v::BalanceSum& sum : sums) sum.add(l);
      }
      for (std::size_t f = 0; f < forms.size(); ++f) formulas[f].values.push_back(sums[f].value());
    }
    const auto factors = v::factors_of(symbols(false));
    r->name = v::name_formula("aux_loss", {std::span(r->all_recorded).first(n), std::span(r->all_band).first(n)},
                              formulas, factors);
    if (known) return;
    // Nobody said which convention this framework has: one that frameworks use is no divergence.
    static constexpr std::string_view kConventions[] = {"",    "A0",  "A1",  "A2",  "A3", "A4",
                                                        "A13", "A14", "A18", "A23", "A24"};
    if (r->name.found &&
        std::find(std::begin(kConventions), std::end(kConventions), r->name.id) != std::end(kConventions))
      r->differing = 0;
    r->held_to = "no convention known for this framework";
  }

  void name_z(Row* r) {
    if (r->differing == 0) return;
    std::vector<v::Formula> formulas;
    for (const v::ZForm& f : v::z_forms()) formulas.push_back({std::string(f.id), std::string(f.name), {}});
    const std::size_t n = std::min(kNamed, z_seen_.size());
    for (std::size_t i = 0; i < n; ++i) {
      const MicroBatchRecord& m = *z_seen_[i];
      const MicroBatch mb = trace_.open(m, problems_);
      const Shared shared = shared_of(mb);
      std::vector<double> sums(formulas.size());
      for (const LayerTensors& t : mb.layers) {
        v::RoutedLayer l;
        if (!read_layer(m, shared, t, &l)) continue;
        for (std::size_t f = 0; f < formulas.size(); ++f) sums[f] += v::z_value(v::z_forms()[f], l);
      }
      for (std::size_t f = 0; f < formulas.size(); ++f)
        formulas[f].values.push_back(sums[f] / static_cast<double>(mb.layers.size()));
    }
    r->name = v::name_formula("z_loss", {std::span(r->all_recorded).first(n), std::span(r->all_band).first(n)},
                              formulas, v::factors_of(symbols(false)));
  }

  /// What the model's loss divides its sum by: the count that the trainer handed over, or its own labels.
  enum class Divided { kItems, kLabels };
  double divisor(const MicroBatchRecord& m, Divided d) const {
    const auto it = token_losses_.find(&m);
    if (d == Divided::kItems) return m.num_items_in_batch ? static_cast<double>(*m.num_items_in_batch) : kNan;
    return it == token_losses_.end() ? kNan : static_cast<double>(it->second.labels);
  }

  void finish_losses() {
    std::optional<Divided> divided;
    Row in_loss;
    in_loss.missing = "needs token_loss, label_mask and returned_loss of every micro-batch";
    for (const Divided d : {Divided::kItems, Divided::kLabels}) {
      Row r = try_returned_loss(d);
      if (r.compared == 0) continue;
      if (!divided || (r.name.found && !in_loss.name.found && in_loss.differing > 0) ||
          (r.differing == 0 && in_loss.differing > 0)) {
        divided = d;
        in_loss = std::move(r);
      }
    }
    const bool any_aux = std::any_of(trace_.micro_batches().begin(), trace_.micro_batches().end(),
                                     [](const MicroBatchRecord& m) { return m.aux_loss.has_value(); });
    if (any_aux && divided) row("aux_in_loss") = in_loss;
    if (divided) loss_weights(*divided);
    aux_weights();
  }

  /// returned_loss = sum / divisor + n x coefficient x aux_loss, solved for n.
  Row try_returned_loss(Divided d) {
    Row r;
    r.quantity = "aux_in_loss";
    r.held_to = "the model's loss = cross-entropy + coefficient x aux_loss";
    bool fits_without = true;
    for (const StepLosses& s : step_losses_) {
      for (const MicroBatchRecord* m : s.micro_batches) {
        const auto it = token_losses_.find(m);
        const double by = divisor(*m, d);
        if (it == token_losses_.end() || !(by > 0) || !m->returned_loss || it->second.labels == 0) continue;
        const double ce = it->second.sum / by;
        const double error = (reduction(static_cast<double>(it->second.labels)) + 6 * unit(Float::kF32)) *
                             std::max(std::fabs(ce), std::fabs(*m->returned_loss));
        if (!m->aux_loss || *m->aux_loss == 0 || !facts_.aux_coefficient || *facts_.aux_coefficient == 0) {
          fits_without = fits_without && std::fabs(*m->returned_loss - ce) <= error;
          ++r.compared;
          r.differing += std::fabs(*m->returned_loss - ce) > error;
          continue;
        }
        const double one = *facts_.aux_coefficient * *m->aux_loss;
        const double n = (*m->returned_loss - ce) / one;
        // A number near 0 has no relative band: it is 0 if it lies within the absolute one.
        const double band = error / std::fabs(one) + 4 * unit(Float::kF32);
        r.observe(std::fabs(n) <= band ? 0.0 : n, 1.0, band / std::max(std::fabs(n), 1.0), place_of(*m));
      }
    }
    if (r.differing > 0 && !r.all_recorded.empty()) {
      const std::vector<v::Formula> formulas = {{"", r.held_to, r.all_expected}};
      r.name = v::name_formula("aux_in_loss", {r.all_recorded, r.all_band}, formulas, v::factors_of(symbols(true)));
    }
    return r;
  }

  /// d (what was back-propagated) / d (sum of token losses) of each micro-batch, times the labels of the step: 1.
  void loss_weights(Divided d) {
    Row& r = row("loss_weight");
    r.held_to = v::normalisation_forms()[0].name;
    r.missing = "needs loss_grad of every micro-batch, and the records of all ranks";
    std::vector<v::Formula> formulas;
    for (const v::NormalisationForm& f : v::normalisation_forms())
      formulas.push_back({std::string(f.id), std::string(f.name), {}});
    formulas.push_back({"G0", "divided by num_items_in_batch, which is not the labels of the step", {}});
    formulas.push_back({"G12", "not divided by any count of tokens", {}});
    for (const StepLosses& s : step_losses_) {
      if (!s.all_ranks) continue;
      std::map<std::int64_t, std::vector<const MicroBatchRecord*>> by_rank;
      bool sound = true;
      for (const MicroBatchRecord* m : s.micro_batches) {
        by_rank[m->rank].push_back(m);
        sound = sound && m->loss_grad && token_losses_.count(m) && divisor(*m, d) > 0;
      }
      const auto ranks = static_cast<std::int64_t>(by_rank.size());
      const std::size_t micro = by_rank.empty() ? 0 : by_rank.begin()->second.size();
      for (const auto& [rank, list] : by_rank) sound = sound && list.size() == micro;
      if (!sound || micro == 0) continue;
      std::vector<double> sums, recorded;
      std::vector<std::int64_t> labels;
      for (const auto& [rank, list] : by_rank) {
        for (const MicroBatchRecord* m : list) {
          const TokenLoss& t = token_losses_.at(m);
          sums.push_back(t.sum);
          labels.push_back(t.labels);
          recorded.push_back(*m->loss_grad / divisor(*m, d) /
                             static_cast<double>(ranks));  // DDP takes the mean of the gradients
        }
      }
      const auto all = static_cast<double>(std::accumulate(labels.begin(), labels.end(), std::int64_t{0}));
      if (all == 0) continue;
      std::vector<std::vector<double>> values;
      for (const v::NormalisationForm& f : v::normalisation_forms()) {
        double loss = 0;
        std::vector<double> weight(sums.size(), kNan);
        k::normalise(f.how, sums.data(), labels.data(), ranks, static_cast<std::int64_t>(micro), &loss, weight.data());
        values.push_back(std::move(weight));
      }
      std::size_t i = 0;
      for (const auto& [rank, list] : by_rank) {
        for (const MicroBatchRecord* m : list) {
          if (labels[i] > 0) {
            r.observe(recorded[i] * all, values[0][i] * all, 8 * unit(Float::kF32), place_of(*m));
            for (std::size_t f = 0; f < values.size(); ++f) formulas[f].values.push_back(values[f][i] * all);
            const double items = divisor(*m, Divided::kItems);
            formulas[values.size()].values.push_back(items != all ? all / items : kNan);
            formulas[values.size() + 1].values.push_back(all);
          }
          ++i;
        }
      }
    }
    if (r.compared > 0 && r.differing > 0) {
      r.name = v::name_formula("loss_weight", {r.all_recorded, r.all_band}, formulas, v::factors_of(symbols(true)));
      if (r.name.found && r.name.factor_value > 0) loss_factor_ = r.name.factor_value;
    }
  }

  /// Weight of the balance loss in what was back-propagated, over coefficient x the mean over micro-batches and ranks,
  /// relative to the cross-entropy's.
  void aux_weights() {
    if (!facts_.aux_coefficient || !(*facts_.aux_coefficient > 0)) return;
    Row& r = row("aux_weight");
    r.held_to = "coefficient, of the mean over micro-batches and ranks";
    r.missing = "needs aux_loss_grad of every micro-batch";
    for (const StepLosses& s : step_losses_) {
      double sum = 0;
      std::set<std::int64_t> ranks;
      bool sound = true;
      for (const MicroBatchRecord* m : s.micro_batches) {
        ranks.insert(m->rank);
        if (m->aux_loss_grad)
          sum += *m->aux_loss_grad;
        else
          sound = sound && m->aux_loss_requires_grad && !*m->aux_loss_requires_grad;
      }
      if (s.micro_batches.front()->aux_loss_grad && !s.micro_batches.front()->aux_loss) sound = false;
      if (!sound) {
        if (facts_.output_router_logits && !*facts_.output_router_logits)
          r.missing = "no balance loss was computed: output_router_logits is false";
        continue;
      }
      const double n = sum / *facts_.aux_coefficient / static_cast<double>(ranks.size()) / loss_factor_;
      r.observe(n, 1.0, (static_cast<double>(s.micro_batches.size()) + 6) * unit(Float::kF32),
                place_of(*s.micro_batches.front()));
    }
    if (r.differing == 0) return;
    const std::vector<v::Formula> formulas = {{"", r.held_to, r.all_expected}};
    r.name = v::name_formula("aux_weight", {r.all_recorded, r.all_band}, formulas, v::factors_of(symbols(true)));
  }

  const Trace& trace_;
  const TraceFacts& facts_;
  const ReplayOptions& options_;
  std::vector<WeightProblem>* problems_;
  std::optional<Routing> routing_;
  std::string folder_, why_not_routed_;
  std::optional<v::BalanceFamily> balance_;
  std::set<std::int64_t> ranks_;
  std::int64_t accumulation_ = 0;
  double loss_factor_ = 1, moved_ = 0;
  std::map<std::pair<int, int>, Row> rows_;                             // by place in the report, and layer
  std::map<std::pair<std::int64_t, int>, std::vector<double>> biases_;  // of the step at hand: by rank and layer
  std::vector<const MicroBatchRecord*> balance_seen_, z_seen_;
};

}  // namespace

ReplayTable replay_trace(const Trace& trace, const ReplayOptions& options, std::vector<WeightProblem>* problems) {
  return Replay(trace, options, problems).run();
}

namespace {

void run(MeasureContext& ctx) {
  if (!ctx.trace) return ctx.facts.replay.explain_unknown("no trace was given, or it could not be opened");
  std::vector<WeightProblem> problems;
  ReplayOptions options;
  options.progress = ctx.progress;
  ReplayTable table = replay_trace(*ctx.trace, options, &problems);
  Source source;
  source.role = Role::kTrace;
  source.file = ctx.trace->facts().head;
  std::size_t compared = 0;
  for (const std::int64_t n : table.compared) compared += n > 0;
  ctx.records.push_back(
      {"trace_replay", "host float64",
       std::to_string(table.quantity.size()) + " quantities, " + std::to_string(compared) + " compared"});
  ctx.facts.replay.set(std::move(table), Origin::kMeasured, std::move(source));
}

constexpr std::string_view kSupplies[] = {"trace.replay"};

}  // namespace

extern const Measure measure_trace_replay;
const Measure measure_trace_replay = {.name = "trace_replay", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit
