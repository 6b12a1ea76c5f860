#include "audit/measures/replay/balance.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "kernels/host/bounds.h"

namespace moeaudit::replay {
namespace {

constexpr std::size_t kMoved = 8;   // micro-batches whose logits are moved by a rounding
constexpr std::size_t kNamed = 16;  // micro-batches that a name must fit

/// Recorded numbers that do not change where the expected ones do.
bool constant(const Row& r) {
  double off = 0, changes = 0;
  for (std::size_t i = 1; i < r.all_recorded.size(); ++i) {
    off = std::max(off, std::fabs(r.all_recorded[i] - r.all_recorded[0]) / std::fabs(r.all_recorded[0]));
    const double change = std::fabs(r.all_expected[i] - r.all_expected[0]) / std::fabs(r.all_expected[0]);
    changes = std::max(changes, change / r.all_band[i]);
  }
  return r.all_recorded.size() > 1 && off <= 4 * unit(Float::kF32) && changes > 2;
}

}  // namespace

BalanceLosses::Sums::Sums(BalanceLosses* of, const MicroBatch& mb)
    : of_(*of),
      m_(*mb.record),
      layers_(static_cast<double>(mb.layers.size())),
      sum_{v::BalanceSum(of->right()), v::BalanceSum(of->right()), v::BalanceSum(of->right())},
      all_(!mb.layers.empty() && mb.layers.size() == of->ctx_.facts.layers.size() && !m_.sampled_tokens) {}

BalanceLosses::LayerSums BalanceLosses::Sums::of_nothing() const {
  return {v::BalanceSum(of_.right()), v::BalanceSum(of_.right()), v::BalanceSum(of_.right())};
}

BalanceLosses::LayerSums BalanceLosses::Sums::of(const v::RoutedLayer& l) const {
  LayerSums s = of_nothing();
  if (!all_ || (!m_.aux_loss && !m_.z_loss)) return s;
  s.range = l.highest - l.lowest;
  s.experts = l.experts;
  s.dtype = l.dtype == Float::kBF16 || l.dtype == Float::kF16 ? l.dtype : Float::kF32;
  if (m_.aux_loss) s.loss.add(l);
  if (m_.aux_loss && of_.balance_seen_.size() < kMoved) {
    // One rounding of the recorded dtype up and down, alternating, so that a common shift does not cancel.
    v::RoutedLayer moved = l;
    for (std::size_t i = 0; i < l.logits.size(); ++i)
      moved.logits[i] += (i % 2 ? 1 : -1) * std::max(0.5 * k::spacing(l.logits[i], l.dtype), l.logit_error);
    moved.prepare();
    s.up.add(moved);
    for (std::size_t i = 0; i < l.logits.size(); ++i) moved.logits[i] = 2 * l.logits[i] - moved.logits[i];
    moved.prepare();
    s.down.add(moved);
  }
  if (m_.z_loss) {
    s.z = v::z_value(v::z_forms()[0], l);
    const double lse = std::sqrt(std::fabs(s.z));
    s.z_error = k::bounds::log_sum_exp(l.experts, s.range, lse) * 2 * lse +
                (unit(l.dtype) * std::max(std::fabs(l.highest), std::fabs(l.lowest)) + l.logit_error) * 2 * lse;
  }
  return s;
}

void BalanceLosses::Sums::add(const std::optional<LayerSums>& l) {
  all_ = all_ && l;
  if (!all_) return;
  sum_.loss.add(l->loss), sum_.up.add(l->up), sum_.down.add(l->down);
  sum_.z += l->z;
  sum_.z_error += l->z_error;
  sum_.range = std::max(sum_.range, l->range);
  sum_.experts = std::max(sum_.experts, l->experts);
  if (l->dtype != Float::kF32) sum_.dtype = l->dtype;
}

void BalanceLosses::Sums::finish() {
  if (m_.aux_loss) finish_aux();
  if (m_.z_loss) finish_z();
}

void BalanceLosses::Sums::finish_aux() {
  Row& r = of_.ctx_.row("aux_loss");
  if (!std::isfinite(*m_.aux_loss)) {
    r.missing = "a recorded aux_loss is not finite";
  } else if (!all_) {
    r.missing = m_.sampled_tokens ? "the per-token tensors are a sample: record without max_tokens"
                                  : "needs router_logits of every layer, finite";
  } else {
    const double want = sum_.loss.value();
    if (!std::isfinite(want)) r.missing = "layers of several sizes make no one set";
    if (std::isfinite(want) && of_.balance_seen_.size() < kMoved) {
      of_.moved_ = std::max({of_.moved_, std::fabs(sum_.up.value() - want) / std::fabs(want),
                             std::fabs(sum_.down.value() - want) / std::fabs(want)});
    }
    const double narrow = sum_.dtype == Float::kF32 ? 0.0 : 3 * unit(sum_.dtype);
    const double band = of_.moved_ + k::bounds::softmax_relative(sum_.experts, 0, sum_.range, Float::kF32) + narrow +
                        reduction(static_cast<double>(m_.tokens) * layers_) + sum_.loss.tie_slack();
    r.held_to = of_.right().name;
    if (!(band < kTellsNothing)) {
      r.missing = "the logits are so large that rounding them can change the loss by half";
    } else if (std::isfinite(want)) {
      r.observe(*m_.aux_loss, want, band, of_.ctx_.place_of(m_));
      of_.balance_seen_.push_back(&m_);
    }
  }
}

void BalanceLosses::Sums::finish_z() {
  Row& r = of_.ctx_.row("z_loss");
  if (std::isnan(*m_.z_loss)) {  // infinite it has a name: Z13
    r.missing = "a recorded z_loss is not a number";
  } else if (!all_) {
    r.missing = "needs router_logits of every layer, finite and not sampled";
  } else {
    const double want = sum_.z / layers_;
    const double by_range = 8 * unit(Float::kF32) * (1 + sum_.range);
    const double band =
        sum_.z_error / layers_ / std::max(want, 1e-300) + reduction(static_cast<double>(m_.tokens)) + by_range;
    r.held_to = v::z_forms()[0].name;
    if (!(by_range < kTellsNothing)) {
      r.missing = "the logits are so far apart that rounding them can change the loss by half";
      return;
    }
    r.observe(*m_.z_loss, want, band, of_.ctx_.place_of(m_));
    of_.z_seen_.push_back(&m_);
  }
}

void BalanceLosses::name() {
  if (Row* r = ctx_.find("aux_loss")) name_aux(r);
  if (Row* r = ctx_.find("z_loss")) name_z(r);
}

/// Loads of the steps that the named micro-batches belong to, for the forms that count beyond a micro-batch.
void BalanceLosses::load_step(std::int64_t step) {
  ctx_.loads.clear();
  for (const TraceStep& s : ctx_.trace.steps()) {
    if (s.step != step) continue;
    for (const MicroBatchRecord& m : ctx_.trace.micro_batches_of(s)) {
      const MicroBatch mb = ctx_.trace.open(m, ctx_.problems);
      const Shared shared = ctx_.shared_of(mb);
      for (const LayerTensors& t : mb.layers) ctx_.count_loads(m, shared, t);
    }
  }
}

void BalanceLosses::add_loads(const MicroBatchRecord& m, int layer, v::RoutedLayer* l) const {
  const auto of_layer = ctx_.loads.find(layer);
  if (of_layer == ctx_.loads.end()) return;
  const auto add = [&](const Loads& x, v::RoutedLayer::Pool* pool) {
    pool->counts.resize(x.valid.size());
    for (std::size_t e = 0; e < x.valid.size(); ++e) pool->counts[e] += x.valid[e];
    pool->tokens += x.tokens;
  };
  std::set<std::int64_t> ranks;
  for (const auto& [at, x] : of_layer->second) {
    ranks.insert(at.second);
    add(x, &l->step);
    if (at.first == m.micro_batch) add(x, &l->ranks);
    if (at.first <= m.micro_batch) add(x, &l->running);
    if (at.second == m.rank) add(x, &l->own_step);
  }
  if (ranks.size() < 2) l->own_step = {};  // the same as that of all ranks
}

void BalanceLosses::name_aux(Row* r) {
  if (r->differing == 0) return;
  const auto forms = v::balance_forms(ctx_.balance, !ctx_.routing || ctx_.routing->scoring == Scoring::kSoftmax);
  std::vector<v::Formula> formulas;
  for (const v::BalanceForm& f : forms) formulas.push_back({std::string(f.id), std::string(f.name), {}});
  const std::size_t n = std::min(kNamed, balance_seen_.size());
  std::int64_t step = -1;
  for (std::size_t i = 0; i < n; ++i) {
    const MicroBatchRecord& m = *balance_seen_[i];
    if (m.step != step) load_step(step = m.step);
    const MicroBatch mb = ctx_.trace.open(m, ctx_.problems);
    const Shared shared = ctx_.shared_of(mb);
    std::vector<v::BalanceSum> sums(forms.begin(), forms.end());
    for (const LayerTensors& t : mb.layers) {
      v::RoutedLayer l;
      if (!ctx_.read_layer(m, shared, t, &l)) continue;
      add_loads(m, t.layer, &l);
      for (v::BalanceSum& sum : sums) sum.add(l);
    }
    for (std::size_t f = 0; f < forms.size(); ++f) formulas[f].values.push_back(sums[f].value());
  }
  const v::Observations seen{std::span(r->all_recorded).first(n), std::span(r->all_band).first(n)};
  r->name = v::name_formula("aux_loss", seen, formulas, v::factors_of(ctx_.symbols(false)));
  if (!r->name.found && constant(*r)) {
    r->name.found = true;
    r->name.id = "A36";
    r->name.name = "the same number in every micro-batch, whatever the logits";
  }
  if (ctx_.balance_known) return;
  // Nobody said which convention this framework has: one that frameworks use is no divergence.
  static constexpr std::string_view kConventions[] = {"",    "A0",  "A1",  "A2",  "A3", "A4",
                                                      "A7", "A13", "A14", "A18", "A23", "A24", "A25"};
  const auto conventional = [&](std::string_view id) {
    return std::find(std::begin(kConventions), std::end(kConventions), id) != std::end(kConventions);
  };
  bool one = r->name.found && conventional(r->name.id);
  if (!one) {  // one that another name stands before: k = 2 and twice
    std::erase_if(formulas, [&](const v::Formula& f) { return !conventional(f.id); });
    std::vector<v::Symbol> sizes = ctx_.symbols(false);
    std::erase_if(sizes, [](const v::Symbol& s) { return s.text != "L" && s.text != "k" && s.text != "S"; });
    std::vector<v::Factor> plain = v::factors_of(sizes);
    std::erase_if(plain, [](const v::Factor& f) { return f.terms > 1 || f.value < 1; });
    const v::Name name = v::name_formula("aux_loss", seen, formulas, plain);
    one = name.found;
    if (one) r->name = name;
  }
  const std::string of = ctx_.facts.model_type.empty() ? "this framework" : "model_type " + ctx_.facts.model_type;
  if (one) r->differing = 0;
  if (!r->name.found) {
    r->compared = 0;
    r->missing = "no formula of the catalogue gives it, and no convention is known for " + of;
  }
  r->held_to += "; no convention is known for " + of;
}

void BalanceLosses::name_z(Row* r) {
  if (r->differing == 0) return;
  std::vector<v::Formula> formulas;
  for (const v::ZForm& f : v::z_forms()) formulas.push_back({std::string(f.id), std::string(f.name), {}});
  const std::size_t n = std::min(kNamed, z_seen_.size());
  for (std::size_t i = 0; i < n; ++i) {
    const MicroBatchRecord& m = *z_seen_[i];
    const MicroBatch mb = ctx_.trace.open(m, ctx_.problems);
    const Shared shared = ctx_.shared_of(mb);
    std::vector<double> sums(formulas.size());
    for (const LayerTensors& t : mb.layers) {
      v::RoutedLayer l;
      if (!ctx_.read_layer(m, shared, t, &l)) continue;
      for (std::size_t f = 0; f < formulas.size(); ++f) sums[f] += v::z_value(v::z_forms()[f], l);
    }
    for (std::size_t f = 0; f < formulas.size(); ++f)
      formulas[f].values.push_back(sums[f] / static_cast<double>(mb.layers.size()));
  }
  // What one rank has, or the mean of all, in every rank's record.
  v::Formula one{"Z16", "that of one rank, in the others' records too", {}, true};
  bool mean_fits = true;
  for (std::size_t i = 0; i < n; ++i) {
    double sum = 0, of_first = kNan, ranks = 0;
    for (std::size_t j = 0; j < z_seen_.size(); ++j) {
      if (z_seen_[j]->step != z_seen_[i]->step || z_seen_[j]->micro_batch != z_seen_[i]->micro_batch) continue;
      if (ranks == 0) of_first = r->all_expected[j];
      ranks += 1;
      sum += r->all_expected[j];
    }
    one.values.push_back(ranks > 1 ? of_first : kNan);
    mean_fits = mean_fits && ranks > 1 && std::isfinite(r->all_recorded[i]) &&
                std::fabs(r->all_recorded[i] - sum / ranks) <= r->all_band[i] * r->all_recorded[i];
  }
  if (mean_fits) {
    r->held_to = std::string(v::z_forms()[0].name) + ", and over ranks";
    r->differing = 0;
    return;
  }
  formulas.push_back(std::move(one));
  r->name = v::name_formula("z_loss", {std::span(r->all_recorded).first(n), std::span(r->all_band).first(n)}, formulas,
                            v::factors_of(ctx_.symbols(false)));
}

}  // namespace moeaudit::replay
