// A base against what was trained from it: how far every router and expert moved, which never did, how dtypes changed, what
// became of correction biases, and how many of the base's expert choices the trained routers still make.
//
// Routing: tokens x as in router_inputs.h, in float32. With a probe each model sees x through the norm weight in front of its
// own router; with --hidden-states both see the same rows. Logits are sums in float64; both sides route by the family's
// conventions with the trained model's numbers (k, groups), so that only weights and biases differ.
#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "audit/measures/measure.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/router_precision.h"
#include "audit/measures/replay_backend.h"
#include "audit/measures/router_replay.h"
#include "audit/measures/weight_pairs.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

namespace k = kernels;

constexpr std::string_view kSupplies[] = {"base.changes", "base.routing_kept", "base.dtypes", "base.tensor_diff", "base.correction_bias"};
constexpr std::string_view kWants[] = {"weights.routers"};

bool is_correction_bias(std::string_view name) {
  return name.find("correction_bias") != std::string_view::npos || name.find("expert_bias") != std::string_view::npos;
}

Source weights_source(const TensorStore& store) {
  Source s;
  s.role = Role::kModelWeights;
  s.file = store.files().empty() ? std::string() : store.files().front();
  return s;
}

const std::string& file_of(const TensorStore& store, const TensorView& t) { return store.files()[static_cast<std::size_t>(t.file)]; }

// ---- headers -------------------------------------------------------------------------------------------------------

DTypePairs dtype_pairs(const WeightPairs& w, const TensorStore& trained) {
  std::map<std::tuple<Part, DType, DType>, std::size_t> rows;
  DTypePairs out;
  const TensorView* last = nullptr;
  for (const WeightPair& p : w.pairs) {
    const TensorView* t = p.trained.matrix.tensor;
    if (t == last) continue;  // slices of one stack
    last = t;
    const std::tuple key{p.trained.part.part, p.base.matrix.tensor->dtype, t->dtype};
    const auto [at, fresh] = rows.emplace(key, out.part.size());
    if (fresh) {
      out.part.push_back(std::get<0>(key));
      out.base.push_back(std::get<1>(key));
      out.trained.push_back(std::get<2>(key));
      out.tensors.push_back(0);
      out.first.emplace_back(t->name);
      out.file.push_back(file_of(trained, *t));
    }
    ++out.tensors[at->second];
  }
  return out;
}

// ---- values --------------------------------------------------------------------------------------------------------

/// Routers first, then experts, then the rest of the network by part.
std::tuple<int, int, int, std::string> row_of(const WeightUnit& u) {
  const NamedPart& p = u.part;
  if (p.part == Part::kRouter) return {0, p.layer, -1, std::string(u.matrix.tensor->name)};
  if (p.part == Part::kRoutedExpert) return {1, p.layer, p.expert, p.expert < 0 ? std::string(u.matrix.tensor->name) : std::string()};
  return {2 + static_cast<int>(p.part), -1, -1, {}};
}

BaseChanges changes_of(const WeightPairs& w, const std::vector<PairSums>& sums, const TensorStore& trained) {
  struct Row {
    PairSums sums;
    std::int64_t elements = 0, tensors = 0;
    const WeightUnit* first = nullptr;
  };
  std::map<std::tuple<int, int, int, std::string>, Row> rows;
  for (std::size_t i = 0; i < w.pairs.size(); ++i) {
    if (!sums[i].read) continue;
    Row& row = rows[row_of(w.pairs[i].trained)];
    row.sums.add(sums[i]);
    row.elements += w.pairs[i].trained.matrix.elements();
    ++row.tensors;
    if (!row.first) row.first = &w.pairs[i].trained;
  }
  BaseChanges out;
  for (const auto& [key, row] : rows) {
    const WeightUnit& u = *row.first;
    out.part.push_back(u.part.part);
    out.layer.push_back(std::get<1>(key));
    out.expert.push_back(std::get<2>(key));
    out.tensor.emplace_back(u.matrix.tensor->name);
    out.file.push_back(file_of(trained, *u.matrix.tensor));
    out.is_buffer.push_back(is_correction_bias(u.matrix.tensor->name));
    out.tensors.push_back(row.tensors);
    out.elements.push_back(row.elements);
    out.changed.push_back(row.sums.changed);
    out.base_norm.push_back(std::sqrt(row.sums.base_squares));
    out.change_norm.push_back(std::sqrt(row.sums.change_squares));
    const double both = std::sqrt(row.sums.base_squares) * std::sqrt(row.sums.change_squares);
    out.along.push_back(both > 0 ? row.sums.dot / both : 0.0);
  }
  return out;
}

/// In the trained model, under whatever name.
bool holds_bias(const FactSheet& f, int layer) {
  if (!f.routers.known()) return false;
  const RouterTable& t = f.routers.value();
  const auto at = std::find(t.layer.begin(), t.layer.end(), layer);
  return at != t.layer.end() && !t.bias[static_cast<std::size_t>(at - t.layer.begin())].empty();
}

/// Correction biases are read whole: one number an expert.
BiasChanges biases_of(const MeasureContext& ctx, const WeightPairs& w) {
  BiasChanges out;
  auto add = [&](const WeightUnit& u, const TensorView& base, const TensorView* trained) {
    std::vector<double> w0(static_cast<std::size_t>(base.elements())), w1;
    if (!is_plain_float(base.dtype) || !decode(base, 0, base.elements(), w0.data())) return;
    if (trained) {
      w1.resize(w0.size());
      if (!is_plain_float(trained->dtype) || !decode(*trained, 0, base.elements(), w1.data())) return;
    }
    std::int64_t base_non_zero = 0, non_zero = 0, changed = 0;
    double largest = 0;
    for (std::size_t i = 0; i < w0.size(); ++i) {
      base_non_zero += w0[i] != 0;
      if (!trained) continue;
      non_zero += w1[i] != 0;
      changed += w0[i] != w1[i];
      largest = std::max(largest, std::fabs(w1[i] - w0[i]));
    }
    std::string rounded;
    for (const auto& [dtype, name] : {std::pair{k::Float::kBF16, "BF16"}, {k::Float::kF16, "F16"}}) {
      if (changed == 0 || !rounded.empty()) continue;
      std::vector<double> r(w0.size());
      k::round_values(w0.data(), static_cast<std::int64_t>(w0.size()), dtype, r.data());
      if (r == w1) rounded = name;
    }
    out.layer.push_back(u.part.layer);
    out.tensor.emplace_back(trained ? trained->name : base.name);
    out.file.push_back(trained ? file_of(ctx.model, *trained) : ctx.model.files().front());
    out.present.push_back(trained != nullptr);
    out.elements.push_back(base.elements());
    out.base_non_zero.push_back(base_non_zero);
    out.non_zero.push_back(non_zero);
    out.changed.push_back(changed);
    out.rounded_to.push_back(std::move(rounded));
    out.largest_change.push_back(largest);
  };
  constexpr std::int64_t kMost = 1 << 20;  // experts; a "bias" longer than that is none
  for (const WeightPair& p : w.pairs) {
    const TensorView& b = *p.base.matrix.tensor;
    if (is_correction_bias(b.name) && b.elements() <= kMost) add(p.base, b, p.trained.matrix.tensor);
  }
  for (const std::string& name : w.only_base) {
    const TensorView* b = is_correction_bias(name) ? ctx.base.find(name) : nullptr;
    if (!b || b->elements() > kMost) continue;
    WeightUnit u;
    u.part = classify(nullptr, name);
    if (!holds_bias(ctx.facts, u.part.layer)) add(u, *b, nullptr);
  }
  return out;
}

// ---- routing -------------------------------------------------------------------------------------------------------

/// Sums over tokens of |S0 and S1|, its square, and of equal sets: integers, so they merge in any order.
struct Overlap {
  std::int64_t tokens = 0, kept = 0, squares = 0, same = 0;
};

class RoutingComparison {
 public:
  RoutingComparison(MeasureContext& ctx, const WeightPairs& pairs)
      : ctx_(ctx), routing_(ctx.facts.routing.value()), top_k_(ctx.facts.top_k.value()), inputs_(ctx.hidden_states, k::Float::kF32), budget_(affordable_tokens(work())), backend_(ctx, core_seconds_a_token(work()) * static_cast<double>(budget_) / std::max(ctx.threads, 1)) {
    for (const WeightPair& p : pairs.pairs) base_name_.emplace(p.trained.matrix.tensor->name, p.base.matrix.tensor->name);
  }

  void run() {
    const RouterTable& routers = ctx_.facts.routers.value();
    std::string first_fault;
    for (std::size_t row = 0; row < routers.layer.size(); ++row) {
      const std::string fault = compare_router(row, budget_);
      if (!fault.empty() && first_fault.empty()) first_fault = fault;
    }
    if (out_.layer.empty()) {
      ctx_.facts.base_routing.explain_unknown(first_fault);
      return;
    }
    out_.input = inputs_.probe() ? "probe: seeded unit Gaussian through each model's norm weight" : "hidden states " + ctx_.hidden_states.files().front();
    ctx_.facts.base_routing.set(std::move(out_), Origin::kMeasured, weights_source(ctx_.base));
  }
  const ReplayBackend& backend() const { return backend_; }

 private:
  RouterWork work() const {
    const RouterTable& routers = ctx_.facts.routers.value();
    RouterWork work;
    work.routers = static_cast<std::int64_t>(routers.layer.size());
    for (std::size_t i = 0; i < routers.layer.size(); ++i) {
      work.experts = std::max(work.experts, routers.experts[i]);
      work.hidden = std::max(work.hidden, routers.hidden[i]);
    }
    work.wide_modes = 2;
    return work;
  }

  struct Side {
    Router router;
    Aligned<double> packed;
    std::vector<double> linear, correction;
  };

  std::string base_name(const std::string& trained) const {
    const auto at = base_name_.find(trained);
    return at == base_name_.end() ? trained : std::string(at->second);
  }

  /// `base`: under the names that the base has for the same tensors.
  std::string read_side(const TensorStore& store, bool base, std::size_t row, Side* out) const {
    const RouterTable& t = ctx_.facts.routers.value();
    const auto name = [&](const std::string& n) { return base ? base_name(n) : n; };
    Router& r = out->router;
    r.layer = t.layer[row];
    r.experts = t.experts[row];
    r.hidden = t.hidden[row];
    if (r.experts < 1 || r.hidden < 1) return t.tensor[row] + " is quantised or empty";
    std::string fault = read_gate(store, t, row, name(t.tensor[row]), &r.w);
    if (fault.empty() && routing_.linear_bias) fault = read_floats(store, name(with_layer(routing_.linear_bias_tensor, r.layer)), r.experts, &r.linear_bias);
    if (fault.empty() && routing_.correction_bias) {
      const std::string bias = t.bias[row].empty() ? with_layer(routing_.correction_bias_tensor, r.layer) : t.bias[row];
      fault = read_correction_bias(store, name(bias), r.experts, &r.correction_bias);
    }
    if (!fault.empty()) return fault;
    if (routing_.input_norm_tensor.empty() || !read_floats(store, name(with_layer(routing_.input_norm_tensor, r.layer)), r.hidden, &r.norm).empty()) {
      r.norm.assign(static_cast<std::size_t>(r.hidden), 1.0f);
    }
    out->packed = Aligned<double>(k::packed_gate_size<double>(r.experts, r.hidden));
    k::pack_gate(r.w.data(), r.experts, r.hidden, out->packed.data());
    out->linear.assign(r.linear_bias.begin(), r.linear_bias.end());
    out->correction.assign(r.correction_bias.begin(), r.correction_bias.end());
    return {};
  }

  std::string compare_router(std::size_t row, std::int64_t tokens) {
    Side base, trained;
    std::string fault = read_side(ctx_.base, true, row, &base);
    if (fault.empty()) fault = read_side(ctx_.model, false, row, &trained);
    if (!fault.empty()) return fault;
    const Router& r = trained.router;
    const k::Status status = k::check_route(route_args<double>(routing_, r.experts, top_k_), {});
    if (status != k::Status::kOk) return ctx_.facts.routers.value().tensor[row] + ": " + k::name_of(status);
    const TensorView* view = nullptr;
    if (inputs_.probe()) {
      inputs_.make_probe(tokens, r.hidden, ctx_.threads);
    } else {
      view = inputs_.tensor_of(r.layer);
      const std::int64_t rows = view ? RouterInputs::rows_of(*view, r.hidden) : 0;
      if (rows == 0) return "the hidden states have no float tensor [tokens, " + std::to_string(r.hidden) + "] for layer " + std::to_string(r.layer);
      tokens = std::min(tokens, rows);
    }
    const std::int64_t tile_size = backend_.tile(), tiles = (tokens + tile_size - 1) / tile_size;
    std::vector<Overlap> overlaps(static_cast<std::size_t>(tiles));
    parallel_for(ctx_.threads, tiles, [&](std::int64_t tile, int) {
      const std::int64_t first = tile * tile_size, n = std::min(tile_size, tokens - first);
      compare_tile(base, trained, view, first, n, tokens, &overlaps[static_cast<std::size_t>(tile)]);
    });
    append(row, overlaps);
    return {};
  }

  void choose(const Side& side, const TensorView* view, std::int64_t first, std::int64_t n, std::int64_t of, std::int64_t* kept, std::vector<std::int32_t>* chosen) {
    const Router& r = side.router;
    Aligned<float> x(n * r.hidden);
    Aligned<double> logits(n * r.experts);
    *kept = inputs_.fill(r.norm.data(), view, r.hidden, first, n, of, x.data());
    chosen->resize(static_cast<std::size_t>(*kept * top_k_));
    backend_.gate_logits(k::GateArgs<float, double>{x.data(), side.packed.data(), side.linear.empty() ? nullptr : side.linear.data(), *kept, r.hidden, r.experts, logits.data()});
    k::RouteArgs<double> args = route_args<double>(routing_, r.experts, top_k_);
    args.logits = logits.data();
    args.tokens = *kept;
    args.correction_bias = side.correction.empty() ? nullptr : side.correction.data();
    backend_.route(args, k::RouteResult<double>{chosen->data(), nullptr, nullptr, nullptr});
  }

  void compare_tile(const Side& base, const Side& trained, const TensorView* view, std::int64_t first, std::int64_t n, std::int64_t of, Overlap* out) {
    std::vector<std::int32_t> s0, s1;
    std::int64_t kept0 = 0, kept1 = 0;
    choose(base, view, first, n, of, &kept0, &s0);
    choose(trained, view, first, n, of, &kept1, &s1);
    if (kept0 != kept1) return;  // rows that overflow float32 behind one of the norms
    for (std::int64_t t = 0; t < kept0; ++t) {
      const auto from = s0.begin() + t * top_k_;
      std::int64_t both = 0;
      for (std::int64_t j = 0; j < top_k_; ++j) both += std::find(from, from + top_k_, s1[static_cast<std::size_t>(t * top_k_ + j)]) != from + top_k_;
      ++out->tokens;
      out->kept += both;
      out->squares += both * both;
      out->same += both == top_k_;
    }
  }

  void append(std::size_t row, const std::vector<Overlap>& overlaps) {
    Overlap sum;
    for (const Overlap& o : overlaps) {
      sum.tokens += o.tokens;
      sum.kept += o.kept;
      sum.squares += o.squares;
      sum.same += o.same;
    }
    if (sum.tokens == 0) return;
    const RouterTable& t = ctx_.facts.routers.value();
    const double n = static_cast<double>(sum.tokens), kk = static_cast<double>(top_k_);
    const double mean = static_cast<double>(sum.kept) / (n * kk);
    const double variance = std::max(0.0, static_cast<double>(sum.squares) / (n * kk * kk) - mean * mean);
    const double half = 1.959963984540054 * std::sqrt(variance / n);
    out_.layer.push_back(t.layer[row]);
    out_.tensor.push_back(t.tensor[row]);
    out_.tokens.push_back(sum.tokens);
    out_.kept.push_back(mean);
    out_.low.push_back(std::max(0.0, mean - half));
    out_.high.push_back(std::min(1.0, mean + half));
    out_.same.push_back(static_cast<double>(sum.same) / n);
    out_.chance.push_back(kk / static_cast<double>(t.experts[row]));
  }

  MeasureContext& ctx_;
  Routing routing_;
  std::int64_t top_k_;
  RouterInputs inputs_;
  std::int64_t budget_;
  ReplayBackend backend_;
  std::map<std::string_view, std::string_view> base_name_;
  RoutingKept out_;
};

// ---- the measure ---------------------------------------------------------------------------------------------------

void run(MeasureContext& ctx) {
  FactSheet& f = ctx.facts;
  const auto unknown = [&](const std::string& why) {
    f.base_changes.explain_unknown(why);
    f.base_routing.explain_unknown(why);
  };
  if (ctx.model.empty() || ctx.base.empty()) {
    const char* why = "the weights of a base model and of a model trained from it are not both among the inputs";
    unknown(why);
    f.base_dtypes.explain_unknown(why);
    f.base_tensor_diff.explain_unknown(why);
    f.base_biases.explain_unknown(why);
    return;
  }
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  const UnitNames names(family, f.num_experts.known() ? f.num_experts.value() : 0);
  const WeightPairs pairs = pair_weights(ctx.base, ctx.model, names);
  const Source source = weights_source(ctx.base);
  f.base_dtypes.set(dtype_pairs(pairs, ctx.model), Origin::kMeasured, source);
  TensorDiff diff;
  diff.missing = pairs.only_base;
  diff.missing_shard.assign(diff.missing.size(), {});
  diff.unexpected = pairs.only_trained;
  f.base_tensor_diff.set(std::move(diff), Origin::kMeasured, source);
  f.base_biases.set(biases_of(ctx, pairs), Origin::kMeasured, source);
  if (pairs.pairs.empty()) {
    unknown("base and trained model have no tensor in common");
    ctx.records.push_back({"base_comparison", "host float64", "no tensor in common"});
    return;
  }
  std::string note = std::to_string(pairs.pairs.size()) + " matrices";
  if (!pairs.other_shape.empty()) note += ", " + std::to_string(pairs.other_shape.size()) + " of another shape: " + pairs.other_shape.front();
  if (!ctx.replays) {
    unknown("--static");
    ctx.records.push_back({"base_comparison", "host", note + ", headers only: --static"});
    return;
  }
  std::vector<const WeightPair*> all;
  std::int64_t bytes = 0;
  for (const WeightPair& p : pairs.pairs) {
    all.push_back(&p);
    bytes += p.base.matrix.elements() * size_of(p.base.matrix.tensor->dtype) + p.trained.matrix.elements() * size_of(p.trained.matrix.tensor->dtype);
  }
  const bool asked = ctx.full || (f.base_given.known() && f.base_given.origin() == Origin::kStated);
  if (!asked && bytes > kUnaskedScan) {
    const std::string why = std::to_string(bytes / 1'000'000'000) + " GB in both models: give the base with --base DIR, or --full";
    unknown(why);
    ctx.records.push_back({"base_comparison", "host", note + ", headers only: " + why});
    return;
  }
  const std::vector<PairSums> sums = compare(all, ctx.threads, [&ctx](double done) {
    if (ctx.progress) ctx.progress("base against trained", done);
  });
  const auto unread = std::count_if(sums.begin(), sums.end(), [](const PairSums& s) { return !s.read; });
  if (unread > 0) note += ", " + std::to_string(unread) + " that differ in packed types not compared";
  f.base_changes.set(changes_of(pairs, sums, ctx.model), Origin::kMeasured, source);
  MeasureRecord record{"base_comparison", std::string("host ") + k::host_backend(), {}};
  if (!f.routers.known() || f.routers.value().layer.empty()) {
    f.base_routing.explain_unknown("no router found in the weights");
  } else if (!f.routing.known() || !f.top_k.known()) {
    f.base_routing.explain_unknown("the routing conventions of this model are not known");
  } else {
    RoutingComparison routing(ctx, pairs);
    routing.run();
    if (routing.backend().on_device()) record.backend += "; routing: " + routing.backend().name();
    record.warning = routing.backend().warning();
  }
  record.note = note;
  ctx.records.push_back(std::move(record));
}

}  // namespace

extern const Measure measure_base_comparison;
const Measure measure_base_comparison = {.name = "base_comparison", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit
